"""NaFlexVit of timm: images of any shape, or batches of patches with coordinates and padding (arXiv 2307.06304)."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.fx
from timm.layers import Attention, register_notrace_module
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.edit.stock.found import Found
from kernelbank.nn.edit.stock.read import Read, read_attention
from kernelbank.nn.edit.stock.seats import AttentionMixer
from kernelbank.nn.edit.stock.tokens import PLAIN, in_blocks
from kernelbank.spec import All, MixerSpec, NoPosition, Project, SpecError
from kernelbank.spec.inventory import Grid


class NaflexGrid:
    """The grid of the last images, or None after patches with coordinates, which have one each."""

    def __init__(self, embeds: nn.Module, grid: Grid) -> None:
        self.grid: Grid | None = grid
        embeds.register_forward_hook(self._note)

    def _note(self, embeds: nn.Module, inputs: object, outputs: tuple[Tensor, Grid | None]) -> None:
        size = outputs[1]
        self.grid = None if size is None else (size[0], size[1])

    def __call__(self, count: int) -> Grid:
        """Return (H, W) of `count` tokens; with coordinates, where no grid is common to all, (1, count)."""
        return (1, count) if self.grid is None else self.grid


class NaflexMixer(AttentionMixer):
    """A mixer in the place of the attention of NaFlexVit."""

    token_grid: NaflexGrid

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). Padded patches are hidden by `attn_mask`.

        Raises: SpecError: If the spec depends on the grid, and the patches came with coordinates.
        """
        if self.token_grid.grid is None and not is_free(self.spec):
            raise SpecError(f"invalid patches with coordinates for {self.spec}, which depends on a grid that images "
                            "share; expected images (B, C, H, W), or support=all without position")  # fmt: skip
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask > torch.finfo(attn_mask.dtype).min
        return super().forward(x, attn_mask, is_causal)


register_notrace_module(NaflexMixer)


def is_free(spec: MixerSpec) -> bool:
    """Whether what `spec` computes does not depend on where tokens are on a grid."""
    return (
        isinstance(spec.support, All) and isinstance(spec.position, NoPosition) and spec.size == 1
        and getattr(spec.bank, "stride", 1) == 1 and not isinstance(spec.mix, Project)
    )  # fmt: skip


def naflexvit(model: Any) -> Found:
    """NaFlexVit with timm's Attention in its blocks."""
    drop = model.patch_drop
    if isinstance(drop, nn.Module) and not isinstance(drop, nn.Identity):
        raise InputError("invalid patch_drop_rate: dropped patches have no place on the grid; expected 0")
    height, width = model.embeds.pos_embed_grid_size or (16, 16)
    prefix = model.num_prefix_tokens

    def read(attention: Any, name: str) -> Read:
        if type(attention) is not Attention:
            kind = type(attention).__name__
            raise InputError(f"{name}: invalid attention={kind}; expected timm's Attention, without rope")
        return read_attention(NaflexMixer, attention, name, PLAIN, (height, width), prefix=prefix)

    yield from in_blocks(model, read, cache(partial(NaflexGrid, model.embeds, (height, width))))
