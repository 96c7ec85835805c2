"""The position axis, `rope`: queries and kernels rotated by their place on the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelbank.ops.context import Context
from kernelbank.ops.geometry import cached
from kernelbank.ops.precision import wide
from kernelbank.spec import Rope
from kernelbank.spec.inventory import Grid


def rotate(x_BTYd: Tensor, s: Context) -> Tensor:
    """R_i x_i for tokens in the order of the grid, prefix first, (B, T, ..., d); x itself without rope."""
    if not isinstance(s.spec.position, Rope):
        return x_BTYd
    x = x_BTYd.to(wide(x_BTYd.dtype))
    where = (s.spec.position, s.geo.grid, s.geo.prefix, x.shape[-1], x.dtype, s.geo.device)
    cos, sin = (t.view(x.shape[1], *(1,) * (x.ndim - 3), x.shape[-1]) for t in cached(turns, *where))
    return (x * cos + quarter(x, s.spec.position) * sin).to(x_BTYd.dtype)


def quarter(x: Tensor, rope: Rope) -> Tensor:
    """Each pair of channels (a, b) turned by 90 degrees, (-b, a)."""
    if rope.layout == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def turns(rope: Rope, grid: Grid, prefix: int, width: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """cos and sin of the angle of every token and channel, (2, T, d), computed in float64; no angle for the prefix."""
    frequencies = rope.theta ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = (places(rope, side) for side in grid)
    rows = y[:, None].expand(grid).flatten()
    columns = x[None].expand(grid).flatten()
    order = (rows, columns) if rope.axes == "yx" else (columns, rows)
    angles = torch.cat([at[:, None] * frequencies for at in order], 1)  # (N, d/2)
    angles = torch.cat([angles.new_zeros(prefix, width // 2), angles])
    angles = torch.cat([angles, angles], 1) if rope.layout == "half" else angles.repeat_interleave(2, 1)
    return torch.stack([angles.cos(), angles.sin()]).to(device, dtype)


def places(rope: Rope, side: int) -> Tensor:
    """The coordinates along one axis of `side` positions."""
    at = torch.arange(side, dtype=torch.float64)
    if rope.coordinates == "unit":
        return 2 * math.pi * (2 * (at + 0.5) / side - 1)
    return (at + rope.origin) * (1 if rope.side == "grid" else rope.side / side)
