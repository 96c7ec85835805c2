"""The gradients of `pointwise` and `moments` for q, k and v: the scores are computed again, tile by tile, so that
training keeps nothing of size N x N.

With d_a = dO v^T and d_s = g w f'(s) d_a: dq = scale d_s k, dk = scale d_s^T q, dv = (w f(s))^T dO, and the gradient
of p is d_s, which `table` sums by offset. `tiles.differentiate` has f' and the form of "moments".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelbank.ops.kernels.launch import jit, launches, on_device, tl
from kernelbank.ops.kernels.layout import (
    ACTIVATIONS,
    SLOPES,
    Layout,
    by_channel,
    constants,
    scores,
    strides,
    tiling,
    token_major,
    visible,
)
from kernelbank.ops.kernels.table import table_gradient
from kernelbank.ops.kernels.tiles import (
    differentiate,
    load_rows,
    load_statistics,
    place,
    positions,
    seen,
    store_rows,
)


def naive(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None,
    stats: Tensor | None, layout: Layout, act: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with the whole map of scores."""
    i, j = (torch.arange(t.shape[2], device=t.device) for t in (q, key))
    a, d_s = slopes(grad, q, key, value, entries, rows, regions, stats, layout, act, scale, i, j)
    d_entries = q.new_zeros(0)
    if entries is not None:
        index = layout.index(i, j).flatten()
        d_entries = torch.zeros_like(entries).index_add_(1, index, d_s.sum(0).flatten(1).to(entries.dtype))
    return d_s @ key * scale, d_s.mT @ q * scale, a.mT @ grad, d_entries


def slopes(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None,
    stats: Tensor | None, layout: Layout, act: str, scale: float, i: Tensor, j: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(w f(s), d_s) of the queries `i` and the kernels `j`, (B, h, queries, kernels), in plain torch."""
    s = scores(q, key, entries, rows, layout, scale, i, j)
    d_a = grad[:, :, i] @ value[:, :, j].mT
    gain, _, weight = rows.to(s.dtype)[:, i, None]
    if stats is None:
        a, d_s = ACTIVATIONS[act](s) * weight, SLOPES[act](s) * d_a * weight
    else:
        mean, inverse, first, second = stats.to(s.dtype)[:, :, :, i, None]
        y = (s - mean) * inverse
        a, d_s = y * weight, inverse * (weight * d_a - first - y * second)
    mask = visible(regions, i, j)
    hide = (lambda t: t) if mask is None else (lambda t: torch.where(mask, t, 0))
    return hide(a), hide(d_s * gain)


@jit
def queries_kernel(
    grad, q, key, value, entries, rows, regions, stats, d_q,
    g_image, g_head, g_row, q_image, q_head, q_row, k_image, k_head, k_row,
    v_image, v_head, v_row, o_image, o_head, o_row, total, heads, T,
    n, scale, prefix, width, span, centre, count, entry_row,
    ACT: tl.constexpr, TABLE: tl.constexpr, PREFIX: tl.constexpr, REGIONS: tl.constexpr, WIDTH_QK: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, KERNELS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """dq of one tile of queries."""
    blocks = tl.cdiv(T, QUERIES)
    pair = tl.program_id(0) // blocks
    image, head = (pair // heads).to(tl.int64), pair % heads
    i = (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    in_i = i < T
    tile_q = load_rows(q + image * q_image + head * q_head, i, q_row, in_i, WIDTH_QK, BLOCK_QK)
    tile_g = load_rows(grad + image * g_image + head * g_head, i, g_row, in_i, WIDTH_V, BLOCK_V)
    gain = tl.load(rows + i, mask=in_i, other=0.0)
    shift = tl.load(rows + T + i, mask=in_i, other=0.0)
    weight = tl.load(rows + 2 * T + i, mask=in_i, other=0.0)
    mean, inverse, first, second = load_statistics(stats, pair.to(tl.int64) * T + i, in_i, total, gain, ACT)
    region_i = tl.load(regions + i, mask=in_i, other=-2) if REGIONS else i
    at_i = place(i, prefix, width, span)
    sums = tl.zeros((QUERIES, BLOCK_QK), tl.float32)
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
        s = s * gain[:, None] + shift[:, None]
        d_a = tl.dot(tile_g, tl.trans(tile_v), input_precision=PRECISION)
        _a, d_s = differentiate(s, d_a, sees, gain, weight, mean, inverse, first, second, ACT)
        sums += tl.dot(d_s.to(tile_k.dtype), tile_k, input_precision=PRECISION)
    store_rows(d_q + image * o_image + head * o_head, i, o_row, in_i, sums * scale, WIDTH_QK, BLOCK_QK)


@jit
def kernels_kernel(
    grad, q, key, value, entries, rows, regions, stats, d_key,
    d_value, g_image, g_head, g_row, q_image, q_head, q_row, k_image,
    k_head, k_row, v_image, v_head, v_row, a_image, a_head, a_row,
    b_image, b_head, b_row, total, heads, T, n, scale, prefix, width,
    span, centre, count, entry_row,
    ACT: tl.constexpr, TABLE: tl.constexpr, PREFIX: tl.constexpr, REGIONS: tl.constexpr, WIDTH_QK: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, KERNELS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """dk and dv of one tile of kernels."""
    blocks = tl.cdiv(n, KERNELS)
    pair = tl.program_id(0) // blocks
    image, head = (pair // heads).to(tl.int64), pair % heads
    j = (tl.program_id(0) % blocks) * KERNELS + tl.arange(0, KERNELS)
    in_j = j < n
    tile_k = load_rows(key + image * k_image + head * k_head, j, k_row, in_j, WIDTH_QK, BLOCK_QK)
    tile_v = load_rows(value + image * v_image + head * v_head, j, v_row, in_j, WIDTH_V, BLOCK_V)
    region_j = tl.load(regions + j, mask=in_j, other=-2) if REGIONS else j
    at_j = place(j, prefix, width, span)
    sums_k = tl.zeros((KERNELS, BLOCK_QK), tl.float32)
    sums_v = tl.zeros((KERNELS, BLOCK_V), tl.float32)
    for start in range(0, T, QUERIES):
        i = start + tl.arange(0, QUERIES)
        in_i = i < T
        tile_q = load_rows(q + image * q_image + head * q_head, i, q_row, in_i, WIDTH_QK, BLOCK_QK)
        tile_g = load_rows(grad + image * g_image + head * g_head, i, g_row, in_i, WIDTH_V, BLOCK_V)
        gain = tl.load(rows + i, mask=in_i, other=0.0)
        shift = tl.load(rows + T + i, mask=in_i, other=0.0)
        weight = tl.load(rows + 2 * T + i, mask=in_i, other=0.0)
        mean, inverse, first, second = load_statistics(stats, pair.to(tl.int64) * T + i, in_i, total, gain, ACT)
        region_i = tl.load(regions + i, mask=in_i, other=-2) if REGIONS else i
        sees = seen(in_i[:, None] & in_j[None, :], region_i, region_j, REGIONS)
        s = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
        if TABLE:
            at_i = place(i, prefix, width, span)
            s += positions(entries + head * entry_row, sees, i, j, at_i, at_j, prefix, centre, count, PREFIX)
        s = s * gain[:, None] + shift[:, None]
        d_a = tl.dot(tile_g, tl.trans(tile_v), input_precision=PRECISION)
        a, d_s = differentiate(s, d_a, sees, gain, weight, mean, inverse, first, second, ACT)
        sums_v += tl.dot(tl.trans(a.to(tile_g.dtype)), tile_g, input_precision=PRECISION)
        sums_k += tl.dot(tl.trans(d_s.to(tile_q.dtype)), tile_q, input_precision=PRECISION)
    store_rows(d_key + image * a_image + head * a_head, j, a_row, in_j, sums_k * scale, WIDTH_QK, BLOCK_QK)
    store_rows(d_value + image * b_image + head * b_head, j, b_row, in_j, sums_v, WIDTH_V, BLOCK_V)


@torch.library.custom_op("kernelbank::attention_gradients", mutates_args=())
def attention_gradients(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None,
    stats: Tensor | None, prefix: int, width: int, sides: list[int], act: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, d entries) for the gradient of o; the last is empty without a table. `stats` (4, B, h, T) of
    "moments" are mu, 1 / sigma and the two means of `tiles.differentiate`."""
    layout, made = Layout.of(prefix, width, sides), _room(q, key, value)
    if not launches(q):
        found = naive(grad, q, key, value, entries, rows, regions, stats, layout, act, scale)
        return *(room.copy_(t) for room, t in zip(made, found, strict=False)), found[3]  # type: ignore[return-value]
    (B, h, T, e), (n, d) = q.shape, value.shape[2:]
    grad, q, key, value = by_channel(grad), by_channel(q), by_channel(key), by_channel(value)
    entries = None if entries is None else entries.contiguous()
    tile = tiling(max(e, d), q.dtype.itemsize == 2, T, n, backward=True)
    tensors = (
        grad, q, key, value, q if entries is None else entries, rows, rows if regions is None else regions,
        rows if stats is None else stats.contiguous(),
    )  # fmt: skip
    at = (*strides(grad), *strides(q), *strides(key), *strides(value))
    numbers = (B * h * T, h, T, n, scale, prefix, width, layout.span, layout.centre, layout.count,
               0 if entries is None else entries.shape[1])  # fmt: skip
    options: dict[str, Any] = dict(
        PREFIX=prefix > 0, num_warps=tile.warps, num_stages=tile.stages, **constants(e, d, act, entries, regions, q)
    )
    d_q, d_key, d_value = made
    with on_device(q):
        queries_kernel[(-(-T // tile.queries) * B * h,)](
            *tensors, d_q, *at, *strides(d_q), *numbers, QUERIES=tile.queries, KERNELS=tile.kernels, **options
        )
        kernels_kernel[(-(-n // tile.queries) * B * h,)](
            *tensors, d_key, d_value, *at, *strides(d_key), *strides(d_value), *numbers, QUERIES=tile.kernels,
            KERNELS=tile.queries, **options
        )  # fmt: skip
    if entries is None:
        return d_q, d_key, d_value, q.new_empty(0)
    d_entries = table_gradient(grad, q, key, value, entries, rows, regions, stats, layout, act, scale)
    if prefix:
        d_entries = torch.cat([d_entries, _prefix_gradient(*tensors[:6], regions, stats, layout, act, scale)], 1)
    return d_q, d_key, d_value, d_entries.to(entries.dtype)


@attention_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None,
    stats: Tensor | None, prefix: int, width: int, sides: list[int], act: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return *_room(q, key, value), q.new_empty(0) if entries is None else torch.empty_like(entries)


def _room(q: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return token_major(q, q.shape[3]), token_major(key, key.shape[3]), token_major(value, value.shape[3])


def _prefix_gradient(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor, rows: Tensor, regions: Tensor | None,
    stats: Tensor | None, layout: Layout, act: str, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of the three entries of the prefix, (h, 3): 2 P T scores per head, in plain torch and float32."""
    grad, q, key, value = grad.float(), q.float(), key.float(), value.float()
    P, tokens = layout.prefix, torch.arange(q.shape[2], device=q.device)
    before, after = tokens[:P], tokens[P:]

    def total(i: Tensor, j: Tensor) -> Tensor:
        d_s = slopes(grad, q, key, value, entries, rows, regions, stats, layout, act, scale, i, j)[1]
        return d_s.sum((0, 2, 3))

    return torch.stack([total(before, after), total(after, before), total(before, before)], 1)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor] | None) -> None:
    """Keep what the backward pass needs of the arguments of `pointwise_attention`, and of an output with statistics."""
    *tensors, prefix, width, sides, act, scale = inputs
    ctx.where, ctx.act, ctx.scale = (prefix, width, sides), act, scale
    ctx.save_for_backward(*tensors, *((None,) if output is None else output))
