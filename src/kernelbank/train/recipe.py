"""Recipe: how a model is trained, as a frozen record; each published recipe is a function with its source.
Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from kernelbank.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW with a cosine schedule after a linear warm-up, both by optimiser step; no weight decay on 1-D
    parameters, biases, position embeddings, tables and tokens.

    `drop_path` is the rate of the last block, rising linearly from 0; `clip_grad` the largest gradient norm or
    None; `shift` moves each training image by up to so many pixels per axis, repeating its edge.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    clip_grad: float | None = None
    shift: int = 0
    optimiser: Literal["adamw"] = "adamw"

    def __post_init__(self) -> None:
        for name, (accepts, legal) in _LEGAL.items():
            value = getattr(self, name)
            if not accepts(value):
                raise InputError(f"recipe: {name}={value!r} is not legal; legal: {legal}")
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"recipe: warmup_epochs={self.warmup_epochs} is not legal; legal: less than epochs={self.epochs}"
            )


def _whole(minimum: int) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= minimum, f"a whole number >= {minimum}"


def _number(accepts: Callable[[float], bool], legal: str) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and accepts(v), legal


def _only(value: str) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v == value, value


_POSITIVE = _number(lambda v: v > 0, "a finite number > 0")
_FRACTION = _number(lambda v: 0 <= v < 1, "a number from 0 to below 1")
_LEGAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "lr": _POSITIVE,
    "weight_decay": _number(lambda v: v >= 0, "a finite number >= 0"),
    "warmup_epochs": _whole(0),
    "label_smoothing": _FRACTION,
    "drop_path": _FRACTION,
    "clip_grad": (lambda v: v is None or _POSITIVE[0](v), f"None, or {_POSITIVE[1]}"),
    "shift": _whole(0),
    "optimiser": _only("adamw"),
}


DIGITS_EPOCHS = 12


def digits_recipe(epochs: int = DIGITS_EPOCHS) -> Recipe:
    """The studies' recipe on scikit-learn's digits.

    Source: ours; DeiT's optimiser (AdamW, weight decay 0.05, cosine), a larger rate and smaller batches for
    1,077 images. Made for a few seconds on one thread; the records of a study hold what it reaches, where, and
    in what time.
    """
    return Recipe(epochs=epochs, batch_size=48, lr=4e-3, weight_decay=0.05, warmup_epochs=min(2, epochs - 1),
                  clip_grad=1.0)  # fmt: skip
