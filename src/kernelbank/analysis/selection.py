"""Kernel selection without torch: which kernels a position sees, and how many. Shared by cost, text and figure.

On the grid every support is a product over its two axes, so that each count is a product of two counts on a
line. `pad` of a window (the padding of published checkpoints) is no part of what is counted here.
"""

from __future__ import annotations

import math

from kernelbank.inventory import Grid
from kernelbank.spec import All, Neighborhood, Own, SpecError, Support, Window

Line = tuple[int, int]
"""On one axis of the grid: a query's and a key's coordinate, or the fewest and the most."""


def sees(support: Support, grid: Grid, query: Grid, key: Grid) -> bool:
    """Whether the grid position `query` (y, x) sees the kernel generated at `key`."""
    return all(_sees(support, *axis) for axis in zip(grid, query, key, strict=True))


def visible_pairs(support: Support, grid: Grid, prefix: int = 0, stride: int = 1) -> int:
    """sum_i n_i over all positions and prefix tokens. Prefix tokens see all and are seen by all, except under
    `self`; with a stride the kernels are the cells of the pooled grid."""
    positions = math.prod(grid)
    if isinstance(support, Own):
        return positions + prefix
    if stride > 1:
        cells = math.ceil(grid[0] / stride) * math.ceil(grid[1] / stride)
        return (prefix + positions) * (prefix + cells)
    return prefix * (prefix + 2 * positions) + math.prod(_pairs(support, length) for length in grid)


def visible_range(support: Support, grid: Grid, prefix: int = 0) -> Line:
    """The fewest and the most kernels that a grid position sees."""
    if isinstance(support, Own):
        return 1, 1
    (low_y, high_y), (low_x, high_x) = (_range(support, length) for length in grid)
    return prefix + low_y * low_x, prefix + high_y * high_x


def selections(support: Support, grid: Grid, prefix: int = 0) -> int:
    """How many different sets V_i there are: the kernels that `mean` and `pool` make of one image."""
    on_grid = math.prod(_selections(support, length) for length in grid)
    if isinstance(support, Own):
        return on_grid + prefix
    return on_grid + (prefix > 0 and on_grid > 1)


# ---- one axis --------------------------------------------------------------------------------------------


def resolved(support: Window) -> int:
    """The shift of a window. Raises SpecError where it still alternates."""
    if isinstance(support.shift, int):
        return support.shift
    raise SpecError(f"support={support} names no block yet: spec.at_block(i) resolves the shift of block i")


def _region(support: Window, length: int, position: int) -> int:
    shift = resolved(support) if length > support.M else 0
    return (position - shift) // min(support.M, length)


def _start(support: Neighborhood, length: int, position: int) -> int:
    return min(max(position - support.M // 2, 0), max(length - support.M, 0))


def _sees(support: Support, length: int, query: int, key: int) -> bool:
    match support:
        case All():
            return True
        case Own():
            return query == key
        case Window():
            return _region(support, length, query) == _region(support, length, key)
        case Neighborhood(M=M):
            return 0 <= key - _start(support, length, query) < M


def _regions(support: Window, length: int) -> list[int]:
    """The sizes of the regions floor((y - shift) / M)."""
    shift = resolved(support)
    if length <= support.M:
        return [length]
    whole, rest = divmod(length - shift, support.M)
    return [size for size in (shift, *[support.M] * whole, rest) if size]


def _pairs(support: Support, length: int) -> int:
    match support:
        case All():
            return length * length
        case Own():
            return length
        case Window():
            return sum(size * size for size in _regions(support, length))
        case Neighborhood(M=M):
            return length * min(M, length)


def _range(support: Support, length: int) -> Line:
    match support:
        case All():
            return length, length
        case Own():
            return 1, 1
        case Window():
            sizes = _regions(support, length)
            return min(sizes), max(sizes)
        case Neighborhood(M=M):
            return min(M, length), min(M, length)


def _selections(support: Support, length: int) -> int:
    match support:
        case All():
            return 1
        case Own():
            return length
        case Window():
            return len(_regions(support, length))
        case Neighborhood(M=M):
            return length - min(M, length) + 1
