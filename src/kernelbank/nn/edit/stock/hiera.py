"""Hiera (arXiv 2306.00989): attention in mask units, then over all tokens. Its tokens are in the order in which it
pools them; a mixer takes them in the order of the grid."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor

from kernelbank.nn.edit.stock.found import BlockAttention, Found, LeftAttention
from kernelbank.nn.edit.stock.read import read_attention
from kernelbank.nn.edit.stock.seats import Inputs, SeatedMixer
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec

PLAIN = MixerSpec.parse("vit")


class ReorderedMixer(SeatedMixer):
    """A mixer whose tokens come in another order than that of the grid: token `order[i]` is at position i."""

    order: Tensor
    back: Tensor

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, T, C) -> (B, T, C)."""
        return Mixer.forward(self, *self.inputs(x))[:, self.back]

    def inputs(self, x: Tensor) -> Inputs:
        return x[:, self.order], self.grid, None


register_notrace_module(ReorderedMixer)


def hiera(model: Any) -> Found:
    """Hiera: windows of the size of a mask unit where the stage has them, all tokens elsewhere. The first block of a
    stage, whose queries are pooled, stays."""
    stage, index = 0, -1
    for number, block in enumerate(model.blocks):
        attention, name = block.attn, f"blocks.{number}.attn"
        if number - 1 in model.stage_ends:
            stage, index = stage + 1, -1
        index += 1
        if isinstance(attention, ReorderedMixer):
            place = _placer(block, attention.order)
            yield BlockAttention(name, stage, index, attention.stage_spec, attention, place)
        elif attention.q_stride > 1 or attention.dim != attention.dim_out:
            yield LeftAttention(name, "pools its queries, or changes the number of channels")
        else:
            order, grid = _order(model, number)
            side = int(attention.window_size**0.5)
            windows = attention.use_mask_unit_attn and max(grid) > side
            spec = PLAIN.override(support=f"window({side})" if windows else "all")
            attention.num_heads = attention.heads
            found = read_attention(ReorderedMixer, attention, name, spec, grid)
            yield BlockAttention(
                name, stage, index, found.mixer.spec, found.mixer, _placer(block, order), found.lacking
            )


def _order(model: Any, number: int) -> tuple[Tensor, tuple[int, int]]:
    """The place among the tokens of every position of the grid at block `number`, and the grid."""
    _, size = model.reroll.schedule[number]
    count = size[0] * size[1]
    places = model.reroll(torch.arange(count, dtype=torch.float64)[None, :, None], number)
    return places.flatten().long(), (size[0], size[1])


def _placer(block: Any, order: Tensor) -> Any:
    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        assert isinstance(mixer, ReorderedMixer)
        device = next(block.parameters()).device
        mixer.stage_spec = stage_spec
        mixer.register_buffer("order", order.to(device), persistent=False)
        mixer.register_buffer("back", order.argsort().to(device), persistent=False)
        block.attn = mixer

    return place
