"""One kernel per position, larger than 1: one multiply-add of a shifted map per tap, without patches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.geometry import from_grid, to_grid
from kernelbank.ops.kernel import positional_term
from kernelbank.ops.machine import Machine
from kernelbank.ops.mix import generated_kernel
from kernelbank.ops.paths.framed import framed
from kernelbank.ops.paths.path import MixerPath, Reason, needs_every_kernel, needs_one_step
from kernelbank.ops.paths.vectorised import one_step_with_table
from kernelbank.ops.transforms import differentiated, gradients, recorded, transformed
from kernelbank.spec import Dynamic


def one_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """o_i = sum_t w_it x_{i+t} by taps; a prefix token meets the centre tap."""
    kernel, taps = generated_kernel(source_BTC, p, s)  # (B, T, R, t)
    P, size, (H, W) = s.geo.prefix, s.spec.size, s.geo.grid
    kernel = kernel.to(operand_BTC.dtype)
    x = to_grid(operand_BTC, s.geo).unflatten(1, (s.shared, -1))  # (B, R, C/R, H, W)
    w = kernel[:, P:].permute(0, 2, 3, 1).unflatten(3, (H, W))  # (B, R, t, H, W)
    padded = F.pad(x, (size // 2,) * 4)
    graph = recorded() or transformed()
    y = _functional(padded, w, size) if graph else _Shifted.apply(padded, w.contiguous(), size)
    centre = kernel[:, :P, :, size * size // 2, None]
    prefix = (operand_BTC[:, :P].unflatten(2, (s.shared, -1)) * centre).flatten(2)
    o = from_grid(prefix, y.flatten(1, 2))
    o = o + p["bias"] if "bias" in p else o
    position = positional_term(taps, p, s)
    return (o if position is None else o + position).to(operand_BTC.dtype)


def _functional(padded: Tensor, w: Tensor, size: int) -> Tensor:
    """As `_Shifted`, by operations that torch differentiates to any order, transforms and fuses."""
    o = padded.new_zeros(())
    for t, part in _parts(padded, size, w.shape[3:]):
        o = o + part * w[:, :, t, None]
    return o


class _Shifted(torch.autograd.Function):
    """A map x padded by p = size // 2, (B, R, C/R, H + 2p, W + 2p), and w (B, R, t, H, W) -> sum_t w_t x shifted by t,
    (B, R, C/R, H, W)."""

    @staticmethod
    def forward(padded: Tensor, w: Tensor, size: int) -> Tensor:
        o = padded.new_zeros(*padded.shape[:3], *w.shape[3:])
        for t, part in _parts(padded, size, w.shape[3:]):
            o.addcmul_(part, w[:, :, t, None])
        return o

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        padded, w, ctx.size = inputs
        ctx.save_for_backward(padded, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padded, w = ctx.saved_tensors
        if differentiated(grads[0]):
            function = partial(_functional, size=ctx.size)
            return (*gradients(function, (padded, w), ctx.needs_input_grad[:2], grads[0]), None)
        g = grads[0].contiguous()
        d_padded, d_w = torch.zeros_like(padded), torch.empty_like(w)
        parts = zip(_parts(padded, ctx.size, g.shape[3:]), _parts(d_padded, ctx.size, g.shape[3:]), strict=True)
        for (t, part), (_, d_part) in parts:
            d_part.addcmul_(g, w[:, :, t, None])
            d_w[:, :, t] = (g * part).sum(2)
        return d_padded, d_w, None


def _parts(padded: Tensor, size: int, grid: torch.Size) -> list[tuple[int, Tensor]]:
    """The map shifted by each tap, as views."""
    height, width = grid
    return [
        (dy * size + dx, padded[..., dy : dy + height, dx : dx + width]) for dy in range(size) for dx in range(size)
    ]


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: one kernel for all positions, and size 1."""
    if (reason := needs_one_step(s)) is not None:
        return reason
    if not isinstance(s.spec.bank, Dynamic) or s.spec.size == 1:
        return "it runs generated kernels larger than 1"
    return "one kernel per image is a convolution" if needs_every_kernel(s) is None else None


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred always."""
    return f"{s.spec.size**2} shifted maps instead of patches {s.spec.size**2} times as large"


PATH = MixerPath("shifts", framed(one_step), unsupported, preferred, one_step_with_table)
