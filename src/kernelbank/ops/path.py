"""What a path is: a way to run one part of the operator, what it cannot serve, and where it is the one to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kernelbank.ops.context import Setting
from kernelbank.ops.machine import Machine

Slot = Literal["mixer", "linear", "position"]
"""The part a path runs: the mixer between and with its static convs, the static convs, or the positional operator
sum_j p_ij x_j."""


class PathError(ValueError):
    """A forced path that cannot serve the record; the message says why and names the paths that can."""


@dataclass(frozen=True)
class Call:
    """What an input adds to a setting: how many `tokens` in all images, where and in which dtype they lie, whether
    gradients are wanted, whether autocast or a compiler is on."""

    tokens: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    grad: bool = False
    autocast: bool = False
    compiling: bool = False


Refusal = Callable[[Setting, Call, Machine], str | None]
"""Why a path cannot serve, or None."""

Fit = Callable[[Setting, Call, Machine], str | None]
"""Why a path is the one to take, or None."""


@dataclass(frozen=True)
class Path:
    """`run` does the work; its signature is the slot's. `spreads` says whether a mixer path calls the positional
    operator for a setting."""

    slot: Slot
    run: Callable[..., Any]
    refuses: Refusal
    fits: Fit
    spreads: Callable[[Setting], bool] = lambda s: False


def first(*reasons: str | None) -> str | None:
    """The first reason there is."""
    return next((reason for reason in reasons if reason is not None), None)
