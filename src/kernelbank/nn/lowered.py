"""A model that computes in half precision: its tensors cast once, its input and output cast on the way."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from kernelbank.errors import InputError

Half = Literal["bfloat16", "float16"]
HALVES: dict[torch.dtype, Half] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def half_of(dtype: object) -> torch.dtype:
    """Return the dtype that `dtype` names. Raises: InputError: If it is neither float16 nor bfloat16."""
    for half, name in HALVES.items():
        if dtype in (half, name):
            return half
    raise InputError(f"invalid dtype={dtype!r}; expected {', '.join(repr(name) for name in HALVES.values())}")


class Lowered:
    """The tensors and hooks of a model that computes in `dtype`. `remove` restores the tensors themselves."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._restore: list[tuple[Tensor, Tensor]] = []
        for tensor in {id(t): t for t in _tensors(model)}.values():  # tied tensors once
            self._restore.append((tensor, tensor.data))
            tensor.data = tensor.data.to(dtype)
        # the children too, so that parts such as timm's forward_features take images
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(partial(_cast_input, dtype), with_kwargs=True)
            for module in (model, *model.children())
        ]
        self._hooks.append(model.register_forward_hook(_cast_output))

    @staticmethod
    def check(model: nn.Module) -> None:
        """Raise InputError unless `model` is in eval mode, on a CPU and in float32."""
        if model.training:
            raise InputError("invalid model in training mode; expected model.eval(), since a dtype is for inference")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.device.type != "cpu":
                raise InputError(f"invalid device {tensor.device} of {name}; expected the CPU, or model.to(dtype)")
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise InputError(f"invalid dtype {tensor.dtype} of {name}; expected torch.float32")

    def remove(self) -> None:
        """Restore every tensor, and remove the hooks."""
        for tensor, data in self._restore:
            tensor.data = data
        for hook in self._hooks:
            hook.remove()
        self._restore, self._hooks = [], []


def _tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers to cast. A norm with running statistics keeps its tensors: what is subtracted and
    divided by stays as wide as it is computed."""
    tensors = [
        tensor
        for module in model.modules()
        if "running_mean" not in module._buffers
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _cast_input(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with float32 tensors in `dtype`."""
    return tree_map(lambda value: _to(value, torch.float32, dtype), (args, kwargs))


def _cast_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The output with tensors in half precision in float32."""
    for half in HALVES:
        output = tree_map(lambda value, half=half: _to(value, half, torch.float32), output)
    return output


def _to(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return value.to(new) if isinstance(value, Tensor) and value.dtype == old else value
