"""The position axis: the relative table as a T x T matrix per head."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelbank.ops.context import Context, Params
from kernelbank.ops.expansion import expanded
from kernelbank.ops.geometry import Geometry, Offsets, cached, region_offsets, relative_offsets


def relative(p: Params, s: Context) -> Tensor | None:
    """p (h, T, T), p[h, i, j] the table's entry at offset i - j; arbitrary where i does not see j. None without a
    relative position."""
    return None if s.geo.sides is None else matrix(p, s.geo)


def spread(x_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """sum_j p_ij x_j over every j, (B, T, C): the context's positional operator on the grid, and one number per head
    for each side of the prefix."""
    P, table = s.geo.prefix, p["table.weight"]
    assert s.position is not None
    on_grid = s.position(x_BTC[:, P:], table, s.geo.grid)
    if not P:
        return on_grid
    h, (B, _, C) = table.shape[0], x_BTC.shape
    down, up, across = p["table.prefix"].to(x_BTC.dtype).repeat_interleave(C // h, 0).unbind(-1)
    prefix, grid = x_BTC[:, :P].sum(1, keepdim=True), x_BTC[:, P:].sum(1, keepdim=True)
    return torch.cat([(grid * down + prefix * across).expand(B, P, C), on_grid + prefix * up], 1)


def matrix(p: Params, geo: Geometry) -> Tensor:
    """The table as (h, T, T) on `geo`, whose grid may be a part of the one that the table covers."""
    tables = tuple(p[name] for name in ("table.weight", "table.prefix") if name in p)
    return expanded(tables, (geo.grid, geo.prefix, geo.steps), lambda: _matrix(p, geo))


def _matrix(p: Params, geo: Geometry) -> Tensor:
    offsets = cached(relative_offsets, _sides(p), geo.grid, geo.prefix, geo.device, None, geo.steps)
    return _entries(p, geo.prefix).index_select(1, offsets.flatten()).view(-1, geo.tokens, geo.tokens)


def matrix_rows(p: Params, geo: Geometry, head: int, queries: Tensor) -> Tensor:
    """Some rows of one head's matrix, (queries, T)."""
    offsets = relative_offsets(_sides(p), geo.grid, geo.prefix, geo.device, queries, geo.steps)
    return _entries(p, geo.prefix)[head][offsets]


def region_matrix(p: Params, offsets: Offsets, prefix: int, device: torch.device | None) -> Tensor:
    """The table between `prefix` tokens and the cells of a region, (h, P + n, P + n). `offsets` are those of its
    rows and columns from the first ones, in steps of the support."""
    tables = tuple(p[name] for name in ("table.weight", "table.prefix") if name in p)

    def compute() -> Tensor:
        index = cached(region_offsets, _sides(p), offsets, prefix, device)
        tokens = prefix + len(offsets[0]) * len(offsets[1])
        return _entries(p, prefix).index_select(1, index.flatten()).view(-1, tokens, tokens)

    return expanded(tables, ("region", offsets, prefix), compute)


def _sides(p: Params) -> tuple[int, int]:
    height, width = p["table.weight"].shape[1:]
    return height // 2 + 1, width // 2 + 1


def _entries(p: Params, prefix: int) -> Tensor:
    """(h, entries): the table flattened, then the three of the prefix."""
    entries = p["table.weight"].flatten(1)
    return torch.cat([entries, p["table.prefix"]], 1) if prefix else entries
