"""Geometry against the sentences that define it, position by position."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernelbank.ops import geometry as geometries
from kernelbank.ops.geometry import cached, geometry, pool_cells, relative_offsets, unfold, visibility
from kernelbank.spec import MixerSpec, SpecError
from kernelbank.spec.axes import All, Dilated, Neighborhood, Own, Window

GRIDS = [(1, 1), (4, 4), (3, 5), (7, 2), (8, 9)]


def sees(support: object, i: int, j: int, grid: tuple[int, int]) -> bool:
    """Whether grid position i sees grid position j, from the sentence that defines the support."""
    (yi, xi), (yj, xj) = divmod(i, grid[1]), divmod(j, grid[1])
    match support:
        case Window(M=M, shift=s):

            def region(at: int, length: int) -> int:
                return (at - (s if length > M else 0)) // min(M, length)

            return region(yi, grid[0]) == region(yj, grid[0]) and region(xi, grid[1]) == region(xj, grid[1])
        case Dilated(M=M):
            return all((a - b) % math.ceil(side / M) == 0 for a, b, side in ((yi, yj, grid[0]), (xi, xj, grid[1])))
        case Neighborhood(M=M):

            def inside(at: int, other: int, length: int) -> bool:
                side = min(M, length)
                start = max(0, min(at - side // 2, length - side))
                return start <= other < start + side

            return inside(yi, yj, grid[0]) and inside(xi, xj, grid[1])
        case Own():
            return i == j
        case _:
            return True


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "support",
    [All(), Window(3), Window(3, 1), Window(4, 3), Dilated(2), Dilated(3), Neighborhood(3), Neighborhood(5), Own()],
)
def test_visibility_is_its_sentence(support: object, grid: tuple[int, int], prefix: int) -> None:
    V = visibility(support, grid, prefix)
    count = grid[0] * grid[1]
    expected = torch.tensor([[sees(support, i, j, grid) for j in range(count)] for i in range(count)])
    assert torch.equal(V[prefix:, prefix:], expected)
    outside = torch.eye(prefix + count, dtype=torch.bool) if isinstance(support, Own) else torch.ones_like(V)
    assert torch.equal(V[:prefix], outside[:prefix]) and torch.equal(V[:, :prefix], outside[:, :prefix])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("M", [2, 3, 4])
def test_a_dilated_grid_holds_at_most_m_x_m_kernels_with_a_table_in_steps(grid: tuple[int, int], M: int) -> None:
    geo = geometry(MixerSpec.parse(f"maxvit_grid support=grid({M})"), grid, 0)
    visible = visibility(Dilated(M), grid, 0)
    assert visible.sum(1).max() <= M * M
    assert geo.sides is not None and geo.offsets is not None
    (a, b), (down, along) = geo.sides, geo.steps
    for i, j in visible.nonzero().tolist():
        dy, dx = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
        assert dy % down == 0 and dx % along == 0 and abs(dy // down) < a and abs(dx // along) < b
        assert geo.offsets[i, j] == (dy // down + a - 1) * (2 * b - 1) + dx // along + b - 1


@pytest.mark.parametrize("grid", GRIDS)
def test_a_neighborhood_always_holds_all_it_can(grid: tuple[int, int]) -> None:
    assert (visibility(Neighborhood(3), grid, 0).sum(1) == min(3, grid[0]) * min(3, grid[1])).all()


def test_regions_of_a_shifted_window_have_the_published_sizes() -> None:
    """14 x 14 in windows of 7 shifted by 3 holds regions of 49, 28, 21, 16, 12 and 9."""
    assert set(visibility(Window(7, 3), (14, 14), 0).sum(1).tolist()) == {49, 28, 21, 16, 12, 9}


def test_an_alternating_shift_must_be_resolved() -> None:
    with pytest.raises(SpecError, match="at_block"):
        visibility(Window(7, "alternate"), (14, 14), 0)


def test_offsets_are_query_minus_kernel_row_major_with_prefix_entries() -> None:
    index = relative_offsets((2, 3), (2, 3), 1)
    assert index[1 + 5, 1 + 0] == (1 + 1) * 5 + (2 + 2)  # from (1, 2) to (0, 0)
    assert index[1, 1] == 1 * 5 + 2
    assert index[0, 1] == 15 and index[1, 0] == 16 and index[0, 0] == 17


def test_patches_hold_zeros_outside_and_a_prefix_fills_its_centre() -> None:
    geo = geometry(MixerSpec.parse("vit3"), (2, 2), 1)
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    patches = unfold(x, 3, geo)[0, :, 0]
    assert patches[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert patches[1].tolist() == [0, 0, 0, 0, 2, 3, 0, 4, 5]


def test_partial_cells_average_their_own_positions() -> None:
    geo = geometry(MixerSpec.parse("strided_bank"), (3, 3), 1)
    x = torch.arange(10.0).view(1, 10, 1)
    assert pool_cells(x, 2, geo).flatten().tolist() == [0, (1 + 2 + 4 + 5) / 4, (3 + 6) / 2, (7 + 8) / 2, 9]


def test_threads_share_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads make, use and drop values at once."""
    monkeypatch.setattr(geometries, "_CACHE", OrderedDict())
    monkeypatch.setattr(geometries, "_CACHE_BYTES", 8 * 100_000)

    def use(thread: int) -> None:
        for i in range(200, 600):
            n = i + 400 * thread
            assert cached(torch.arange, n).shape == (n,)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        sys.setswitchinterval(interval)
