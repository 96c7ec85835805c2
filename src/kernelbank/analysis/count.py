"""The multiply-adds of any model: in closed form where its mixers are specs, counted by torch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernelbank.analysis.cost import cost, model_cost
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec, TimmTrunk
from kernelbank.nn.edit.stock import block_attentions
from kernelbank.ops.plan import use_path


def multiply_adds(model: nn.Module, spec: ModelSpec, image: tuple[int, int]) -> int:
    """The multiply-adds of `model` on one image of (H, W) pixels, all products counted.

    Our backbones follow `model_cost`. In a stock ViT or Swin of timm the attention follows the closed form of its spec,
    and torch counts the rest; in any other model torch counts everything, with attention run as plain products.
    """
    if not isinstance(spec.trunk, TimmTrunk):
        return model_cost(spec.at_size(image)).macs
    try:
        attentions = list(block_attentions(model))
    except InputError:
        return _count(model, spec.in_chans, image)
    total = sum(
        cost(mixer.spec, mixer.dim, mixer.num_heads, mixer.grid, mixer.prefix).macs
        for mixer in (attention.mixer for attention in attentions)
    )  # fmt: skip
    with _without([model.get_submodule(attention.name) for attention in attentions]):
        return total + _count(model, spec.in_chans, image)


def _count(model: nn.Module, in_chans: int, image: tuple[int, int]) -> int:
    first = next(model.parameters())
    images = torch.zeros(1, in_chans, *image, dtype=first.dtype, device=first.device)
    was_training = model.training
    with (
        torch.no_grad(), use_path("linear"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter
    ):  # fmt: skip
        model.eval()(images)
    model.train(was_training)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _without(modules: list[nn.Module]) -> Iterator[None]:
    """Let `modules` return their input while the context is open."""

    def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    for module in modules:
        module.forward = same
    try:
        yield
    finally:
        for module in modules:
            del module.forward
