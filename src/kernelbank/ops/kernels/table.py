"""The gradient of a relative table, dp[y, x] = sum over images and pairs (i, j) at offset i - j = (y, x) of d_s,ij,
without an N x N tensor and without atomic additions.

A program takes the pairs of grid rows that lie y apart and sums their W x W blocks of d_s over images and rows in
registers; the diagonals of the sum are the entries of row y. Long rows are cut into blocks of columns. The depth-wise
operator has d_s = dO x^T ("product"); the others compute their scores again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelbank.ops.kernels.launch import block, jit, on_device, parts, tl
from kernelbank.ops.kernels.layout import Layout, constants, strides
from kernelbank.ops.kernels.tiles import differentiate, load_rows, load_statistics, seen

WIDEST = 64
"""Cells of a grid row that one program takes; half of it for wide heads and in float32, as registers are few."""


def naive(d_s: Tensor, layout: Layout) -> Tensor:
    """The gradient (h, entries) from d_s (B, h, N, N) of the grid."""
    cells = torch.arange(d_s.shape[-1], device=d_s.device)
    index = Layout(0, layout.width, layout.sides).index(cells, cells).flatten()
    return d_s.new_zeros(d_s.shape[1], layout.count).index_add_(1, index, d_s.sum(0).flatten(1))


@jit
def table_kernel(
    grad, q, key, value, entries, rows, regions, stats, partial,
    g_image, g_head, g_row, q_image, q_head, q_row, k_image, k_head, k_row,
    v_image, v_head, v_row, total, images, splits, heads, T, scale, prefix,
    height, width, span, above, beside, entry_row, reach, blocks,
    ACT: tl.constexpr, TABLE: tl.constexpr, REGIONS: tl.constexpr, WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, CELLS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The part of the images of one split that falls on one row of the table, of one head and one pair of column
    blocks, as 2 CELLS - 1 diagonals. `above` and `beside` are a - 1 and b - 1, `reach` the largest offset of rows."""
    program = tl.program_id(0)
    dy = program % (2 * reach + 1) - reach
    pair_of_blocks = (program // (2 * reach + 1)) % (blocks * blocks)
    head = (program // ((2 * reach + 1) * blocks * blocks)) % heads
    split = program // ((2 * reach + 1) * blocks * blocks * heads)
    x_i = (pair_of_blocks // blocks) * CELLS + tl.arange(0, CELLS)
    x_j = (pair_of_blocks % blocks) * CELLS + tl.arange(0, CELLS)
    in_i, in_j = x_i < width, x_j < width
    dx = x_i[:, None] - x_j[None, :]
    within = in_i[:, None] & in_j[None, :] & (dx <= beside) & (dx >= -beside)
    p = tl.zeros((CELLS, CELLS), tl.float32)
    if TABLE:
        index = (dy + above) * span + dx + beside
        p = tl.load(entries + head * entry_row + index, mask=within, other=0.0).to(tl.float32)
    first_y = tl.maximum(-dy, 0)
    lines = height - tl.abs(dy)
    share = tl.cdiv(images, splits)
    begin = split * share
    todo = tl.maximum(tl.minimum(share, images - begin), 0) * lines
    sums = tl.zeros((CELLS, CELLS), tl.float32)
    for step in range(0, todo):
        image = (begin + step // lines).to(tl.int64)
        y_j = first_y + step % lines
        i, j = prefix + (y_j + dy) * width + x_i, prefix + y_j * width + x_j
        tile_g = load_rows(grad + image * g_image + head * g_head, i, g_row, in_i, WIDTH_V, BLOCK_V)
        tile_v = load_rows(value + image * v_image + head * v_head, j, v_row, in_j, WIDTH_V, BLOCK_V)
        d_a = tl.dot(tile_g, tl.trans(tile_v), input_precision=PRECISION)
        if ACT == "product":
            sums += d_a
        else:
            tile_q = load_rows(q + image * q_image + head * q_head, i, q_row, in_i, WIDTH_QK, BLOCK_QK)
            tile_k = load_rows(key + image * k_image + head * k_head, j, k_row, in_j, WIDTH_QK, BLOCK_QK)
            gain = tl.load(rows + i, mask=in_i, other=0.0)
            shift = tl.load(rows + T + i, mask=in_i, other=0.0)
            weight = tl.load(rows + 2 * T + i, mask=in_i, other=0.0)
            at = (image * heads + head) * T + i
            mean, inverse, first, second = load_statistics(stats, at, in_i, total, gain, ACT)
            region_i = tl.load(regions + i, mask=in_i, other=-2) if REGIONS else i
            region_j = tl.load(regions + j, mask=in_j, other=-2) if REGIONS else j
            sees = seen(within, region_i, region_j, REGIONS)
            s = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION) * scale + p
            s = s * gain[:, None] + shift[:, None]
            _a, d_s = differentiate(s, d_a, sees, gain, weight, mean, inverse, first, second, ACT)
            sums += d_s
    sums = tl.where(within, sums, 0.0)
    # row r of `skewed` holds sums[r, c] at r - c + CELLS - 1, so that its columns are diagonals
    column = tl.arange(0, CELLS)[:, None] - tl.arange(0, 2 * CELLS)[None, :] + CELLS - 1
    exists = (column >= 0) & (column < CELLS)
    skewed = tl.gather(sums, tl.where(exists, column, 0), 1)
    diagonals = tl.sum(tl.where(exists, skewed, 0.0), 0)
    tl.store(partial + program.to(tl.int64) * (2 * CELLS) + tl.arange(0, 2 * CELLS), diagonals)


def table_gradient(
    grad: Tensor, q: Tensor, key: Tensor, value: Tensor, entries: Tensor | None, rows: Tensor, regions: Tensor | None,
    stats: Tensor | None, layout: Layout, act: str, scale: float,
) -> Tensor:  # fmt: skip
    """(h, (2a-1)(2b-1)) in float32, by the kernel. The arguments are those of `attention_gradients`; act "product" is
    d_s = dO v^T and reads neither q nor k."""
    (B, h, T, d), (a, b), width = grad.shape, layout.sides, layout.width
    height = (T - layout.prefix) // width
    cells = block(width, WIDEST if grad.dtype.itemsize == 2 and max(q.shape[3], d) <= 64 else WIDEST // 2)
    blocks, reach = -(-width // cells), min(height, a) - 1
    programs = (2 * reach + 1) * blocks * blocks * h
    splits = parts(B, programs, grad)
    partial = torch.empty(splits, h, blocks, blocks, 2 * reach + 1, 2 * cells, dtype=torch.float32, device=grad.device)
    tensors = (
        grad, q, key, value, grad if entries is None else entries, rows, rows if regions is None else regions,
        rows if stats is None else stats.contiguous(),
    )  # fmt: skip
    with on_device(grad):
        table_kernel[(splits * programs,)](
            *tensors, partial, *(stride for t in tensors[:4] for stride in strides(t)), B * h * T, B, splits, h, T,
            scale, layout.prefix, height, width, layout.span, a - 1, b - 1, 0 if entries is None else entries.shape[1],
            reach, blocks, CELLS=cells, num_warps=4, num_stages=2,
            **constants(q.shape[3], d, act, entries, regions, grad),
        )  # fmt: skip
    summed = partial[..., : 2 * cells - 1].sum(0)
    table = torch.zeros(h, 2 * a - 1, 2 * b - 1, dtype=torch.float32, device=grad.device)
    lines = table[:, a - 1 - reach : a + reach]
    for of_i in range(blocks):
        for of_j in range(blocks):
            start = (of_i - of_j) * cells - (cells - 1) + b - 1
            first, last = max(start, 0), min(start + 2 * cells - 1, 2 * b - 1)
            if first < last:
                lines[:, :, first:last] += summed[:, of_i, of_j, :, first - start : last - start]
    return table.flatten(1)
