"""The grid that each module of a model sees, from a forward on the meta device, which computes shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kernelbank.errors import InputError
from kernelbank.spec.inventory import Grid

DEFAULT_SIZE = (3, 224, 224)


@dataclass(frozen=True)
class Shapes:
    """The shapes of what a module takes and of what it returns."""

    input: tuple[int, ...]
    output: tuple[int, ...]


def shapes(model: nn.Module, names: Iterable[str]) -> Mapping[str, Shapes]:
    """The shapes of each module among `names`, on one image of the size in the model's configuration
    (``pretrained_cfg``; 224 x 224 without one).

    Raises: InputError: If the forward fails or does not call one of them.
    """
    names, config = list(names), getattr(model, "pretrained_cfg", None) or {}
    found: dict[str, Shapes] = {}
    state = {name: torch.empty_like(tensor, device="meta")
             for name, tensor in (*model.named_parameters(), *model.named_buffers())}  # fmt: skip
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(_note(found, name)).remove)
        try:
            for module, _ in modes:
                module.training = False
            image = torch.empty(1, *config.get("input_size", DEFAULT_SIZE), device="meta", dtype=dtype)
            functional_call(model, state, (image,))
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise InputError(f"invalid model: the sizes of its feature maps cannot be computed ({error})") from None
        finally:
            for module, mode in modes:
                module.training = mode
    if missing := [name for name in names if name not in found]:
        raise InputError(f"invalid model: {missing[0]} is not called on an image; expected every block to be")
    return found


def _note(found: dict[str, Shapes], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = Shapes(tuple(inputs[0].shape), tuple(output.shape))

    return hook


def of_map(shape: tuple[int, ...]) -> Grid:
    """(H, W) of a map (B, C, H, W)."""
    return shape[2], shape[3]


def of_channels_last(shape: tuple[int, ...]) -> Grid:
    """(H, W) of a map (B, H, W, C)."""
    return shape[1], shape[2]
