"""Pictures of every kind become what the model takes, and what was done to them is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernelbank.errors import InputError
from kernelbank.explanation.picture import Picture, read_picture


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def colour(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def read(path: Path, channels: int = 3) -> Picture:
    return read_picture(path, (32, 32), channels)


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


FITTED = "40 x 30 pixels enlarged to 32 x 32: the centre"


def test_a_plain_picture_of_the_right_size_is_left_alone(tmp_path: Path) -> None:
    picture = read(saved(tmp_path / "a.png", colour(size=(32, 32))))
    assert picture.notes == () and picture.image.mode == "RGB"
    assert np.array_equal(pixels(picture), np.asarray(colour(size=(32, 32))))


@pytest.mark.parametrize(("mode", "name", "notes"), [
    ("RGB", "a.jpg", []),
    ("L", "a.png", ["grey: the same value in red, green and blue"]),
    ("1", "a.png", ["grey: the same value in red, green and blue"]),
    ("P", "a.png", []),
    ("CMYK", "a.jpg", ["CMYK: converted to RGB without a colour profile"]),
    ("RGBA", "a.png", []),
], ids=str)  # fmt: skip
def test_modes(tmp_path: Path, mode: str, name: str, notes: list[str]) -> None:
    picture = read(saved(tmp_path / name, colour(mode)))
    assert picture.image.mode == "RGB" and picture.image.size == (32, 32)
    assert list(picture.notes) == [*notes, FITTED]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    picture = read(saved(tmp_path / "a.png", Image.new("RGBA", (32, 32), (0, 0, 0, 0))))
    assert picture.notes == ("transparent: laid over white",) and pixels(picture).min() == 255


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    picture = read(saved(tmp_path / "a.png", Image.fromarray(ramp)))
    assert picture.notes[0] == "16 bits per channel: reduced to 8"
    assert np.abs(pixels(picture)[..., 0] - ramp / 257).max() <= 1
    floats = read(saved(tmp_path / "b.tiff", Image.fromarray(ramp.astype(np.float32) / 1000)))
    assert floats.notes[0] == "values from 0 to 65.535: spread over 256 levels"
    assert np.abs(pixels(floats)[..., 0] - ramp / 257).max() <= 1


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), tint) for tint in ("red", "blue", "green")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    picture = read(path)
    assert picture.notes == ("3 frames: the first one",)
    assert pixels(picture)[0, 0].tolist() == [255, 0, 0]


def test_exif_says_which_side_is_up(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture = read(saved(tmp_path / "a.jpg", image, exif=exif, quality=95))
    assert picture.notes == ("turned as its EXIF data say",)
    assert pixels(picture)[-4:].min() > 200 and pixels(picture)[:4].max() < 50


def test_the_size_is_that_of_the_file_as_it_is_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture = read(saved(tmp_path / "a.jpg", Image.new("RGB", (1200, 900), "red"), exif=exif))
    assert picture.notes == ("turned as its EXIF data say", "900 x 1200 pixels reduced to 32 x 32: the centre")
    square = read(saved(tmp_path / "b.jpg", Image.new("RGB", (512, 512), "red")))
    assert square.notes == ("512 x 512 pixels reduced to 32 x 32",)


def test_what_is_looked_at_is_the_same_part_as_sharp_as_the_file_has_it(tmp_path: Path) -> None:
    image = colour(size=(800, 600))
    small, large = (read_picture(saved(tmp_path / "a.png", image), size, 3) for size in ((32, 32), (500, 1000)))
    assert small.image.size == (32, 32) and small.sharp.size == (448, 448)
    assert large.image.size == large.sharp.size == (1000, 500)
    again = small.sharp.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(pixels(small) - np.asarray(again).astype(int)).mean() < 3
    enlarged = read(saved(tmp_path / "b.png", colour(size=(16, 16))))
    assert enlarged.sharp.size == (32, 32) and np.array_equal(np.asarray(enlarged.sharp), np.asarray(enlarged.image))


def test_a_large_picture_is_reduced(tmp_path: Path) -> None:
    picture = read(saved(tmp_path / "a.jpg", Image.new("RGB", (6000, 5000), "red")))
    assert picture.notes == ("6000 x 5000 pixels reduced to 32 x 32: the centre",) and picture.image.size == (32, 32)
    assert np.abs(pixels(picture) - [254, 0, 0]).max() <= 3


def test_a_picture_for_a_model_of_one_channel(tmp_path: Path) -> None:
    picture = read(saved(tmp_path / "a.png", colour(size=(32, 32))), channels=1)
    assert picture.image.mode == "L" and picture.notes == ("in colour: the model takes grey",)
    values = picture.tensor((5.0,), (2.0,), 16.0)
    assert values.shape == (1, 32, 32)
    torch.testing.assert_close(values[0], (torch.from_numpy(pixels(picture)).float() / 255 * 16 - 5) / 2)


def test_the_tensor_is_normalised_by_channel(tmp_path: Path) -> None:
    picture = read(saved(tmp_path / "a.png", Image.new("RGB", (32, 32), (255, 0, 51))))
    values = picture.tensor((0.5, 0.5, 0.2), (0.25, 0.5, 1.0))
    torch.testing.assert_close(values[:, 3, 4], torch.tensor([2.0, -1.0, 0.0]))


def test_what_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    whole = saved(tmp_path / "whole.png", colour()).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, message in {
        "a.txt": "expected a picture such as", "cut.png": "it is damaged", "empty.jpg": "expected a picture such as",
        "none.png": "no such file", ".": "it is a folder",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith("invalid image ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InputError, match="too large; expected at most 0 million pixels"):
        read(saved(tmp_path / "bomb.png", colour()))
