"""Paths: implementations of a part of the operator, with the calls that they do not support or are preferred for.

Each file of this package declares its paths with their thresholds. `ops.paths` lists all of them in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.linear import Linear
from kernelbank.ops.machine import Machine
from kernelbank.spec import All, Project, Static, TwoStep
from kernelbank.spec.inventory import Grid, bank_size

Slot = Literal["mixer", "linear", "position"]
"""The part of the operator that a path runs: the mixer, its linear layers, or the positional operator
sum_j p_ij x_j."""
Reason = str | None
"""A sentence, or None."""
Positional = Callable[[Tensor, Tensor, Grid], Tensor]
"""(x (B, N, C), table (h, 2a-1, 2b-1), (H, W)) -> (B, N, C), H <= a and W <= b."""


class PathError(ValueError):
    """A forced path that does not support the call. The message states the reason and the paths that do."""


def _never(s: Context) -> bool:
    return False


@dataclass(frozen=True)
class MixerPath:
    """An implementation of the whole mixer, including its linear layers.

    `unsupported` returns the reason why the path does not support a call, or None. `preferred` returns the reason why
    it is preferred for a call, or None. `uses_position` returns whether it calls the positional operator.
    """

    name: str
    run: Callable[[Tensor, Params, Context], Tensor]
    unsupported: Callable[[Context, Call, Machine], Reason]
    preferred: Callable[[Context, Call, Machine], Reason]
    uses_position: Callable[[Context], bool] = _never


@dataclass(frozen=True)
class PositionPath:
    """An implementation of sum_j p_ij x_j (see `MixerPath`)."""

    name: str
    run: Positional
    unsupported: Callable[[Context, Call, Machine], Reason]
    preferred: Callable[[Context, Call, Machine], Reason]


@dataclass(frozen=True)
class LinearPath:
    """An implementation of linear layers, for any spec (see `MixerPath`)."""

    name: str
    run: Linear
    unsupported: Callable[[Call, Machine], Reason]
    preferred: Callable[[Call, Machine], Reason]


# ---- conditions that several paths share -----------------------------------------------------------------


def first(*reasons: Reason) -> Reason:
    """Return the first reason that is not None."""
    return next((reason for reason in reasons if reason is not None), None)


def supports_all(s: Context, call: Call, m: Machine) -> Reason:
    """Return None, for a path that supports every call."""
    return None


def never_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Return None, for a path that runs only if it is forced."""
    return None


def needs_two_step(s: Context) -> Reason:
    """Why a path for two_step kernels does not support the spec, or one that reads static kernels as tensors."""
    if not isinstance(s.spec.kernel, TwoStep):
        return f"it runs kernel two_step, not {s.spec.kernel}"
    return needs_static_tensors(s)


def needs_static_tensors(s: Context) -> Reason:
    """Why a path that reads static kernels as tensors does not support the context."""
    names = [name for name in ("key", "value") if name in s.modules]
    if not names or not isinstance(s.spec.bank, Static):
        return None
    return f"it reads the weights of {' and '.join(names)}, which must be called as modules"


def needs_one_step(s: Context) -> Reason:
    """Why a path for one-step kernels does not support the spec."""
    return "it runs one-step kernels, not two_step" if isinstance(s.spec.kernel, TwoStep) else None


def needs_every_kernel(s: Context) -> Reason:
    """Why a path on which every position sees every kernel does not support the context."""
    if s.mask is not None:
        return "an attn_mask hides kernels"
    return None if isinstance(s.geo.support, All) else f"support={s.geo.support} hides kernels"


def needs_no_dropout(s: Context) -> Reason:
    """Why a path without attention dropout does not support the context."""
    return "it has no attention dropout" if s.training and s.attn_drop else None


def kernel_count(s: Context) -> int:
    """Return n, the number of kernels that a position scores."""
    if isinstance(s.spec.mix, Project):
        return s.spec.mix.r
    return bank_size(s.spec, s.dim, s.geo.grid, s.geo.prefix)


def half_precision(call: Call) -> bool:
    """Whether the input is in half precision, or autocast is on."""
    return call.autocast or call.dtype in (torch.bfloat16, torch.float16)


def caches_expansions(call: Call) -> bool:
    """Whether expansions of a table are cached for the next call (`ops.expansion`)."""
    return call.device == "cpu" and not call.grad and not call.compiling and not call.transformed
