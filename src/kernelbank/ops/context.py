"""What every function of the operator is told: the record, where it runs, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelbank.ops.geometry import Geometry
from kernelbank.ops.linear import Linear, plain
from kernelbank.ops.toeplitz import Positional, dense
from kernelbank.spec import Dynamic, Grouped, MixerSpec, Own, Project, SpecError, Window
from kernelbank.spec.inventory import Grid, groups, heads

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """The record `spec` at `dim` channels and `num_heads` heads on `geo`.

    `linear` runs the static convs, `position` the positional operator where a path has no N x N map for it.
    `temperature` replaces the tau of a predict record in training; `attn_drop` drops entries of the attention map
    in training; `mask` (B or 1, 1, T, T), True where a query may see a kernel, narrows what the record sees.
    """

    spec: MixerSpec
    dim: int
    num_heads: int
    geo: Geometry
    training: bool = False
    temperature: float | None = None
    attn_drop: float = 0.0
    mask: Tensor | None = None
    linear: Linear = plain
    position: Positional = dense

    @property
    def heads(self) -> int:
        """h of a two_step kernel, else num_heads."""
        return heads(self.spec, self.dim, self.num_heads)

    @property
    def groups(self) -> int:
        """The groups of a one-step kernel."""
        return groups(self.spec, self.dim, self.num_heads)

    @property
    def shared(self) -> int:
        """R: how many weights a generated one-step kernel has a tap, one a channel or one a group."""
        return self.groups if isinstance(self.spec.kernel, Grouped) else self.dim

    @property
    def visible(self) -> Tensor | None:
        """V (B or 1, 1, T, n) under the record and the mask; None when every position sees every kernel."""
        seen = None if self.geo.visible is None else self.geo.visible[None, None]
        if self.mask is None:
            return seen
        return self.mask if seen is None else seen & self.mask


def check_input(x: Tensor, spec: MixerSpec, grid: Grid, prefix: int) -> None:
    """Raises SpecError unless x is (B, T, C) with T = prefix + H * W and the record is resolved for a block."""
    if x.ndim != 3 or x.shape[1] != prefix + grid[0] * grid[1]:
        raise SpecError(
            f"x has shape {tuple(x.shape)}; legal: (B, T, C) with T = {prefix} prefix tokens + {grid[0]} x {grid[1]} "
            f"positions = {prefix + grid[0] * grid[1]}"
        )
    spec.check_resolved()


def check_mask(mask: Tensor, x: Tensor, spec: MixerSpec) -> Tensor:
    """The mask as (B or 1, 1, T, T). Raises SpecError for a mask that the record cannot honour, by name."""
    B, T, _ = x.shape
    if not isinstance(spec.bank, Dynamic) or spec.bank.stride > 1 or isinstance(spec.mix, Project):
        raise SpecError(f"attn_mask: {spec} cannot honour a mask, its kernels belong to no single position")
    if isinstance(spec.support, Own) or (isinstance(spec.support, Window) and spec.support.pad != "masked"):
        raise SpecError(f"attn_mask: support={spec.support} cannot be narrowed by a mask")
    if mask.dtype != torch.bool:
        raise SpecError(f"attn_mask: dtype {mask.dtype} is not legal; legal: bool, True where a query sees a kernel")
    shaped = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    if shaped.ndim != 4 or shaped.shape[0] not in (1, B) or shaped.shape[1:] != (1, T, T):
        raise SpecError(
            f"attn_mask: shape {tuple(mask.shape)} is not legal; legal: ({T}, {T}), ({B}, {T}, {T}) or "
            f"({B}, 1, {T}, {T}); a mask a head is not honoured"
        )
    return shaped
