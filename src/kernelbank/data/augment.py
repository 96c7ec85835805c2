"""Augmentation: what happens to a training image, as data. timm's transforms do it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Arguments of timm's `create_transform`, and `shift` for images in memory.

    Training: a crop of a `scale` share of the area with an aspect in `ratio`, a flip, RandAugment as timm writes it,
    random erasing. With `auto_augment` timm leaves colour jitter out. `shift` moves an image by up to so many pixels
    per axis, repeating its edge.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    auto_augment: str | None = None
    color_jitter: float | None = None
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    erase: float = 0.0
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    shift: int = 0
