"""`Recipe`: the settings of a training run. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from kernelbank.data.augment import Augmentation
from kernelbank.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Recipe(Augmentation):
    """The optimiser, its schedule, regularisation and augmentation of a training run.

    The rate rises linearly from `warmup_lr` over `warmup_epochs` and follows a cosine to `min_lr`. No weight decay on
    1-D parameters, biases and what the model's `no_weight_decay` names. Raises InputError, naming the field, for a
    value that cannot be used.
    """

    epochs: int
    """The number of passes over the training images."""
    batch_size: int
    """The number of images per update, over all processes."""
    lr: float
    """The peak learning rate for lr_batch images."""
    weight_decay: float
    """The weight decay of matrices and kernels."""
    lr_batch: int = 512
    """The batch size that lr refers to."""
    lr_rule: Literal["linear", "linear_all", "fixed"] = "linear"
    """The rates that are multiplied by batch_size / lr_batch. linear: lr. linear_all: also warmup_lr and min_lr. fixed:
    none."""
    schedule: Literal["step", "epoch", "late", "mixed"] = "step"
    """When the rate changes. step: every update. epoch: every epoch. late: every epoch, to the value of the previous
    one (DeiT's script). mixed: every update in the warm-up, every epoch after it (MMClassification)."""
    warmup_epochs: int = 0
    """The number of epochs of the linear warm-up."""
    warmup_lr: float = 0.0
    """The rate at the start of the warm-up."""
    warmup_prefix: bool = True
    """Whether the cosine starts after the warm-up. Else it spans all epochs, and the warm-up replaces its start."""
    min_lr: float = 0.0
    """The rate at the end of the cosine."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """The optimiser, from timm. sgd has Nesterov momentum, which is the first of betas."""
    betas: tuple[float, float] = (0.9, 0.999)
    """The betas of AdamW."""
    eps: float = 1e-8
    """The epsilon of AdamW."""
    layer_decay: float | None = None
    """The factor of the rate for each layer between a parameter and the head."""
    clip_grad: float | None = None
    """The largest norm of the gradient."""
    drop_last: bool = True
    """Whether to drop the last images of an epoch if they do not fill a batch."""
    drop_path: float = 0.0
    """The rate of drop path in the last block. It rises linearly from 0 in the first."""
    label_smoothing: float = 0.0
    """The label smoothing: the part of the target that is distributed over all classes."""
    mixup: float = 0.0
    """The alpha of Mixup."""
    cutmix: float = 0.0
    """The alpha of CutMix."""
    mixup_prob: float = 1.0
    """The probability that a batch is mixed."""
    mixup_switch_prob: float = 0.5
    """The probability of CutMix if both are used."""
    ema: float | None = None
    """The decay of the averaged weights."""
    repeats: int = 1
    """Repeated augmentation: the number of differently augmented copies of each image. An epoch keeps its length."""
    crop_pct: float = 0.875
    """The centre crop in evaluation: the shorter side is scaled to img_size / crop_pct."""
    temperature: float = 30.0
    """The initial temperature of mixers that predict coefficients by softmax. It decreases to that of the spec."""
    temperature_epochs: int = 10
    """The number of epochs in which the temperature decreases linearly, epoch by epoch; 0 keeps that of the spec."""

    def __post_init__(self) -> None:
        for name, (accepts, expected) in _CONDITIONS.items():
            value = getattr(self, name)
            if not accepts(value):
                raise InputError(f"recipe: invalid {name}={value!r}; expected {expected}")
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"recipe: invalid warmup_epochs={self.warmup_epochs}; expected less than epochs={self.epochs}"
            )
        if self.mixes and (self.batch_size % 2 or not self.drop_last):
            raise InputError(
                f"recipe: invalid batch_size={self.batch_size}, drop_last={self.drop_last} with Mixup or CutMix; "
                "expected an even batch_size with drop_last=True, since images are mixed in pairs"
            )

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is used."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def augmentation(self) -> Augmentation:
        """The fields of the recipe that the data use."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation)})

    @property
    def rates(self) -> Rates:
        """The learning rates for `batch_size`."""
        factor = 1.0 if self.lr_rule == "fixed" else self.batch_size / self.lr_batch
        ends = factor if self.lr_rule == "linear_all" else 1.0
        return Rates(self.lr * factor, self.warmup_lr * ends, self.min_lr * ends)

    def temperature_at(self, epoch: int, final: float) -> float | None:
        """The temperature of `epoch`, counted from 0, on the way to `final`; None from `temperature_epochs` on."""
        if epoch >= self.temperature_epochs:
            return None
        return self.temperature + (final - self.temperature) * epoch / self.temperature_epochs

    def schedule_at(self, epoch: int, step: int, steps: int) -> int:
        """Return the argument of the schedule, in updates, at `step` of the `steps` of `epoch`, both from 0."""
        match self.schedule:
            case "late":
                return max(epoch - 1, 0) * steps
            case "epoch":
                return epoch * steps
            case "mixed" if epoch >= self.warmup_epochs:
                return epoch * steps
            case _:
                return epoch * steps + step


def stated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe in a run record that are not at their default."""
    defaults = {f.name: json.loads(json.dumps(f.default)) for f in fields(Recipe) if f.default is not MISSING}
    return {name: value for name, value in recipe.items() if name not in defaults or value != defaults[name]}


@dataclass(frozen=True)
class Rates:
    """The learning rate at the top of the schedule, at the start of the warm-up and at the end."""

    top: float
    warmup: float
    end: float


Condition = tuple[Callable[[Any], bool], str]
"""Whether a value is valid, and what is expected, in words."""


def _whole(minimum: int) -> Condition:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= minimum, f"a whole number >= {minimum}"


def _number(accepts: Callable[[float], bool], expected: str) -> Condition:
    return (
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and accepts(v),
        expected,
    )


def _one_of(*values: str) -> Condition:
    return lambda v: v in values, ", ".join(values)


def _or_none(inner: Condition) -> Condition:
    return lambda v: v is None or inner[0](v), f"None, or {inner[1]}"


def _range(inner: Condition) -> Condition:
    return lambda v: len(v) == 2 and all(map(inner[0], v)) and v[0] <= v[1], f"two numbers in order, each {inner[1]}"


LARGEST = 1e9
"""The largest number in a recipe. Beyond it float32 overflows in the first updates."""
_POSITIVE = _number(lambda v: 0 < v <= LARGEST, f"a number > 0, at most {LARGEST:g}")
_NOT_NEGATIVE = _number(lambda v: 0 <= v <= LARGEST, f"a number from 0 to {LARGEST:g}")
_BELOW_ONE = _number(lambda v: 0 <= v < 1, "a number from 0 to below 1")
_SHARE = _number(lambda v: 0 <= v <= 1, "a number from 0 to 1")
_WHOLE_SHARE = _number(lambda v: 0 < v <= 1, "a number above 0, at most 1")
_CONDITIONS: dict[str, Condition] = {
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "lr": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "lr_batch": _whole(1),
    "lr_rule": _one_of("linear", "linear_all", "fixed"),
    "schedule": _one_of("step", "epoch", "late", "mixed"),
    "warmup_epochs": _whole(0),
    "warmup_lr": _NOT_NEGATIVE,
    "min_lr": _NOT_NEGATIVE,
    "optimiser": _one_of("adamw", "sgd"),
    "betas": (lambda v: len(v) == 2 and all(map(_BELOW_ONE[0], v)), f"two numbers, each {_BELOW_ONE[1]}"),
    "eps": _POSITIVE,
    "layer_decay": _or_none(_WHOLE_SHARE),
    "clip_grad": _or_none(_POSITIVE),
    "drop_path": _BELOW_ONE,
    "label_smoothing": _BELOW_ONE,
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "mixup_prob": _SHARE,
    "mixup_switch_prob": _SHARE,
    "ema": _or_none(_BELOW_ONE),
    "repeats": _whole(1),
    "temperature": _POSITIVE,
    "temperature_epochs": _whole(0),
    "scale": _range(_WHOLE_SHARE),
    "ratio": _range(_POSITIVE),
    "flip": _SHARE,
    "color_jitter": _or_none(_NOT_NEGATIVE),
    "interpolation": _one_of("bicubic", "bilinear", "random"),
    "erase": _SHARE,
    "erase_mode": _one_of("pixel", "rand", "const"),
    "crop_pct": _WHOLE_SHARE,
    "shift": _whole(0),
}
