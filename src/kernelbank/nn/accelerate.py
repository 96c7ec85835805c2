"""`accelerate`: the linears of any model by the fastest form of this machine, same weights, same outputs."""

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
    """nn.Linear by the path that the plan takes for linear layers: x W^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O)."""
        return planned_linear(x, self.weight, self.bias)


class AcceleratedMlp(Mlp):
    """timm's Mlp with the exact GELU in the epilogue of fc1, in inference and where nothing lies between them."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)."""
        if torch.is_grad_enabled() or not self._is_plain():
            return super().forward(x)  # type: ignore[no-untyped-call]
        x = planned_linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def _is_plain(self) -> bool:
        """Whether fc1 and the activation are what they seem, and nobody listens between them."""
        listened = any(m._forward_hooks or m._forward_pre_hooks for m in (self.fc1, self.act))
        exact = type(self.act) is nn.GELU and self.act.approximate == "none"
        return exact and type(self.fc1) is AcceleratedLinear and not listened


TWINS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AcceleratedLinear, Mlp: AcceleratedMlp}
"""Exactly these classes are taken: a subclass may compute something else."""


class Acceleration:
    """What `accelerate` did to a model: ``remove()``, or the end of a ``with`` block, undoes exactly that."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._taken = [(module, type(module)) for module in modules]
        for module, kind in self._taken:
            module.__class__ = TWINS[kind]

    def __len__(self) -> int:
        """How many modules run by another form."""
        return len(self._taken)

    def remove(self) -> None:
        """Give every module its own class back."""
        for module, kind in self._taken:
            if type(module) is TWINS[kind]:
                module.__class__ = kind
        self._taken = []

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def accelerate(model: nn.Module) -> Acceleration:
    """Run the linears of `model`, any model, by the fastest form of this machine, in place: same weights, same names,
    same outputs to rounding. Returns a handle as torch's hooks do::

        kernelbank.accelerate(model)                # for good, or until handle.remove()
        with kernelbank.accelerate(model): ...      # for a block

    The linear layers of a Mixer or a DynamicConv2d stay as they are: these choose the form by themselves. Raises
    InputError for what is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate takes a torch.nn.Module, got {type(model).__name__}")
    return Acceleration(list(_taken(model)))


def _taken(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` to be accelerated: all of these classes but the linear layers that a spec lists."""
    owned = {id(layer) for module in model.modules() if isinstance(module, Tempered) for layer in module.children()}
    return (module for module in model.modules() if type(module) in TWINS and id(module) not in owned)
