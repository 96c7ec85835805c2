"""A spec at a size, and the counts that its cost, its diagram and its figure share. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernelbank.spec import Dynamic, Pool, Project
from kernelbank.spec.inventory import Grid, SizedSpec, bank_size, taps
from kernelbank.spec.support import selections, visible_pairs, visible_range


@dataclass(frozen=True)
class Host(SizedSpec):
    """A spec at `dim` channels, `num_heads` heads and an H x W `grid` after `prefix` tokens, with its counts."""

    grid: Grid
    prefix: int

    @property
    def tokens(self) -> int:
        """T, the number of positions: P + H W."""
        return self.prefix + math.prod(self.grid)

    @property
    def kernels(self) -> int:
        """The number of kernels of the bank."""
        return bank_size(self.spec, self.dim, self.grid, self.prefix)

    @property
    def taps(self) -> int:
        """The weights of one generated kernel (of the first of two steps)."""
        return taps(self.spec, self.dim, self.num_heads)

    @property
    def pairs(self) -> int:
        """The sum of n_i: pairs of a position and a kernel that it sees, after the mix."""
        match self.spec.bank, self.spec.mix:
            case _, Project(r=r):
                return self.tokens * r
            case Dynamic(stride=stride), _:
                return visible_pairs(self.spec.support, self.grid, self.prefix, stride)
            case _:
                return self.tokens * self.kernels

    @property
    def visible(self) -> tuple[int, int]:
        """The fewest and the most kernels that a grid position sees, after the mix where it stacks."""
        match self.spec.bank, self.spec.mix:
            case _, Project(r=r):
                return r, r
            case Dynamic(stride=1), _:
                return visible_range(self.spec.support, self.grid, self.prefix)
            case _:
                return self.kernels, self.kernels

    @property
    def mixed(self) -> int:
        """The number of kernels that `mean` or `pool` forms per image, one for each set of visible kernels."""
        return selections(self.spec.support, self.grid, self.prefix)

    @property
    def generated(self) -> int:
        """How many times the generator runs: after pooling, or once per kernel."""
        return self.mixed if isinstance(self.spec.mix, Pool) else self.kernels
