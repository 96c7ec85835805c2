"""A kernel a position, larger than 1: the patches are never made. One multiply-add of a shifted map for each tap."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernelbank.ops.context import Params, Setting
from kernelbank.ops.geometry import from_grid, to_grid
from kernelbank.ops.kernel import positional_term
from kernelbank.ops.mix import generated_kernel


def one_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Setting) -> Tensor:
    """o_i = sum_t w_it x_{i+t} by taps; a prefix token meets the centre tap."""
    kernel, taps = generated_kernel(source_BTC, p, s)  # (B, T, R, t)
    P, size, (H, W) = s.geo.prefix, s.spec.size, s.geo.grid
    kernel = kernel.to(operand_BTC.dtype)
    x = to_grid(operand_BTC, s.geo).unflatten(1, (s.shared, -1))  # (B, R, C/R, H, W)
    w = kernel[:, P:].permute(0, 2, 3, 1).unflatten(3, (H, W))  # (B, R, t, H, W)
    y = _functional(x, w, size) if torch.compiler.is_compiling() else _Shifted.apply(x, w.contiguous(), size)
    centre = kernel[:, :P, :, size * size // 2, None]
    prefix = (operand_BTC[:, :P].unflatten(2, (s.shared, -1)) * centre).flatten(2)
    o = from_grid(prefix, y.flatten(1, 2))
    o = o + p["bias"] if "bias" in p else o
    position = positional_term(taps, p, s)
    return (o if position is None else o + position).to(operand_BTC.dtype)


def _functional(x: Tensor, w: Tensor, size: int) -> Tensor:
    """As `_Shifted`, for a compiler that derives and fuses by itself."""
    parts = _parts(F.pad(x, (size // 2,) * 4), size, x.shape[3:])
    o = torch.zeros_like(x)
    for t, part in parts:
        o = o + part * w[:, :, t, None]
    return o


class _Shifted(torch.autograd.Function):
    """x (B, R, C/R, H, W) and w (B, R, t, H, W) -> sum_t w_t x shifted by t, zeros outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, size: int) -> Tensor:
        ctx.size = size
        padded = F.pad(x, (size // 2,) * 4)
        ctx.save_for_backward(padded, w)
        o = x.new_zeros(x.shape)
        for t, part in _parts(padded, size, x.shape[3:]):
            o.addcmul_(part, w[:, :, t, None])
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, w = ctx.saved_tensors
        g, half = grads[0].contiguous(), ctx.size // 2
        d_padded, d_w = torch.zeros_like(padded), torch.empty_like(w)
        height, width = g.shape[3:]
        parts = zip(_parts(padded, ctx.size, g.shape[3:]), _parts(d_padded, ctx.size, g.shape[3:]), strict=True)
        for (t, part), (_, d_part) in parts:
            d_part.addcmul_(g, w[:, :, t, None])
            d_w[:, :, t] = (g * part).sum(2)
        return d_padded[..., half : half + height, half : half + width], d_w, None


def _parts(padded: Tensor, size: int, grid: torch.Size) -> list[tuple[int, Tensor]]:
    """The map shifted by each tap, as views."""
    height, width = grid
    return [
        (dy * size + dx, padded[..., dy : dy + height, dx : dx + width]) for dy in range(size) for dx in range(size)
    ]
