"""Attention with LayerNorm or RMSNorm over the kernels in one pass: y_ij = (s_ij - mu_i) / sigma_i,
o_i = w_i sum_j y_ij v_j with the mean and the variance of s over the kernels of query i.

The pass accumulates sum_j t, sum_j t^2 and sum_j t v_j of t = s - anchor and divides at the end. The anchor is the
score of the mean kernel, close to mu, so that the variance does not cancel. Where the scores are linear in q and the
table, `ops.paths.associated` has the closed form O(N) that needs no scores at all; this one is for few kernels and
for half precision, in which that form's sums of squares cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelbank.ops.kernels.gradients import attention_gradients, save_inputs
from kernelbank.ops.kernels.launch import jit, launches, on_device, tl
from kernelbank.ops.kernels.layout import (
    EPS,
    Layout,
    by_channel,
    constants,
    scores,
    strides,
    tiling,
    token_major,
)
from kernelbank.ops.kernels.tiles import load_rows, place, positions, store_rows
from kernelbank.ops.transforms import differentiated, gradients


def naive(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, layout: Layout, centred: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, mu, 1 / sigma) with the whole map of scores; mu = 0 for RMSNorm."""
    i, j = (torch.arange(t.shape[2], device=t.device) for t in (q, key))
    s = scores(q, key, entries, rows, layout, scale, i, j).to(torch.promote_types(q.dtype, torch.float32))
    mean = s.mean(-1, keepdim=True) if centred else torch.zeros_like(s[..., :1])
    inverse = ((s - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    o = ((s - mean) * inverse).to(value.dtype) @ value * rows[2].to(q.dtype)[:, None]
    return o, mean[..., 0], inverse[..., 0]


@jit
def forward_kernel(
    q, key, value, entries, rows, mean_key, mean_value, out, stats,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    o_image, o_head, o_row, total_rows, heads, T, n, scale, eps, prefix,
    width, span, centre, count, entry_row,
    ACT: tl.constexpr, CENTRED: tl.constexpr, TABLE: tl.constexpr, PREFIX: tl.constexpr, REGIONS: tl.constexpr,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERIES: tl.constexpr, KERNELS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of queries of one head of one image."""
    blocks = tl.cdiv(T, QUERIES)
    pair = tl.program_id(0) // blocks
    image, head = (pair // heads).to(tl.int64), pair % heads
    i = (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    in_i = i < T
    tile_q = load_rows(q + image * q_image + head * q_head, i, q_row, in_i, WIDTH_QK, BLOCK_QK)
    gain = tl.load(rows + i, mask=in_i, other=0.0)
    shift = tl.load(rows + T + i, mask=in_i, other=0.0)
    at_i = place(i, prefix, width, span)
    channel, column = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    anchor = tl.zeros((QUERIES,), tl.float32)
    if CENTRED:
        average = tl.load(mean_key + pair * WIDTH_QK + channel, mask=channel < WIDTH_QK, other=0.0)
        anchor = tl.sum(tile_q.to(tl.float32) * average[None, :], 1) * scale * gain + shift
    sums = tl.zeros((QUERIES, BLOCK_V), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    squares = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, n, KERNELS):
        j = start + tl.arange(0, KERNELS)
        in_j = j < n
        tile_k = load_rows(key + image * k_image + head * k_head, j, k_row, in_j, WIDTH_QK, BLOCK_QK)
        tile_v = load_rows(value + image * v_image + head * v_head, j, v_row, in_j, WIDTH_V, BLOCK_V)
        inside = in_i[:, None] & in_j[None, :]
        s = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
        if TABLE:
            at_j = place(j, prefix, width, span)
            s += positions(entries + head * entry_row, inside, i, j, at_i, at_j, prefix, centre, count, PREFIX)
        t = tl.where(inside, s * gain[:, None] + shift[:, None] - anchor[:, None], 0.0)
        total += tl.sum(t, 1)
        squares += tl.sum(t * t, 1)
        sums += tl.dot(t.to(tile_v.dtype), tile_v, input_precision=PRECISION)
    mean = total / n
    variance = squares / n
    if CENTRED:
        variance = tl.maximum(variance - mean * mean, 0.0)
        average = tl.load(mean_value + pair * WIDTH_V + column, mask=column < WIDTH_V, other=0.0)
        sums -= (total[:, None]) * average[None, :]
    inverse = 1.0 / tl.sqrt(variance + eps)
    weight = tl.load(rows + 2 * T + i, mask=in_i, other=0.0)
    o = sums * (weight * inverse)[:, None]
    store_rows(out + image * o_image + head * o_head, i, o_row, in_i, o, WIDTH_V, BLOCK_V)
    at = pair.to(tl.int64) * T + i
    tl.store(stats + at, (anchor + mean) if CENTRED else anchor, mask=in_i)
    tl.store(stats + total_rows + at, inverse, mask=in_i)


@torch.library.custom_op("kernelbank::moments_attention", mutates_args=())
def moments_attention(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, prefix: int, width: int,
    sides: list[int], centred: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, h, T, d), and mu and 1 / sigma as (2, B, h, T) in float32 or wider, which get no gradient.

    LayerNorm over the kernels where `centred`, else RMSNorm. The other arguments are those of `pointwise_attention`;
    every kernel is visible.
    """
    layout = Layout.of(prefix, width, sides)
    if not launches(q):
        made = token_major(q, value.shape[3])
        o, mean, inverse = naive(q, key, value, entries, rows, layout, centred, scale)
        return made.copy_(o), torch.stack([mean, inverse])
    (B, h, T, e), (n, d) = q.shape, value.shape[2:]
    out, tile = token_major(q, d), tiling(max(e, d), q.dtype.itemsize == 2, T, n)
    stats = torch.empty(2, B, h, T, dtype=torch.float32, device=q.device)
    q, key, value = by_channel(q), by_channel(key), by_channel(value)
    entries = None if entries is None else entries.contiguous()
    means = [t.mean(2, dtype=torch.float32).contiguous() for t in (key, value)]
    with on_device(q):
        forward_kernel[(-(-T // tile.queries) * B * h,)](
            q, key, value, q if entries is None else entries, rows, *means, out, stats,
            *strides(q), *strides(key), *strides(value), *strides(out), B * h * T, h, T, n, scale, EPS, prefix, width,
            layout.span, layout.centre, layout.count, 0 if entries is None else entries.shape[1],
            CENTRED=centred, PREFIX=prefix > 0, QUERIES=tile.queries, KERNELS=tile.kernels, num_warps=tile.warps,
            num_stages=tile.stages, **constants(e, d, "moments", entries, None, q),
        )  # fmt: skip
    return out, stats


@moments_attention.register_fake
def _(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, prefix: int, width: int,
    sides: list[int], centred: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(q.dtype, torch.float32)
    return token_major(q, value.shape[3]), q.new_empty((2, *q.shape[:3]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, key, value, entries, rows, prefix, width, sides, centred, scale = inputs
    ctx.centred = centred
    save_inputs(ctx, (q, key, value, entries, rows, None, prefix, width, sides, "moments", scale), output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, key, value, entries, rows, _regions, out, stats = ctx.saved_tensors
    if differentiated(grad):
        layout = Layout.of(*ctx.where)

        def function(q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None) -> Tensor:
            return naive(q, key, value, entries, rows, layout, ctx.centred, ctx.scale)[0]

        return *gradients(function, (q, key, value, entries), ctx.needs_input_grad[:4], grad), *(None,) * 6
    with torch.no_grad():
        d_o, weight = grad.to(stats.dtype), rows[2].to(stats.dtype)
        first = torch.zeros_like(stats[0])
        if ctx.centred:
            first = (d_o @ value.mean(2, dtype=stats.dtype)[..., None])[..., 0] * weight
        second = (d_o * out).sum(-1) / key.shape[2]
        statistics = torch.cat([stats, first[None], second[None]])
    d_q, d_key, d_value, d_entries = attention_gradients(
        grad, q, key, value, entries, rows, None, statistics, *ctx.where, "moments", ctx.scale
    )
    return d_q, d_key, d_value, None if entries is None else d_entries, *(None,) * 6


moments_attention.register_autograd(_backward, setup_context=_save)
