"""The paper's reading run as written: attention as two grouped 1x1 dynamic convolutions (paper 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelbank.ops.bank import two_step_bank
from kernelbank.ops.geometry import to_grid
from kernelbank.ops.kernel import conv2d, logits, normed_operand, weigh
from kernelbank.ops.mix import project
from kernelbank.ops.setting import Params, Setting


def two_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Setting) -> Tensor:
    """The keys as a kernel (B*h*n, d, k, k) and the values as a kernel (B*C, n, 1, 1), groups B*h: the images and
    heads are groups of one convolution over a map of B*C channels (systems.md 5.2)."""
    (B, T, C), h = operand_BTC.shape, s.heads
    bank = project(two_step_bank(source_BTC, p, s), p, s)
    n = bank.key.shape[2]
    key = bank.key.expand(B, -1, -1, -1).reshape(B * h * n, C // h, s.spec.size, s.spec.size) * bank.scale
    scores = _query_key(normed_operand(operand_BTC, p, s), key, s).view(B, h, n, T).transpose(-1, -2)
    a = weigh(scores, logits(bank, p, s), s.visible, p, s).to(bank.value.dtype)
    a = a.transpose(-1, -2).reshape(1, B * h * n, 1, T)
    value = bank.value.expand(B, -1, -1, -1).transpose(-1, -2).reshape(B * C, n, 1, 1)
    o_BTC = conv2d(a, value, None, 0, B * h).view(B, C, T).transpose(1, 2)
    return o_BTC if bank.value_bias is None else o_BTC + bank.value_bias


def _query_key(operand_BTC: Tensor, key: Tensor, s: Setting) -> Tensor:
    """The first dynamic conv: (B*h*n, T). A prefix token is its own 1 x 1 grid and meets the centre tap."""
    (B, T, C), P, size = operand_BTC.shape, s.geo.prefix, s.spec.size
    image = to_grid(operand_BTC, s.geo).reshape(1, B * C, *s.geo.grid)
    on_grid = conv2d(image, key, None, size // 2, B * s.heads).view(-1, T - P)
    if not P:
        return on_grid
    tokens = operand_BTC[:, :P].transpose(1, 2).reshape(1, B * C, 1, P)
    centre = key[:, :, size // 2, size // 2, None, None]
    return torch.cat([conv2d(tokens, centre, None, 0, B * s.heads).view(-1, P), on_grid], 1)
