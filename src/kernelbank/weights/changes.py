"""Conversions of tensors that libraries store differently. Each is a bijection with its inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelbank.weights.keymap import Change, Misfit, Shape, TargetShapes, Tensors, of_one


def _shaped(tensor: Tensor, pattern: tuple[int | None, ...]) -> Tensor:
    """Return `tensor` if its shape matches `pattern`, in which None is any length. Raises Misfit."""
    if len(pattern) != tensor.ndim or any(p not in (None, n) for p, n in zip(pattern, tensor.shape, strict=True)):
        text = ", ".join("n" if length is None else str(length) for length in pattern)
        raise Misfit(f"invalid shape {tuple(tensor.shape)}; expected ({text})")
    return tensor


def _to_channels_first_taps(tensor: Tensor, shape: Shape | None) -> Tensor:
    """(..., 4C) in the order (dx, dy, c) of timm -> (c, dy, dx) of nn.Unfold."""
    return _merged(tensor, (2, 2, -1), (2, 1, 0))


def _to_taps_first(tensor: Tensor, shape: Shape | None) -> Tensor:
    """The inverse of `_to_channels_first_taps`: (..., 4C) in the order (c, dy, dx) -> (dx, dy, c)."""
    return _merged(tensor, (-1, 2, 2), (2, 1, 0))


def _merged(tensor: Tensor, parts: tuple[int, int, int], order: tuple[int, int, int]) -> Tensor:
    if not tensor.ndim or tensor.shape[-1] % 4:
        raise Misfit(f"invalid shape {tuple(tensor.shape)}; expected four times as many channels")
    lead = tuple(range(tensor.ndim - 1))
    return tensor.unflatten(-1, parts).permute(*lead, *(len(lead) + axis for axis in order)).flatten(-3)


UNFOLD = of_one(_to_taps_first, _to_channels_first_taps)
"""Patch merging by nn.Unfold: four times C channels as (c, dy, dx), where timm has (dx, dy, c)."""


def _table_to_timm(table: Tensor, shape: Shape | None) -> Tensor:
    """(h, 2a-1, 2b-1) -> (offsets, h), offsets row by row."""
    return _shaped(table, (None, None, None)).flatten(1).t()


def _table_from_timm(table: Tensor, shape: Shape | None) -> Tensor:
    offsets, heads = _shaped(table, (None, None)).shape
    side = math.isqrt(offsets)
    shape = shape or (heads, side, side)
    if math.prod(shape) != table.numel() or shape[0] != heads:
        raise Misfit(f"invalid shape {tuple(table.shape)}; expected one that can become {tuple(shape)}")
    return table.t().reshape(shape)


TABLE = of_one(_table_to_timm, _table_from_timm)
"""A relative table (h, 2a-1, 2b-1) as timm's (offsets, h)."""


def _unstacked(tensor: Tensor, shape: Shape | None) -> Tensor:
    """Remove the axes of length 1 with which version 0.1 saved kernels of one head, (1, K, C, 1, 1) and (1, C, K)."""
    if tensor.ndim == 5 and tensor.shape[3:] == (1, 1):
        tensor = tensor[..., 0, 0]
    return tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else _shaped(tensor, (None, None))


FFN_WEIGHT = of_one(_unstacked, lambda weight, _: _shaped(weight, (None, None)))
FFN_BIAS = of_one(lambda bias, _: bias[0] if bias.ndim == 2 else bias, lambda bias, _: _shaped(bias, (None,)))
"""The layers of an FFN: (K, C) and (C, K), biases (K) and (C)."""

LEADING = of_one(
    lambda table, _: _shaped(table, (None, None))[None], lambda table, _: _shaped(table, (1, None, None))[0],
)  # fmt: skip
"""Position embeddings (N, C) as timm's (1, N, C)."""
TOKEN = of_one(
    lambda token, _: _shaped(token, (None,))[None, None], lambda token, _: _shaped(token, (1, 1, None))[0, 0],
)  # fmt: skip
"""A class token (C) as timm's (1, 1, C)."""


def _with_bias(tensors: Tensors, shapes: TargetShapes) -> Tensors:
    weight = _shaped(tensors[0], (None, None))
    return weight, weight.new_zeros(len(weight))


def _without_bias(tensors: Tensors, shapes: TargetShapes) -> Tensors:
    weight, bias = tensors
    if bias.any():
        raise Misfit("a bias that is not zero; expected none, as a projection has")
    return (weight,)


PROJECTION = Change(_with_bias, _without_bias)
"""A projection without a bias as a head of timm, whose bias is zero."""


def _registers_to_timm(tensors: Tensors, shapes: TargetShapes) -> Tensors:
    registers, places = (_shaped(tensor, (1, None, None)) for tensor in tensors)
    return registers, torch.cat((places[:, :1], torch.zeros_like(registers), places[:, 1:]), 1)


def _registers_from_timm(tensors: Tensors, shapes: TargetShapes) -> Tensors:
    registers, places = (_shaped(tensor, (1, None, None)) for tensor in tensors)
    count = registers.shape[1]
    if places.shape[1] <= count or places[:, 1 : 1 + count].any():
        raise Misfit("position embeddings for the registers; expected zeros, as DINOv2 has none there")
    return registers, torch.cat((places[:, :1], places[:, 1 + count :]), 1)


REGISTERS = Change(_registers_to_timm, _registers_from_timm)
"""Registers (1, R, C) and the position embeddings (1, 1 + N, C) of DINOv2, which the class token has and the registers
have not, as timm's (1, 1 + R + N, C) with zeros for the registers."""
