"""The support axis: which kernels a position sees, and how many. Imports no torch.

On the grid every support is the product of its two axes. The operator's visibility, the cost, the text and the figure
are therefore all built on one function of one axis, `seen`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from kernelbank.spec.axes import All, Dilated, Neighborhood, Own, Window
from kernelbank.spec.inventory import Grid
from kernelbank.spec.mixer_spec import Support

Coordinates = tuple[int, ...]
"""Coordinates of one axis in ascending order. They need not be neighbours."""


def seen(support: Support, length: int) -> tuple[Coordinates, ...]:
    """Return the coordinates that each coordinate of an axis sees.

    A window's regions are floor((y - shift)/M), with M = min(M, length) and shift 0 where length <= M. With
    ``pad=timm`` the axis has been rolled and padded before, and its last window is cut at length - shift, as in timm.

    Raises: SpecError: If the shift of the windows depends on the block.
    """
    match support:
        case All():
            return (tuple(range(length)),) * length
        case Own():
            return tuple((at,) for at in range(length))
        case Neighborhood(M=M):
            side = min(M, length)
            starts = (max(0, min(at - side // 2, length - side)) for at in range(length))
            return tuple(tuple(range(start, start + side)) for start in starts)
        case Dilated():
            step = step_of(support, length)
            return tuple(tuple(range(at % step, length, step)) for at in range(length))
        case Window(M=M):
            shift = support.resolved_shift if length > M else 0
            side = min(M, length)
            rolled = support.pad == "timm"
            cuts = {0, length, *range(0 if rolled else shift, length, side)} | ({length - shift} if rolled else set())
            regions = [tuple(range(start, stop)) for start, stop in pairwise(sorted(cuts))]
            return tuple(region for region in regions for _ in region)


def step_of(support: Support, length: int) -> int:
    """Return the distance of neighbouring kernels along an axis, which is 1 but for a dilated support. It is the unit
    in which a relative table counts offsets."""
    return -(-length // min(support.M, length)) if isinstance(support, Dilated) else 1


def sees(support: Support, grid: Grid, query: Grid, key: Grid) -> bool:
    """Whether the grid position `query` (y, x) sees the kernel generated at `key`."""
    return all(k in _counted(support, length)[q] for length, q, k in zip(grid, query, key, strict=True))


def visible_pairs(support: Support, grid: Grid, prefix: int = 0, stride: int = 1) -> int:
    """Return the sum of n_i, the kernels seen, over all positions and prefix tokens. Prefix tokens see all and are
    seen by all, except with support `self`; with a stride the kernels are the cells of the pooled grid."""
    positions = math.prod(grid)
    if isinstance(support, Own):
        return positions + prefix
    if stride > 1:
        cells = math.ceil(grid[0] / stride) * math.ceil(grid[1] / stride)
        return (prefix + positions) * (prefix + cells)
    on_grid = math.prod(sum(map(len, _counted(support, length))) for length in grid)
    return prefix * (prefix + 2 * positions) + on_grid


def visible_range(support: Support, grid: Grid, prefix: int = 0) -> tuple[int, int]:
    """Return the fewest and the most kernels that a grid position sees."""
    sizes = [[len(region) for region in _counted(support, length)] for length in grid]
    prefix = 0 if isinstance(support, Own) else prefix
    return prefix + math.prod(map(min, sizes)), prefix + math.prod(map(max, sizes))


def selections(support: Support, grid: Grid, prefix: int = 0) -> int:
    """Return the number of different sets V_i, which is the number of kernels that `mean` and `pool` form per image."""
    on_grid = math.prod(len(set(_counted(support, length))) for length in grid)
    if isinstance(support, Own):
        return on_grid + prefix
    return on_grid + (prefix > 0 and on_grid > 1)


def _counted(support: Support, length: int) -> tuple[Coordinates, ...]:
    """`seen` by the definition, without the padding of a published checkpoint: what is counted and drawn."""
    return seen(replace(support, pad="masked") if isinstance(support, Window) else support, length)
