"""Pictures from files of any kind: as they are looked at, as the model takes them, and what was done to them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.files import regular_file

SHARP = 448
"""The longest side of a picture to look at, unless the model's own is longer."""
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class Picture:
    """A picture: its file's name, the image that the model takes (RGB, or L for one channel), what was done to it, and
    the same part of the file in a size to look at."""

    name: str
    image: Image.Image
    notes: tuple[str, ...]
    sharp: Image.Image

    def tensor(self, mean: tuple[float, ...], std: tuple[float, ...], scale: float = 1.0) -> Tensor:
        """The normalised picture, (C, H, W). `scale` is the value of white."""
        values = np.array(self.image, dtype=np.float32) / 255 * scale
        planes = torch.from_numpy(values).reshape(self.image.height, self.image.width, -1).permute(2, 0, 1)
        return (planes - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def read_picture(path: Path, size: tuple[int, int], channels: int) -> Picture:
    """The picture at `path` as the model looks at it: upright, in 8 bits, its centre in `size` = (height, width).

    Raises: InputError: If the file is missing, is not an image, is damaged or too large.
    """
    notes: list[str] = []
    try:
        regular_file(path)
    except OSError as error:
        raise InputError(f"invalid image {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on size and on damaged metadata; both are handled here
            with Image.open(path) as opened:
                _note_depth(opened, notes)
                whole = opened.size
                image = _eight_bits(_upright(_first(opened, notes), size, notes), notes)
    except UnidentifiedImageError:
        raise InputError(f"invalid image {path}; expected a picture such as .jpg, .png or .webp") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"invalid image {path}: too large; expected at most {most // 10**6} million pixels") from None
    except FileNotFoundError:
        raise InputError(f"invalid image {path}: no such file; expected a picture") from None
    except IsADirectoryError:
        raise InputError(f"invalid image {path}: it is a folder; expected a picture") from None
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
        raise InputError(f"invalid image {path}: it is damaged ({error}); expected a picture") from None
    colour = _in_colour(image, notes) if channels == 3 else _in_grey(image, notes)
    whole = whole if (whole[0] > whole[1]) == (image.width > image.height) else (whole[1], whole[0])  # turned by EXIF
    return Picture(path.name, _fitted(colour, size, whole, notes), tuple(notes), _sharp(colour, size))


def _note_depth(image: Image.Image, notes: list[str]) -> None:
    """Say what is lost of more than 8 bits per channel, which Pillow reads as 8."""
    if any(";16" in str(part) for tile in getattr(image, "tile", ()) for part in tile) and image.mode not in DEEP:
        notes.append("16 bits per channel: reduced to 8")


def _first(image: Image.Image, notes: list[str]) -> Image.Image:
    """The first frame."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"{frames} frames: the first one")
        image.seek(0)
    return image


def _upright(image: Image.Image, size: tuple[int, int], notes: list[str]) -> Image.Image:
    """The image as its EXIF data say it is held. A large JPEG is decoded at a fraction of its size."""
    side = max(4 * max(size), SHARP)
    image.draft(None, (side, side))
    image.load()
    turned = ImageOps.exif_transpose(image)
    if image.getexif().get(0x0112, 1) != 1:
        notes.append("turned as its EXIF data say")
    return turned


def _eight_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """16 bits per channel become 8; 32-bit and floating-point values are spread from their least to their largest."""
    if image.mode not in (*DEEP, "F"):
        return image.copy()
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    if image.mode == "F" or values.max() > 65535 or values.min() < 0:
        low, high = values.min(), values.max()
        values = (values - low) / max(high - low, 1e-30) * 255
        notes.append(f"values from {low:g} to {high:g}: spread over 256 levels")
    elif values.max() > 255 or image.mode != "I":
        values = values / 257
        notes.append("16 bits per channel: reduced to 8")
    return Image.fromarray(values.round().astype(np.uint8))


def _in_colour(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image in RGB, transparency over white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        whole = image.convert("RGBA")
        white = Image.new("RGBA", whole.size, "white")
        if whole.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent: laid over white")
        return Image.alpha_composite(white, whole).convert("RGB")
    if image.mode == "CMYK":
        notes.append("CMYK: converted to RGB without a colour profile")
    elif image.mode in ("L", "1"):
        notes.append("grey: the same value in red, green and blue")
    return image.convert("RGB")


def _in_grey(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image in grey, for a model of one channel."""
    silent: list[str] = []
    if image.mode in ("L", "1"):
        return image.convert("L")
    colour = _in_colour(image, silent)
    notes += [note for note in silent if not note.startswith("grey")]
    if image.mode != "LA":
        notes.append("in colour: the model takes grey")
    return colour.convert("L")


def _fitted(image: Image.Image, size: tuple[int, int], whole: tuple[int, int], notes: list[str]) -> Image.Image:
    """The centre of the image at the model's size, (height, width), resampled as timm does in evaluation. `whole` is
    the width and height of the file's image."""
    height, width = size
    if (image.height, image.width) == size and image.size == whole:
        return image
    scale = max(height / whole[1], width / whole[0])
    word = "enlarged" if scale > 1 else "reduced"
    cut = abs(whole[1] * scale - height) >= 0.5 or abs(whole[0] * scale - width) >= 0.5
    notes.append(f"{whole[0]} x {whole[1]} pixels {word} to {width} x {height}{': the centre' if cut else ''}")
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _sharp(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The part of the image that `_fitted` takes, as sharp as it is in the file, or as the model sees it if that is
    sharper."""
    height, width = size
    pixels = min(image.height / height, image.width / width, SHARP / max(size))
    factor = max(pixels, 1.0)
    return ImageOps.fit(image, (round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
