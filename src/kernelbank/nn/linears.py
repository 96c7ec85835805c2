"""The linear layers of a mixer as nn.Linear submodules. A layer that is hooked, parametrised, pruned, adapted or
quantised is called; only the weights of plain layers go to the fused forms of the operator."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from kernelbank.spec.inventory import Tensor as Entry

LINEARS = ("q", "reduce", "key", "value", "predict", "out")
"""The linear layers of a mixer. Their weights are (O, C). Static kernels in several heads, or of a size above 1, are
tensors and not layers."""


class TensorHolder(nn.Module):
    """Tensors under a common name that are not a layer, such as those of a norm or a table. Calling it computes nothing
    and runs its hooks, with which pruning and the old `weight_norm` update a tensor before every forward."""

    def forward(self) -> None:
        """Return nothing."""


def linear_names(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The names under which `entries` have an nn.Linear."""
    ranks = {entry.name: len(entry.shape) for entry in entries}
    return tuple(name for name in LINEARS if ranks.get(f"{name}.weight") == 2)


def is_plain(linear: nn.Module) -> bool:
    """Whether calling `linear` computes x W^T + b with its `weight` and `bias` and nothing else: it is an nn.Linear
    (not a subclass) without hooks, parametrisation or a forward of its own, and its parameters are plain tensors."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    if linear._forward_pre_hooks or linear._forward_hooks or linear._backward_pre_hooks or linear._backward_hooks:
        return False
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias", linear)
    return type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)


_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
# torch.func.functional_call puts tensors in the place of parameters, torch.export's tracing the last two


def called_modules(parent: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers among `names` that must be called as modules: all of them while global module hooks are
    registered, else those that are not plain."""
    modules = {name: _child(parent, name) for name in names}
    if _has_any_global_hook():
        return modules
    return {name: module for name, module in modules.items() if not is_plain(module)}


def named_tensors(parent: nn.Module, entries: Iterable[Entry], without: Container[str] = ()) -> dict[str, Tensor]:
    """Return the current tensors of `entries` from the modules of `parent`, without the layers in `without`, and
    without tensors that a module in place of a linear layer does not have in that shape."""
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
    """Whether a linear layer was replaced by a module of another class."""
    return name in LINEARS and type(module) not in (nn.Linear, TensorHolder)


def new_linear(weight: tuple[int, ...], bias: bool) -> nn.Linear:
    """An nn.Linear with a weight of this shape on the meta device, not initialised."""
    return nn.Linear(weight[1], weight[0], bias, device=torch.device("meta"))
