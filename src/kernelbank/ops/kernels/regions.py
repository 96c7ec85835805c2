"""Attention inside small regions, Swin's windows (arXiv 2103.14030): one program holds all scores of one head of one
region, so that any activation over the kernels of a query is possible, softmax and LayerNorm among them.

Tokens are read where they lie: `members` (R, L) names the token in each of the L cells of a region's frame, -1 where
the frame reaches over the border. The frame has rows of `side` cells, so that an offset between two cells is the same
in every region. The backward kernel walks over the regions of all images, writes dq, dk and dv of each, and sums d_s
by cell for the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelbank.ops.kernels.launch import block, jit, launches, on_device, parts, tl
from kernelbank.ops.kernels.layout import ACTIVATIONS, EPS, SLOPES, Layout, by_channel, constants, strides, token_major
from kernelbank.ops.kernels.tiles import activate, load_rows, place, slope, store_rows
from kernelbank.ops.transforms import differentiated, gradients

MOST_CELLS = 64
"""The most cells of a region: a program holds their scores in registers, and those of 128 x 128 do not fit."""
ROWWISE = ("softmax", "layernorm")
"""Activations over all kernels of a query, beside the pointwise ones."""


def naive(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, members: Tensor, side: int,
    sides: list[int], act: str, scale: float,
) -> Tensor:  # fmt: skip
    """The same by gathered regions."""
    at = members.clamp(min=0)
    s, visible, _ = _naive_scores(q[:, :, at], key[:, :, at], entries, rows, members, side, sides, scale)
    o = _activated(s, visible, act) @ value[:, :, at] * rows.to(s.dtype)[2, at, None]
    return _to_tokens(o, members)


def naive_gradients(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, members: Tensor,
    side: int, sides: list[int], act: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, d entries) by gathered regions."""
    at = members.clamp(min=0)
    q_R, k_R, v_R, g_R = (t[:, :, at] for t in (q, key, value, grad))
    s, visible, gain = _naive_scores(q_R, k_R, entries, rows, members, side, sides, scale)
    a, weight = _activated(s, visible, act), rows.to(s.dtype)[2, at, None]
    d_a = torch.where(visible, g_R @ v_R.mT * weight, 0)
    if act == "softmax":
        d_s = a * (d_a - (d_a * a).sum(-1, keepdim=True))
    elif act == "layernorm":
        n = visible.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(visible, s, 0).sum(-1, keepdim=True) / n
        inverse = (torch.where(visible, s - mean, 0).square().sum(-1, keepdim=True) / n + EPS).rsqrt()
        d_s = inverse * (d_a - d_a.sum(-1, keepdim=True) / n - a * ((d_a * a).sum(-1, keepdim=True) / n))
    else:
        d_s = d_a * SLOPES[act](s)
    d_s = torch.where(visible, d_s * gain, 0)
    d_entries = q.new_zeros(0)
    if entries is not None:
        cells = torch.arange(members.shape[1], device=q.device)
        index = Layout.of(0, side, sides).index(cells, cells).flatten()
        d_entries = torch.zeros_like(entries).index_add_(1, index, d_s.sum((0, 2)).flatten(1).to(entries.dtype))
    found = (d_s @ k_R * scale, d_s.mT @ q_R * scale, (a * weight).mT @ g_R)
    return *(_to_tokens(t, members) for t in found), d_entries  # type: ignore[return-value]


def _naive_scores(
    q_R: Tensor, k_R: Tensor, entries: Tensor | None, rows: Tensor, members: Tensor, side: int, sides: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(s (B, h, R, L, L), what is visible (R, L, L), g) of gathered regions."""
    inside, at = members >= 0, members.clamp(min=0)
    s = q_R @ k_R.mT * scale
    if entries is not None:
        cells = torch.arange(members.shape[1], device=q_R.device)
        s = s + entries[:, Layout.of(0, side, sides).index(cells, cells)].to(s.dtype)[None, :, None]
    gain, shift, _ = rows.to(s.dtype)[:, at, None]
    return s * gain + shift, inside[:, None] & inside[:, :, None], gain


def _to_tokens(x: Tensor, members: Tensor) -> Tensor:
    """(B, h, R, L, d) of regions as (B, h, T, d): every token lies in one cell."""
    order = members.flatten().argsort(stable=True)  # empty cells come first
    tokens = int((members >= 0).sum())
    return x.flatten(2, 3).index_select(2, order[members.numel() - tokens :])


def _activated(s: Tensor, visible: Tensor, act: str) -> Tensor:
    """f(s) over the last axis, zero where nothing is visible."""
    if act == "softmax":
        return torch.where(visible, torch.where(visible, s, -torch.inf).softmax(-1), 0)
    if act == "layernorm":
        n = visible.sum(-1, keepdim=True).clamp(min=1)
        centred = torch.where(visible, s - torch.where(visible, s, 0).sum(-1, keepdim=True) / n, 0)
        return centred * (centred.square().sum(-1, keepdim=True) / n + EPS).rsqrt()
    return torch.where(visible, ACTIVATIONS[act](s), 0)


@jit
def region_scores(
    tile_q, tile_k, entries, rows, token, inside, at, T, scale, centre,
    TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(s, visible pairs, g, w) of a region."""
    sees = inside[:, None] & inside[None, :]
    s = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale
    if TABLE:
        index = at[:, None] - at[None, :] + centre
        s += tl.load(entries + index, mask=sees, other=0.0).to(tl.float32)
    gain = tl.load(rows + token, mask=inside, other=0.0)
    shift = tl.load(rows + T + token, mask=inside, other=0.0)
    weight = tl.load(rows + 2 * T + token, mask=inside, other=0.0)
    return s * gain[:, None] + shift[:, None], sees, gain, weight


@jit
def activate_region(s, sees, n, eps, ACT: tl.constexpr):
    """(f(s), 1 / sigma of "layernorm")."""
    if ACT == "softmax":
        top = tl.max(tl.where(sees, s, -1e30), 1)
        e = tl.where(sees, tl.exp(s - top[:, None]), 0.0)
        return e / tl.maximum(tl.sum(e, 1), 1e-30)[:, None], top
    elif ACT == "layernorm":
        mean = tl.sum(tl.where(sees, s, 0.0), 1) / n
        centred = tl.where(sees, s - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / n + eps)
        return centred * inverse[:, None], inverse
    else:
        return tl.where(sees, activate(s, ACT), 0.0), tl.sum(s, 1)


@jit
def forward_kernel(
    q, key, value, entries, rows, members, out,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    o_image, o_head, o_row, heads, regions, length, T, scale, eps,
    side, span, centre, entry_row,
    ACT: tl.constexpr, TABLE: tl.constexpr, REGIONS: tl.constexpr, WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, CELLS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One head of one region of one image."""
    head = tl.program_id(0) % heads
    region = (tl.program_id(0) // heads) % regions
    image = (tl.program_id(0) // (heads * regions)).to(tl.int64)
    cell = tl.arange(0, CELLS)
    token = tl.load(members + region * length + cell, mask=cell < length, other=-1)
    inside = token >= 0
    tile_q = load_rows(q + image * q_image + head * q_head, token, q_row, inside, WIDTH_QK, BLOCK_QK)
    tile_k = load_rows(key + image * k_image + head * k_head, token, k_row, inside, WIDTH_QK, BLOCK_QK)
    tile_v = load_rows(value + image * v_image + head * v_head, token, v_row, inside, WIDTH_V, BLOCK_V)
    at = place(cell, 0, side, span)
    s, sees, _gain, weight = region_scores(
        tile_q, tile_k, entries + head * entry_row, rows, token, inside, at, T, scale, centre, TABLE, PRECISION
    )
    n = tl.maximum(tl.sum(inside.to(tl.float32), 0), 1.0)
    a, _inverse = activate_region(s, sees, n, eps, ACT)
    o = tl.dot(a.to(tile_v.dtype), tile_v, input_precision=PRECISION) * weight[:, None]
    store_rows(out + image * o_image + head * o_head, token, o_row, inside, o, WIDTH_V, BLOCK_V)


@jit
def backward_kernel(
    grad, q, key, value, entries, rows, members, d_q, d_key, d_value,
    partial, g_image, g_head, g_row, q_image, q_head, q_row, k_image,
    k_head, k_row, v_image, v_head, v_row, a_image, a_head, a_row, b_image,
    b_head, b_row, c_image, c_head, c_row, items, splits, heads, regions,
    length, T, scale, eps, side, span, centre, entry_row,
    ACT: tl.constexpr, TABLE: tl.constexpr, REGIONS: tl.constexpr, WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, CELLS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One head of a share of all regions of all images; `partial` (splits, h, CELLS, CELLS) is the sum of d_s."""
    program = tl.program_id(0)
    head, split = program % heads, program // heads
    share = tl.cdiv(items, splits)
    cell = tl.arange(0, CELLS)
    at = place(cell, 0, side, span)
    sums = tl.zeros((CELLS, CELLS), tl.float32)
    for item in range(split * share, tl.minimum((split + 1) * share, items)):
        region, image = item % regions, (item // regions).to(tl.int64)
        token = tl.load(members + region * length + cell, mask=cell < length, other=-1)
        inside = token >= 0
        tile_q = load_rows(q + image * q_image + head * q_head, token, q_row, inside, WIDTH_QK, BLOCK_QK)
        tile_k = load_rows(key + image * k_image + head * k_head, token, k_row, inside, WIDTH_QK, BLOCK_QK)
        tile_v = load_rows(value + image * v_image + head * v_head, token, v_row, inside, WIDTH_V, BLOCK_V)
        tile_g = load_rows(grad + image * g_image + head * g_head, token, g_row, inside, WIDTH_V, BLOCK_V)
        s, sees, gain, weight = region_scores(
            tile_q, tile_k, entries + head * entry_row, rows, token, inside, at, T, scale, centre, TABLE, PRECISION
        )
        n = tl.maximum(tl.sum(inside.to(tl.float32), 0), 1.0)
        a, inverse = activate_region(s, sees, n, eps, ACT)
        d_a = tl.dot(tile_g, tl.trans(tile_v), input_precision=PRECISION) * weight[:, None]
        if ACT == "softmax":
            d_s = a * (d_a - tl.sum(d_a * a, 1)[:, None])
        elif ACT == "layernorm":
            d_a = tl.where(sees, d_a, 0.0)
            d_s = inverse[:, None] * (d_a - (tl.sum(d_a, 1) / n)[:, None] - a * (tl.sum(d_a * a, 1) / n)[:, None])
        else:
            d_s = d_a * slope(s, ACT)
        d_s = tl.where(sees, d_s * gain[:, None], 0.0)
        low = d_s.to(tile_k.dtype)
        weighted = (a * weight[:, None]).to(tile_g.dtype)
        of_q = tl.dot(low, tile_k, input_precision=PRECISION) * scale
        of_k = tl.dot(tl.trans(low), tile_q, input_precision=PRECISION) * scale
        of_v = tl.dot(tl.trans(weighted), tile_g, input_precision=PRECISION)
        store_rows(d_q + image * a_image + head * a_head, token, a_row, inside, of_q, WIDTH_QK, BLOCK_QK)
        store_rows(d_key + image * b_image + head * b_head, token, b_row, inside, of_k, WIDTH_QK, BLOCK_QK)
        store_rows(d_value + image * c_image + head * c_head, token, c_row, inside, of_v, WIDTH_V, BLOCK_V)
        sums += d_s
    if TABLE:
        pair = cell[:, None] * CELLS + cell[None, :]
        tl.store(partial + program.to(tl.int64) * CELLS * CELLS + pair, sums)


@torch.library.custom_op("kernelbank::region_attention", mutates_args=())
def region_attention(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, members: Tensor, side: int,
    sides: list[int], act: str, scale: float,
) -> Tensor:  # fmt: skip
    """o (B, h, T, d) of q and key (B, h, T, e) and value (B, h, T, d).

    Args:
        entries: The flattened relative tables, (h, (2a-1)(2b-1)), or None.
        rows: g, c and w per query, (3, T) in float32 (`tiles`). They get no gradient.
        members: The token in each cell of each region, (R, L) int32, -1 where there is none; every token once.
        side: The cells of a row of a region's frame.
        sides: (a, b) of the table.
        act: A key of `layout.ACTIVATIONS`, or one of `ROWWISE`.
        scale: What q k^T is multiplied by.
    """
    out = token_major(q, value.shape[3])
    if not launches(q):
        return out.copy_(naive(q, key, value, entries, rows, members, side, sides, act, scale))
    (B, h, T, e), d, (R, L) = q.shape, value.shape[3], members.shape
    q, key, value = by_channel(q), by_channel(key), by_channel(value)
    entries, layout = None if entries is None else entries.contiguous(), Layout.of(0, side, sides)
    with on_device(q):
        forward_kernel[(B * R * h,)](
            q, key, value, q if entries is None else entries, rows, members, out, *strides(q), *strides(key),
            *strides(value), *strides(out), h, R, L, T, scale, EPS, side, layout.span, layout.centre, layout.count,
            CELLS=block(L, MOST_CELLS), num_warps=4, num_stages=1, **constants(e, d, act, entries, None, q),
        )  # fmt: skip
    return out


@region_attention.register_fake
def _(
    q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, members: Tensor, side: int,
    sides: list[int], act: str, scale: float,
) -> Tensor:  # fmt: skip
    return token_major(q, value.shape[3])


@torch.library.custom_op("kernelbank::region_gradients", mutates_args=())
def region_gradients(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, members: Tensor,
    side: int, sides: list[int], act: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, d entries) for the gradient of o; the last is empty without a table."""
    rooms = tuple(token_major(t, t.shape[3]) for t in (q, key, value))
    if not launches(q):
        found = naive_gradients(grad, q, key, value, entries, rows, members, side, sides, act, scale)
        return *(room.copy_(t) for room, t in zip(rooms, found, strict=False)), found[3]  # type: ignore[return-value]
    (B, h, T, e), d, (R, L) = q.shape, value.shape[3], members.shape
    grad, q, key, value = by_channel(grad), by_channel(q), by_channel(key), by_channel(value)
    entries, layout = None if entries is None else entries.contiguous(), Layout.of(0, side, sides)
    cells = block(L, MOST_CELLS)
    splits = parts(B * R, h, q)
    partial = torch.empty(splits, h, cells, cells, dtype=torch.float32, device=q.device)
    with on_device(q):
        backward_kernel[(splits * h,)](
            grad, q, key, value, q if entries is None else entries, rows, members, *rooms, partial, *strides(grad),
            *strides(q), *strides(key), *strides(value), *(stride for room in rooms for stride in strides(room)),
            B * R, splits, h, R, L, T, scale, EPS, side, layout.span, layout.centre, layout.count, CELLS=cells,
            num_warps=8, num_stages=1, **constants(e, d, act, entries, None, q),
        )  # fmt: skip
    if entries is None:
        return *rooms, q.new_empty(0)  # type: ignore[return-value]
    cell = torch.arange(L, device=q.device)
    d_s = partial.sum(0)[:, :L, :L].flatten(1)
    table = torch.zeros(h, layout.count, dtype=torch.float32, device=q.device)
    table.index_add_(1, layout.index(cell, cell).flatten(), d_s)
    return *rooms, table.to(entries.dtype)  # type: ignore[return-value]


@region_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, members: Tensor,
    side: int, sides: list[int], act: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_key, d_value = (token_major(t, t.shape[3]) for t in (q, key, value))
    return d_q, d_key, d_value, q.new_empty(0) if entries is None else torch.empty_like(entries)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, side, sides, act, scale = inputs
    ctx.where = (side, sides, act, scale)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, key, value, entries, rows, members = ctx.saved_tensors
    if differentiated(grad):

        def function(q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None) -> Tensor:
            return naive(q, key, value, entries, rows, members, *ctx.where)

        return *gradients(function, (q, key, value, entries), ctx.needs_input_grad[:4], grad), *(None,) * 6
    d_q, d_key, d_value, d_entries = region_gradients(grad, q, key, value, entries, rows, members, *ctx.where)
    return d_q, d_key, d_value, None if entries is None else d_entries, *(None,) * 6


region_attention.register_autograd(_backward, setup_context=_save)
