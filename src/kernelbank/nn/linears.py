"""Linear submodules that other tools know: hooked, parametrised, pruned, adapted and quantised ones are called, and
only plain ones hand their weights to the fused forms of the operator."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from kernelbank.spec.inventory import Tensor as Entry

LINEARS = ("q", "reduce", "key", "value", "predict", "out")
"""The linear layers of size 1. Their weights are (O, C), except for static kernels in several heads or larger than 1,
which are tensors and no layers."""


class TensorHolder(nn.Module):
    """Tensors under a common name that are no layer, such as a norm's or a table's. Calling it computes nothing and
    runs its hooks, which is how pruning and the old `weight_norm` update a tensor before every forward."""

    def forward(self) -> None:
        """Return nothing."""


def linear_names(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The names under which `entries` have an nn.Linear."""
    ranks = {entry.name: len(entry.shape) for entry in entries}
    return tuple(name for name in LINEARS if ranks.get(f"{name}.weight") == 2)


def is_plain(linear: nn.Module) -> bool:
    """Whether calling `linear` computes x W^T + b with its `weight` and `bias` and nothing else happens: an nn.Linear
    (no subclass) without hooks, parametrisation or a forward of its own, whose parameters are no tensor subclass."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    if linear._forward_pre_hooks or linear._forward_hooks or linear._backward_pre_hooks or linear._backward_hooks:
        return False
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias", linear)
    return type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)


_PLAIN = (nn.Parameter, Tensor)  # torch.func.functional_call puts tensors in the place of parameters


def called_modules(parent: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linears among `names` that must be called as modules: all of them while hooks for every module are
    registered, else those that are not plain."""
    modules = {name: _child(parent, name) for name in names}
    if _has_any_global_hook():
        return modules
    return {name: module for name, module in modules.items() if not is_plain(module)}


def named_tensors(parent: nn.Module, entries: Iterable[Entry], without: Container[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of `entries` as the modules of `parent` hold them now. Left out are the linears in `without`,
    and tensors that the module in the place of a linear does not have in that shape."""
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        home, _, leaf = entry.name.rpartition(".")
        if home in without:
            continue
        module = _child(parent, home) if home else parent
        if leaf == "weight" and type(module) is TensorHolder and module._forward_pre_hooks:
            module()
        tensor = _attribute(module, leaf)
        if _is_replaced(module, home) and not (isinstance(tensor, Tensor) and tensor.shape == entry.shape):
            continue
        assert isinstance(tensor, Tensor)
        tensors[entry.name] = tensor
    return tensors


def _child(parent: nn.Module, name: str) -> nn.Module:
    """``parent.get_submodule(name)`` for a name without dots. Every forward looks up every layer, so that this reads
    the dict of children first."""
    child = parent._modules.get(name)
    return parent.get_submodule(name) if child is None else child


def _attribute(module: nn.Module, name: str) -> object:
    """``getattr(module, name, None)``, without the detour through nn.Module.__getattr__ for a parameter of a class that
    is known to define no attribute of that name."""
    if type(module) in (nn.Linear, TensorHolder) and name not in module.__dict__:
        tensor = module._parameters.get(name)
        if tensor is not None:
            return tensor
    return getattr(module, name, None)


def _is_replaced(module: nn.Module, name: str) -> bool:
    """Whether a linear is of another class than a mixer gives it."""
    return name in LINEARS and type(module) not in (nn.Linear, TensorHolder)


def new_linear(weight: tuple[int, ...], bias: bool) -> nn.Linear:
    """An nn.Linear with a weight of this shape on the meta device: nothing is drawn."""
    return nn.Linear(weight[1], weight[0], bias, device=torch.device("meta"))
