"""`accelerate`: run the linear layers of any model in the form that is fastest on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.mixer import Tempered
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


TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AcceleratedLinear, Mlp: AcceleratedMlp}
"""The classes that are replaced. Subclasses are not, since they may compute something else."""


class Acceleration:
    """The handle that `accelerate` returns. ``remove()``, or the end of a ``with`` block, restores the modules."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._classes = [(module, type(module)) for module in modules]
        for module, kind in self._classes:
            module.__class__ = TWINS[kind]

    def __len__(self) -> int:
        """The number of modules that were replaced."""
        return len(self._classes)

    def remove(self) -> None:
        """Restore the class of every module."""
        for module, kind in self._classes:
            if type(module) is TWINS[kind]:
                module.__class__ = kind
        self._classes = []

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def accelerate(model: nn.Module) -> Acceleration:
    """Run the linear layers of a model in the form that is fastest on this machine, in place.

    Weights and names stay the same, and so do outputs up to rounding. Returns a handle, as torch's hooks do::

        handle = kernelbank.accelerate(model)       # until handle.remove()
        with kernelbank.accelerate(model): ...      # inside the block

    The linear layers of a Mixer or a DynamicConv2d stay as they are, since those choose the form themselves.

    Raises:
        InputError: If `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"invalid model of type {type(model).__name__}; expected a torch.nn.Module")
    return Acceleration(list(_replaceable(model)))


def _replaceable(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` to replace, without the linear layers of its mixers."""
    owned = {id(layer) for module in model.modules() if isinstance(module, Tempered) for layer in module.children()}
    return (module for module in model.modules() if type(module) in TWINS and id(module) not in owned)
