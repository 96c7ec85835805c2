"""The options of the augmentation of training images, which timm's transforms carry out. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Arguments of timm's `create_transform` in training, and `shift` for images in memory."""

    scale: tuple[float, float] = (1.0, 1.0)
    """The range of the area of a crop, as a fraction of the area of the image."""
    ratio: tuple[float, float] = (1.0, 1.0)
    """The range of the aspect ratio of a crop."""
    flip: float = 0.0
    """The probability of a horizontal flip."""
    auto_augment: str | None = None
    """RandAugment or another policy, in timm's notation."""
    color_jitter: float | None = None
    """The strength of colour jitter. timm does not apply it together with auto_augment."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Of crops."""
    erase: float = 0.0
    """The probability that a rectangle is erased."""
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    """The fill of the rectangle: noise per pixel, one random colour, or zero."""
    shift: int = 0
    """The largest shift of images in memory, in pixels per axis. The edge is repeated."""
