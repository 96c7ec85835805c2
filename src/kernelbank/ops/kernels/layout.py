"""Where the tokens of an attention kernel lie, in plain integers, and the naive scores that its naive form needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.kernels.launch import block, precision

EPS = 1e-6
"""What LayerNorm and RMSNorm over the kernels add to the variance."""


@dataclass(frozen=True)
class Layout:
    """`prefix` tokens before a grid of rows of `width` cells, and the sides (a, b) of the relative table
    (h, 2a-1, 2b-1)."""

    prefix: int
    width: int
    sides: tuple[int, int]

    @staticmethod
    def of(prefix: int, width: int, sides: list[int]) -> Layout:
        """The layout that an operator states as integers."""
        a, b = sides
        return Layout(prefix, width, (a, b))

    @property
    def span(self) -> int:
        """2b - 1, the entries of a row of the table."""
        return 2 * self.sides[1] - 1

    @property
    def count(self) -> int:
        """The entries of the table of a head, without those of the prefix."""
        return (2 * self.sides[0] - 1) * self.span

    @property
    def centre(self) -> int:
        """The entry of offset zero."""
        return (self.sides[0] - 1) * self.span + self.sides[1] - 1

    def index(self, i: Tensor, j: Tensor) -> Tensor:
        """The entries of the flattened table for queries `i` and kernels `j`; clamped where nothing is visible."""
        at_i, at_j = ((t - self.prefix) // self.width * self.span + (t - self.prefix) % self.width for t in (i, j))
        index = (at_i[:, None] - at_j + self.centre).clamp(0, self.count - 1)
        if not self.prefix:
            return index
        on_grid = torch.where(j < self.prefix, self.count + 1, index)
        of_prefix = torch.where(j < self.prefix, self.count + 2, self.count)
        return torch.where((i < self.prefix)[:, None], of_prefix, on_grid)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda s: s,
    "relu": F.relu,
    "relu2": lambda s: F.relu(s) ** 2,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}
"""The non-linearities that kernels know."""
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "relu": lambda s: (s > 0).to(s.dtype),
    "relu2": lambda s: 2 * F.relu(s),
    "sigmoid": lambda s: torch.sigmoid(s) * torch.sigmoid(-s),
    "gelu": lambda s: 0.5 * (1 + torch.erf(s * 0.5**0.5)) + s * torch.exp(-0.5 * s * s) * (2 * torch.pi) ** -0.5,
}
"""Their derivatives."""


def visible(regions: Tensor | None, i: Tensor, j: Tensor) -> Tensor | None:
    """(queries, kernels), or None where all are: a kernel of the query's region, and every pair with a prefix token."""
    if regions is None:
        return None
    own, other = regions[i][:, None], regions[j]
    return (own == other) | (own < 0) | (other < 0)


def scores(
    q: Tensor, key: Tensor, entries: Tensor | None, rows: Tensor, layout: Layout, scale: float, i: Tensor, j: Tensor
) -> Tensor:
    """s of the queries `i` and the kernels `j`, (B, h, queries, kernels)."""
    s = q[:, :, i] @ key[:, :, j].mT * scale
    if entries is not None:
        s = s + entries[:, layout.index(i, j)].to(s.dtype)
    gain, shift, _ = rows.to(s.dtype)[:, i, None]
    return s * gain + shift


def token_major(like: Tensor, width: int) -> Tensor:
    """Room for (B, h, T, width), token by token in memory: a view of it as (B, T, h width) costs nothing."""
    B, h, T, _ = like.shape
    return torch.empty_permuted((B, h, T, width), (0, 2, 1, 3), dtype=like.dtype, device=like.device)


def by_channel(x: Tensor) -> Tensor:
    """`x` with its channels next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of image, head and token."""
    image, head, token, _ = x.stride()
    return image, head, token


@dataclass(frozen=True)
class Tiling:
    """Queries and kernels of a tile, warps of a program, and tiles in flight."""

    queries: int
    kernels: int
    warps: int
    stages: int


def tiling(width: int, half: bool, queries: int, kernels: int, backward: bool = False) -> Tiling:
    """The tile for heads of `width` channels, in half precision or float32. Fixed sizes and no search, so that a call
    computes the same numbers in every process."""
    if not half:
        return Tiling(block(queries, 32), block(kernels, 32), 4, 1)
    most = 128 if width <= 64 and not backward else 64
    return Tiling(
        block(queries, most), block(kernels, 64 if width <= 64 else 32), 8 if width > 64 or most > 64 else 4, 2
    )


def shared_memory(width: int, half: bool, cells: int = 0) -> int:
    """An upper bound of the bytes of shared memory of the programs for heads of `width` channels; of those for regions
    of so many `cells`, if given. tests/ops/test_kernels_compile.py compares it with what Triton allocates."""
    itemsize, W = (2 if half else 4), block(width, 4096)
    if cells:
        side = block(cells, 4096)
        return 4 * side * W * itemsize + 4 * side * side
    forward, back = (tiling(width, half, 4096, 4096, backward) for backward in (False, True))
    return max(
        (forward.queries + 2 * forward.stages * forward.kernels) * W * itemsize + 4 * forward.queries * forward.kernels,
        2 * (back.queries + back.stages * back.kernels) * W * itemsize + 8 * back.queries * back.kernels,
    )


def constants(e: int, d: int, act: str, entries: Tensor | None, regions: Tensor | None, x: Tensor) -> dict[str, object]:
    """The compile-time arguments that every attention kernel has, for heads of `e` and `d` channels."""
    return {
        "ACT": act, "TABLE": entries is not None, "REGIONS": regions is not None, "WIDTH_QK": e, "WIDTH_V": d,
        "BLOCK_QK": block(e, 4096), "BLOCK_V": block(d, 4096), "PRECISION": precision(x),
    }  # fmt: skip
