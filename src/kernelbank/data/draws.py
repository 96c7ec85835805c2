"""Random numbers for a batch of seeds, equal on every device: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) in integers
that wrap around."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return the 64 bits of `value` as a signed integer of torch."""
    return value - 2**64 if value >= 2**63 else value


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def bits(seeds_B: Tensor, count: int, start: int = 0) -> Tensor:
    """Return (B, count) integers of 64 bits, the numbers `start` to `start + count - 1` in the stream of each seed."""
    index = torch.arange(start + 1, start + count + 1, device=seeds_B.device)
    z = seeds_B[:, None] + index * _STEP
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def uniforms(seeds_B: Tensor, count: int, start: int = 0) -> Tensor:
    """Return (B, count) numbers 0 <= u < 1 in float64. Arguments as in `bits`."""
    return _shift(bits(seeds_B, count, start), 11).double() * 2.0**-53


def normals(seeds_B: Tensor, count: int, start: int = 0) -> Tensor:
    """Return (B, count) standard normal numbers in float64, by the Box-Muller method from twice as many uniform
    numbers."""
    u = uniforms(seeds_B, 2 * count, start)
    return (-2 * torch.log1p(-u[:, :count])).sqrt() * torch.cos(2 * math.pi * u[:, count:])


def _shift(z: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros."""
    return (z >> places) & (2 ** (64 - places) - 1)
