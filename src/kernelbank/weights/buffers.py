"""Buffers that some libraries keep in their states although the architecture gives them: dropped, and made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernelbank.model import Grid, ModelSpec
from kernelbank.weights.keymap import Pattern, State
from kernelbank.weights.stock import windows

MASKED = -100.0
"""The value that microsoft's Swin adds to the logits of pairs in different regions."""


def indices(pattern: str, spec: ModelSpec) -> State:
    """Return relative_position_index of every block, (N, N) for the N positions of its window (a, b). It is the row of
    the table for query i and key j, (y_i - y_j + a - 1)(2b - 1) + x_i - x_j + b - 1."""
    return dict(_blocks(pattern, spec, lambda stage, _: _index(windows(spec)[stage])))


def flat_indices(pattern: str, spec: ModelSpec) -> State:
    """Return `indices`, flattened to (N N)."""
    return {key: index.flatten() for key, index in indices(pattern, spec).items()}


def attn_masks(pattern: str, spec: ModelSpec) -> State:
    """Return attn_mask of every shifted block, (windows, N, N). It is 0 where query and key are in one region of the
    rolled grid, else -100."""

    def mask(stage: int, block: int) -> Tensor | None:
        grid, window = spec.stages[stage].grid, windows(spec)[stage]
        return _mask(grid, window[0]) if block % 2 and min(grid) > min(window) else None

    return dict(_blocks(pattern, spec, mask))


def _blocks(pattern: str, spec: ModelSpec, make: Callable[[int, int], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    for stage, depth in enumerate(stage.depth for stage in spec.stages):
        for block in range(depth):
            tensor = make(stage, block)
            if tensor is not None:
                yield Pattern(pattern).key((("i", stage), ("j", block))), tensor


def _index(window: Grid) -> Tensor:
    a, b = window
    y, x = torch.arange(a).repeat_interleave(b), torch.arange(b).repeat(a)
    return (y[:, None] - y + a - 1) * (2 * b - 1) + x[:, None] - x + b - 1


def _mask(grid: Grid, window: int) -> Tensor:
    """The mask of one stage. Each rolled axis has three segments: up to the last window, the part of the last window
    before the shift, and the rest."""
    thirds = [
        (torch.arange(length) >= length - window).long() + (torch.arange(length) >= length - window // 2)
        for length in grid
    ]
    region = thirds[0][:, None] * 3 + thirds[1]
    cells = region.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.zeros(()).masked_fill(cells[:, None] != cells[:, :, None], MASKED)
