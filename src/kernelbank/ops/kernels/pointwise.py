"""Attention with a pointwise activation, o_i = w_i sum_j f(g_i (scale q_i . k_j + p_ij) + c_i) v_j, in one pass over
the kernels: a pointwise activation needs no maximum and no second pass, and no N x N tensor is formed.

A program computes a tile of queries of one head. It reads p from the head's table, accumulates in float32, and
applies w to the sum. arXiv 2309.08586 (ReLU), 2409.04431 (sigmoid).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelbank.ops.kernels.gradients import attention_gradients, save_inputs
from kernelbank.ops.kernels.launch import jit, launches, on_device, tl
from kernelbank.ops.kernels.layout import (
    ACTIVATIONS,
    Layout,
    by_channel,
    constants,
    scores,
    strides,
    tiling,
    token_major,
    visible,
)
from kernelbank.ops.kernels.tiles import activate, load_rows, place, positions, seen, store_rows
from kernelbank.ops.transforms import differentiated, gradients


def naive(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None, layout: Layout,
    act: str, scale: float,
) -> Tensor:  # fmt: skip
    """The same with the whole map of scores."""
    i, j = (torch.arange(t.shape[2], device=t.device) for t in (q, key))
    a = ACTIVATIONS[act](scores(q, key, entries, rows, layout, scale, i, j))
    mask = visible(regions, i, j)
    a = a if mask is None else torch.where(mask, a, 0)
    return a @ value * rows[2].to(q.dtype)[:, None]


@jit
def forward_kernel(
    q, key, value, entries, rows, regions, out,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    o_image, o_head, o_row, heads, T, n, scale, prefix, width, span,
    centre, count, entry_row,
    ACT: tl.constexpr, TABLE: tl.constexpr, PREFIX: tl.constexpr, REGIONS: tl.constexpr, WIDTH_QK: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, KERNELS: tl.constexpr,
    PRECISION: tl.constexpr,
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
    region_i = tl.load(regions + i, mask=in_i, other=-2) if REGIONS else i
    at_i = place(i, prefix, width, span)
    sums = tl.zeros((QUERIES, BLOCK_V), tl.float32)
    for start in range(0, n, KERNELS):
        j = start + tl.arange(0, KERNELS)
        in_j = j < n
        tile_k = load_rows(key + image * k_image + head * k_head, j, k_row, in_j, WIDTH_QK, BLOCK_QK)
        tile_v = load_rows(value + image * v_image + head * v_head, j, v_row, in_j, WIDTH_V, BLOCK_V)
        region_j = tl.load(regions + j, mask=in_j, other=-2) if REGIONS else j
        sees = seen(in_i[:, None] & in_j[None, :], region_i, region_j, REGIONS)
        s = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
        if TABLE:
            at_j = place(j, prefix, width, span)
            s += positions(entries + head * entry_row, sees, i, j, at_i, at_j, prefix, centre, count, PREFIX)
        a = tl.where(sees, activate(s * gain[:, None] + shift[:, None], ACT), 0.0)
        sums += tl.dot(a.to(tile_v.dtype), tile_v, input_precision=PRECISION)
    weight = tl.load(rows + 2 * T + i, mask=in_i, other=0.0)
    store_rows(out + image * o_image + head * o_head, i, o_row, in_i, sums * weight[:, None], WIDTH_V, BLOCK_V)


@torch.library.custom_op("kernelbank::pointwise_attention", mutates_args=())
def pointwise_attention(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None, prefix: int,
    width: int, sides: list[int], act: str, scale: float,
) -> Tensor:  # fmt: skip
    """o (B, h, T, d) of q (B, h, T, e), key (B, h, n, e) and value (B, h, n, d).

    Args:
        entries: The flattened relative tables, (h, (2a-1)(2b-1)), with three more entries for the prefix if there is
            one; needs n = T. None without a relative position.
        rows: g, c and w per query, (3, T) in float32. They get no gradient.
        regions: The region of each token, (T,) int32, -1 for prefix tokens; None where every kernel is visible.
        prefix: P, the tokens before the grid.
        width: W of the grid.
        sides: (a, b) of the table.
        act: A key of `layout.ACTIVATIONS`.
        scale: What q k^T is multiplied by.
    """
    layout = Layout.of(prefix, width, sides)
    if not launches(q):
        made = token_major(q, value.shape[3])
        return made.copy_(naive(q, key, value, entries, rows, regions, layout, act, scale))
    (B, h, T, e), (n, d) = q.shape, value.shape[2:]
    out, tile = token_major(q, d), tiling(max(e, d), q.dtype.itemsize == 2, T, n)
    q, key, value = by_channel(q), by_channel(key), by_channel(value)
    entries = None if entries is None else entries.contiguous()
    with on_device(q):
        forward_kernel[(-(-T // tile.queries) * B * h,)](
            q, key, value, q if entries is None else entries, rows, rows if regions is None else regions, out,
            *strides(q), *strides(key), *strides(value), *strides(out), h, T, n, scale, prefix, width, layout.span,
            layout.centre, layout.count, 0 if entries is None else entries.shape[1],
            PREFIX=prefix > 0, QUERIES=tile.queries, KERNELS=tile.kernels, num_warps=tile.warps,
            num_stages=tile.stages, **constants(e, d, act, entries, regions, q),
        )  # fmt: skip
    return out


@pointwise_attention.register_fake
def _(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None, prefix: int,
    width: int, sides: list[int], act: str, scale: float,
) -> Tensor:  # fmt: skip
    return token_major(q, value.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs, None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, key, value, entries, rows, regions, _ = ctx.saved_tensors
    layout = Layout.of(*ctx.where)
    if differentiated(grad):

        def function(q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None) -> Tensor:
            return naive(q, key, value, entries, rows, regions, layout, ctx.act, ctx.scale)

        return *gradients(function, (q, key, value, entries), ctx.needs_input_grad[:4], grad), *(None,) * 7
    d_q, d_key, d_value, d_entries = attention_gradients(
        grad, q, key, value, entries, rows, regions, None, *ctx.where, ctx.act, ctx.scale
    )
    return d_q, d_key, d_value, None if entries is None else d_entries, *(None,) * 7


pointwise_attention.register_autograd(_backward, setup_context=_save)
