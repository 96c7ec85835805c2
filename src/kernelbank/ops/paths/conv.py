"""Every kernel applied as a convolution. Attention is two grouped 1 x 1 dynamic convolutions (arXiv 2309.10713, section
4.2); a gate and a kernel per position are grouped convolutions too."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernelbank.ops import kernel
from kernelbank.ops.bank import two_step_bank
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.geometry import to_grid, unfold
from kernelbank.ops.kernel import conv2d, logits, normed_operand, weigh
from kernelbank.ops.machine import Machine
from kernelbank.ops.mix import generated_kernel, project
from kernelbank.ops.paths import blocks
from kernelbank.ops.paths.blocks import needs_blocks
from kernelbank.ops.paths.framed import framed
from kernelbank.ops.paths.path import MixerPath, Reason, needs_static_tensors, never_preferred
from kernelbank.ops.paths.vectorised import one_step_with_table
from kernelbank.spec import Dynamic, TwoStep


def two_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The keys as a kernel (G*h*n, d, k, k) and the values as a kernel (G*C, n, 1, 1), groups G*h: the images and
    heads are groups of one convolution over a map of G*C channels. G is 1 where all images share the kernels, else the
    number of images."""
    (B, T, C), h = operand_BTC.shape, s.heads
    bank = project(two_step_bank(source_BTC, p, s), p, s)
    G, n = bank.key.shape[0], bank.key.shape[2]
    key = bank.key.reshape(G * h * n, C // h, s.spec.size, s.spec.size) * bank.scale
    scores = _query_key(normed_operand(operand_BTC, p, s), key, G, s).view(B, h, n, T).transpose(-1, -2)
    a = weigh(scores, logits(bank, p, s), s.visible, p, s).to(bank.value.dtype)
    a = a.transpose(-1, -2).reshape(B // G, G * h * n, 1, T)
    value = bank.value.transpose(-1, -2).reshape(G * C, n, 1, 1)
    o_BTC = conv2d(a, value, None, 0, G * h).view(B, C, T).transpose(1, 2)
    return o_BTC if bank.value_bias is None else o_BTC + bank.value_bias


def one_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """o_i = sum_t w_it q_{i+t}: one kernel per image is a depth-wise convolution of it, a kernel per position a grouped
    1 x 1 convolution of the patches, one group per position and shared kernel."""
    if not isinstance(s.spec.bank, Dynamic):
        return kernel.one_step(operand_BTC, source_BTC, p, s)
    weight, taps = generated_kernel(source_BTC, p, s)
    (B, _, C), shared = operand_BTC.shape, weight.shape[2]
    bias = p.get("bias")
    if weight.shape[1] == 1:
        size = s.spec.size
        whole = weight[:, 0].repeat_interleave(C // shared, 1).view(B, C, 1, size, size).to(operand_BTC.dtype)
        o = kernel.convolve(operand_BTC, whole, None if bias is None else bias[None], C, s.geo)
    else:
        o = _per_position(operand_BTC, weight, s)
        o = o if bias is None else o + bias
    position = kernel.positional_term(taps, p, s)
    return (o if position is None else o + position).to(operand_BTC.dtype)


def _per_position(x_BTC: Tensor, weight_BTRt: Tensor, s: Context) -> Tensor:
    """The patches of C/R channels that share a kernel as C/R places of a map with a channel per tap, groups B T R."""
    B, T, R, t = weight_BTRt.shape
    patches = unfold(x_BTC, s.spec.size, s.geo).unflatten(2, (R, -1)).mT.to(weight_BTRt.dtype)  # (B, T, R, t, C/R)
    maps = patches.reshape(1, B * T * R * t, 1, patches.shape[-1])
    return conv2d(maps, weight_BTRt.reshape(B * T * R, t, 1, 1), None, 0, B * T * R).reshape(B, T, -1)


def _query_key(operand_BTC: Tensor, key: Tensor, G: int, s: Context) -> Tensor:
    """The first dynamic conv: (B/G, G*h*n, T). A prefix token is its own 1 x 1 grid and meets the centre tap."""
    (B, _, C), P, size = operand_BTC.shape, s.geo.prefix, s.spec.size
    image = to_grid(operand_BTC, s.geo).reshape(B // G, G * C, *s.geo.grid)
    on_grid = conv2d(image, key, None, size // 2, G * s.heads).flatten(2)
    if not P:
        return on_grid
    tokens = operand_BTC[:, :P].transpose(1, 2).reshape(B // G, G * C, 1, P)
    centre = key[:, :, size // 2, size // 2, None, None]
    return torch.cat([conv2d(tokens, centre, None, 0, G * s.heads).flatten(2), on_grid], 2)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., n, e) b (..., e, m) as one grouped 1 x 1 convolution of the map a with the kernels b: the matrices are
    groups."""
    (n, e), m, matrices = a.shape[-2:], b.shape[-1], math.prod(a.shape[:-2])
    kernels = b.mT.reshape(matrices * m, e, 1, 1)
    o = conv2d(a.mT.reshape(1, matrices * e, 1, n), kernels, None, 0, matrices)
    return o.view(*a.shape[:-2], m, n).mT


def run(x_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The mixer; attention in windows block by block, where that is possible, so that a kernel scores the positions of
    its window alone."""
    if isinstance(s.spec.kernel, TwoStep) and needs_blocks(s) is None:
        return blocks.run(x_BTC, p, replace(s, product=product))
    return framed(core)(x_BTC, p, s)


def core(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The dynamic convolutions of either kind."""
    steps = two_step if isinstance(s.spec.kernel, TwoStep) else one_step
    return steps(operand_BTC, source_BTC, p, s)


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: static kernels that are modules."""
    return needs_static_tensors(s)


PATH = MixerPath("conv", run, unsupported, never_preferred, one_step_with_table)
