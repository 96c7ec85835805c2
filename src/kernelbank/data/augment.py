"""Augmentation: what happens to a training image, as data. timm's transforms do it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Arguments of timm's `create_transform` in training, and `shift` for images in memory."""

    scale: tuple[float, float] = (1.0, 1.0)
    """The share of the image's area that a crop takes, least and most."""
    ratio: tuple[float, float] = (1.0, 1.0)
    """The aspect of a crop, least and most."""
    flip: float = 0.0
    """How often an image is flipped left to right."""
    auto_augment: str | None = None
    """RandAugment or another policy, as timm writes it."""
    color_jitter: float | None = None
    """Colour jitter; timm leaves it out beside auto_augment."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Of crops."""
    erase: float = 0.0
    """How often a rectangle is erased."""
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    """Filled with noise by pixel, with one random colour, or with zero."""
    shift: int = 0
    """Images in memory: moved by up to so many pixels per axis, the edge repeated."""
