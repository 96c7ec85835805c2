"""`accelerate`: run a model in the forms, and in the precision, that are fastest on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import TracebackType

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.lowered import HALVES, Half, Lowered, half_of
from kernelbank.nn.mixer import Tempered
from kernelbank.ops.machine import half_gain
from kernelbank.ops.plan import planned_linear


class AcceleratedLinear(nn.Linear):
    """nn.Linear, x W^T + b, on the path that the plan chooses for linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)."""
        return planned_linear(x, self.weight, self.bias)


class AcceleratedMlp(Mlp):
    """timm's Mlp with the exact GELU fused into fc1, in inference and if there is nothing between the two."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        if torch.is_grad_enabled() or not self._is_plain():
            return super().forward(x)  # type: ignore[no-untyped-call]
        x = planned_linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def _is_plain(self) -> bool:
        """Whether fc1 and the activation are those of timm and have no hooks."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (self.fc1, self.act))
        exact = type(self.act) is nn.GELU and self.act.approximate == "none"
        return exact and type(self.fc1) is AcceleratedLinear and not hooked


_log = logging.getLogger("kernelbank")

TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AcceleratedLinear, Mlp: AcceleratedMlp}
"""The classes that are replaced. Subclasses are not, since they may compute something else."""


class Acceleration:
    """The handle that `accelerate` returns. ``remove()``, or the end of a ``with`` block, restores the model.

    Attributes:
        dtype: The dtype that the model computes in, or None if that was left as it is.
        reason: Why the model runs in that dtype, with the measured gain; empty if no dtype was asked for.
    """

    def __init__(self, modules: list[nn.Module], lowered: Lowered | None = None, reason: str = "") -> None:
        self._classes = [(module, type(module)) for module in modules]
        self._lowered, self.reason = lowered, reason
        self.dtype = None if lowered is None else lowered.dtype
        for module, kind in self._classes:
            module.__class__ = TWINS[kind]

    def __len__(self) -> int:
        """The number of modules whose class was replaced."""
        return len(self._classes)

    def remove(self) -> None:
        """Restore the class of every module, and the tensors that were cast."""
        for module, kind in self._classes:
            if type(module) is TWINS[kind]:
                module.__class__ = kind
        self._classes = []
        if self._lowered is not None:
            self._lowered.remove()
        self._lowered = None

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def accelerate(model: nn.Module, dtype: Half | torch.dtype | None = None) -> Acceleration:
    """Run a model in the forms that are fastest on this machine, in place.

    The linear layers run in the form that the machine's probe found fastest, and timm's Mlp with its GELU fused in
    inference. Weights and names stay the same, and so do outputs up to rounding. The linear layers of a Mixer or a
    DynamicConv2d stay as they are, since those choose the form themselves. Returns a handle, as torch's hooks do::

        handle = kernelbank.accelerate(model)       # until handle.remove()
        with kernelbank.accelerate(model): ...      # inside the block

    With a `dtype`, a model in eval mode also computes in half precision, if the probe found that a linear layer is
    faster so on this machine; otherwise it stays as it is, and ``handle.reason`` and a warning in the log say so.
    Parameters and buffers are cast once, but for running statistics; the handle keeps the originals. Images are cast on
    the way in and outputs back on the way out, and statistics over kernels are computed in float32 as everywhere.

    Args:
        model: Any module.
        dtype: ``"bfloat16"``, ``"float16"`` or torch's dtype of that name, for inference on a CPU; None leaves the
            dtype as it is.

    Raises:
        InputError: If `model` is not a module, or `dtype` is another; with a `dtype`, if the model is in training mode,
            not on a CPU, or not in float32.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"invalid model of type {type(model).__name__}; expected a torch.nn.Module")
    if dtype is None:
        return Acceleration(list(_replaceable(model)))
    half = half_of(dtype)
    Lowered.check(model)
    gain, name = half_gain(half), HALVES[half]
    if gain <= 1:
        reason = f"float32: a linear layer in {name} runs at {gain:.2f} times the speed of the fastest in float32"
        _log.warning("the model stays in %s", reason)
        return Acceleration(list(_replaceable(model)), reason=reason)
    reason = f"{name}: a linear layer runs at {gain:.2f} times the speed of the fastest in float32"
    return Acceleration(list(_replaceable(model)), Lowered(model, half), reason)


def _replaceable(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` to replace, without the linear layers of its mixers."""
    owned = {id(layer) for module in model.modules() if isinstance(module, Tempered) for layer in module.children()}
    return (module for module in model.modules() if type(module) in TWINS and id(module) not in owned)
