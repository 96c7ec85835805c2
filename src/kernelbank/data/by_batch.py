"""Augment a batch of images of equal size at once, on their device, as timm's transforms augment single images.

The random numbers of an image follow from its own seed. The crop of an image, resized to the size that the model takes,
and its mirror image are products with two matrices of Pillow's resampling filters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernelbank.data.augment import Augmentation
from kernelbank.data.dataset import shifted
from kernelbank.data.draws import normals, uniforms
from kernelbank.errors import InputError

TRIES = 10
"""How often a crop, or a rectangle to erase, is drawn before the whole image is taken, or nothing is erased."""
ERASED, ERASED_ASPECT = (0.02, 1 / 3), 0.3
"""The share of the image that timm erases, least and most, and the least aspect of the rectangle; the most is its
inverse."""
Filter = Literal["bicubic", "bilinear"]
# places in the stream of an image's seed
_CROP, _PLACE, _FLIP, _FILTER, _ERASE, _NOISE = 0, 20, 22, 23, 24, 64


@dataclass(frozen=True)
class Boxes:
    """A rectangle of whole pixels for each image, as tensors (B) in int64."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def unsupported(augment: Augmentation) -> str | None:
    """Return the field of `augment` that is only available for single images, or None."""
    if augment.auto_augment is not None:
        return f"auto_augment={augment.auto_augment}"
    return None if augment.color_jitter is None else f"color_jitter={augment.color_jitter}"


def augmented(
    images_BCHW: Tensor, seeds_B: Tensor, augment: Augmentation, size: tuple[int, int], mean_std: tuple[Tensor, Tensor]
) -> Tensor:
    """Return images of uint8 cropped, resized to `size`, flipped, normalised and erased, as float32 (B, C, *size).

    The result is that of timm's transforms for `augment`, up to the rounding in Pillow's filters. `mean_std` are two
    tensors (C, 1, 1), for pixels from 0 to 1.

    Raises:
        InputError: If `augment` has an operation that is only available for single images.
    """
    if field := unsupported(augment):
        raise InputError(f"recipe: invalid {field} for images that are augmented by the batch; expected None")
    if augment.shift:
        images_BCHW = shifted(images_BCHW.float(), augment.shift, seeds_B)
    height, width = images_BCHW.shape[-2:]
    boxes = crops(seeds_B, (height, width), augment)
    u = uniforms(seeds_B, 2, _FLIP)
    flip = u[:, 0] < augment.flip
    cubic = u[:, 1] < {"bicubic": 1.0, "bilinear": 0.0, "random": 0.5}[augment.interpolation]
    columns = resampling(boxes.left, boxes.width, width, size[1], cubic)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    rows = resampling(boxes.top, boxes.height, height, size[0], cubic)
    # Pillow keeps whole grey levels between the two axes too, in an order that its versions choose differently
    resized = rows[:, None] @ images_BCHW.float() @ columns[:, None].transpose(-1, -2)
    images = (_grey(resized) / 255 - mean_std[0]) / mean_std[1]
    return erased(images, seeds_B, augment) if augment.erase else images


def _grey(images: Tensor) -> Tensor:
    """Round to the nearest whole grey level, and halves upwards, as Pillow does."""
    return images.add_(0.5).floor_().clamp_(0, 255)


# ---- crops -----------------------------------------------------------------------------------------------


def crops(seeds_B: Tensor, grid: tuple[int, int], augment: Augmentation) -> Boxes:
    """Return random resized crops, as torchvision's RandomResizedCrop: the first of `TRIES` random areas and aspect
    ratios that fits, otherwise the largest centre crop with a valid aspect ratio."""
    height, width = grid
    u = uniforms(seeds_B, 2 * TRIES, _CROP).view(-1, TRIES, 2)
    area = height * width * (augment.scale[0] + (augment.scale[1] - augment.scale[0]) * u[..., 0])
    low, high = (math.log(ratio) for ratio in augment.ratio)
    aspect = (low + (high - low) * u[..., 1]).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    first, none = fits.long().argmax(1, keepdim=True), ~fits.any(1)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    place = uniforms(seeds_B, 2, _PLACE)
    top, left = (place[:, 0] * (height - h + 1)).long(), (place[:, 1] * (width - w + 1)).long()
    ch, cw = _centre(height, width, augment.ratio)
    centre = ((height - ch) // 2, (width - cw) // 2, ch, cw)
    drawn = (top, left, h, w)
    return Boxes(*(torch.where(none, torch.full_like(a, b), a) for a, b in zip(drawn, centre, strict=True)))


def _centre(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def resampling(start_B: Tensor, length_B: Tensor, source: int, target: int, cubic_B: Tensor) -> Tensor:
    """Return weights (B, target, source) that resize the pixels `start` to `start + length - 1` of an axis to `target`
    pixels, as Pillow does. When the axis is reduced, the filter is wider; pixels outside the crop are not used."""
    inside = torch.arange(source, device=start_B.device) - start_B[:, None]
    scale = length_B.float()[:, None] / target
    centre = (torch.arange(target, device=start_B.device) + 0.5) * scale
    x = (inside[:, None] + 0.5 - centre[:, :, None]) / scale.clamp(min=1)[:, :, None]
    weights = torch.where(cubic_B[:, None, None], _bicubic(x.abs()), (1 - x.abs()).clamp(min=0))
    weights = weights * ((inside >= 0) & (inside < length_B[:, None]))[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -1/2, which Pillow uses."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


# ---- erasing ---------------------------------------------------------------------------------------------


def erased(images_BCHW: Tensor, seeds_B: Tensor, augment: Augmentation) -> Tensor:
    """Return the images with a rectangle of some of them erased as `augment` states, as timm's RandomErasing does with
    its default shapes."""
    B, C, height, width = images_BCHW.shape
    u = uniforms(seeds_B, 3 + 2 * TRIES, _ERASE)
    shapes = u[:, 3:].view(-1, TRIES, 2)
    area = height * width * (ERASED[0] + (ERASED[1] - ERASED[0]) * shapes[..., 0])
    aspect = (math.log(ERASED_ASPECT) * (1 - 2 * shapes[..., 1])).exp()
    h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (h < height) & (w < width)
    first = fits.long().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    chosen = (u[:, 0] < augment.erase) & fits.any(1)
    top, left = (u[:, 1] * (height - h + 1)).long(), (u[:, 2] * (width - w + 1)).long()
    y, x = torch.arange(height, device=h.device), torch.arange(width, device=w.device)
    rows = (y >= top[:, None]) & (y < (top + h)[:, None]) & chosen[:, None]
    columns = (x >= left[:, None]) & (x < (left + w)[:, None])
    filling = torch.zeros((), device=images_BCHW.device)
    if augment.erase_mode != "const":
        shape = (C, height, width) if augment.erase_mode == "pixel" else (C, 1, 1)
        filling = normals(seeds_B, math.prod(shape), _NOISE).to(images_BCHW.dtype).view(B, *shape)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], filling, images_BCHW)
