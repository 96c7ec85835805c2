"""Depth-wise self-attention o_i = q_i mean_j(x_j) + sum_j p_(i-j) x_j (arXiv 2309.10713, section 4.2), and its second
term alone, without an N x N tensor.

A program multiplies tiles of the Toeplitz matrix, read from the head's table, by columns of x: the d channels of a
head in several images, which share the matrix. It meets every x_j of its columns, so the mean costs no pass of its
own; the gate is applied before the tile is written. The backward pass is the same with the matrix transposed, and the
mean of dO q in place of that of x. The table's gradient is that of `table`, with d_s = dO x^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernelbank.ops.kernels.launch import block, jit, launches, on_device, precision, tl
from kernelbank.ops.kernels.layout import Layout
from kernelbank.ops.kernels.table import naive as naive_table_gradient
from kernelbank.ops.kernels.table import table_gradient
from kernelbank.ops.kernels.tiles import place
from kernelbank.ops.transforms import differentiated, gradients

TILE = 64
"""Rows and kernels of a tile, and columns of a program's part of x at half this."""


def naive(q: Tensor | None, x: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """The same by the N x N matrix."""
    h, layout = table.shape[0], _layout(table, width)
    cells = torch.arange(height * width, device=x.device)
    matrix = table.flatten(1)[:, layout.index(cells, cells)].to(x.dtype)
    o = (matrix @ x.unflatten(2, (h, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    return o if q is None else o + q * x.mean(1, keepdim=True)


def _layout(table: Tensor, width: int) -> Layout:
    return Layout(0, width, ((table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2))


@jit
def columns_of(program, columns, images, d, head, COLUMNS: tl.constexpr):
    """(image, channel, inside) of a program's columns."""
    column = (program % columns) * COLUMNS + tl.arange(0, COLUMNS)
    return (column // d).to(tl.int64), head * d + column % d, column < images * d


@jit
def load_columns(
    base,
    rows,
    in_rows,
    image,
    channel,
    in_columns,
    image_stride,
    row_stride,
):
    """Rows of x by channels in several images, zero outside."""
    at = image[None, :] * image_stride + rows[:, None] * row_stride + channel[None, :]
    return tl.load(base + at, mask=in_rows[:, None] & in_columns[None, :], other=0.0)


@jit
def forward_kernel(
    q, x, table, out, mean, q_image, q_row, x_image, x_row, o_image,
    o_row, images, N, C, d, columns, width, span, centre, entry_row,
    GATE: tl.constexpr, ROWS: tl.constexpr, KERNELS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of positions of the columns of one head."""
    blocks = tl.cdiv(N, ROWS)
    row_block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head = rest // columns
    image, channel, in_c = columns_of(rest, columns, images, d, head, COLUMNS)
    i = row_block * ROWS + tl.arange(0, ROWS)
    in_i = i < N
    at_i = place(i, 0, width, span)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    average = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, N, KERNELS):
        j = start + tl.arange(0, KERNELS)
        in_j = j < N
        index = at_i[:, None] - place(j, 0, width, span)[None, :] + centre
        p = tl.load(table + head * entry_row + index, mask=in_i[:, None] & in_j[None, :], other=0.0)
        tile = load_columns(x, j, in_j, image, channel, in_c, x_image, x_row)
        sums += tl.dot(p.to(tile.dtype), tile, input_precision=PRECISION)
        if GATE:
            average += tl.sum(tile.to(tl.float32), 0)
    if GATE:
        average = average / N
        if row_block == 0:
            tl.store(mean + image * C + channel, average, mask=in_c)
        gate = load_columns(q, i, in_i, image, channel, in_c, q_image, q_row)
        sums += gate.to(tl.float32) * average[None, :]
    at = image[None, :] * o_image + i[:, None] * o_row + channel[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=in_i[:, None] & in_c[None, :])


@jit
def backward_kernel(
    grad, q, table, mean, d_q, d_x, g_image, g_row, q_image, q_row,
    o_image, o_row, images, N, C, d, columns, width, span, centre,
    entry_row,
    GATE: tl.constexpr, ROWS: tl.constexpr, KERNELS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """dq and dx of one tile of positions of the columns of one head: dq_j = dO_j mean(x),
    dx_j = sum_i p_(i-j) dO_i + mean_i(dO_i q_i)."""
    blocks = tl.cdiv(N, ROWS)
    row_block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head = rest // columns
    image, channel, in_c = columns_of(rest, columns, images, d, head, COLUMNS)
    j = row_block * ROWS + tl.arange(0, ROWS)
    in_j = j < N
    at_j = place(j, 0, width, span)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, N, KERNELS):
        i = start + tl.arange(0, KERNELS)
        in_i = i < N
        index = place(i, 0, width, span)[None, :] - at_j[:, None] + centre
        p = tl.load(table + head * entry_row + index, mask=in_j[:, None] & in_i[None, :], other=0.0)
        tile = load_columns(grad, i, in_i, image, channel, in_c, g_image, g_row)
        sums += tl.dot(p.to(tile.dtype), tile, input_precision=PRECISION)
        if GATE:
            gate = load_columns(q, i, in_i, image, channel, in_c, q_image, q_row)
            products += tl.sum(tile.to(tl.float32) * gate.to(tl.float32), 0)
    at = image[None, :] * o_image + j[:, None] * o_row + channel[None, :]
    inside = in_j[:, None] & in_c[None, :]
    if GATE:
        sums += (products / N)[None, :]
        own = load_columns(grad, j, in_j, image, channel, in_c, g_image, g_row)
        average = tl.load(mean + image * C + channel, mask=in_c, other=0.0)
        gradient = own.to(tl.float32) * average[None, :]
        tl.store(d_q + at, gradient.to(d_q.dtype.element_ty), mask=inside)
    tl.store(d_x + at, sums.to(d_x.dtype.element_ty), mask=inside)


@torch.library.custom_op("kernelbank::depthwise_attention", mutates_args=())
def depthwise_attention(
    q: Tensor | None, x: Tensor, table: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, N, C), and the mean (B, C) of x in float32 or wider, which gets no gradient.

    Args:
        q: What the mean gates, (B, N, C); without it o is the positional term alone, and the mean is empty.
        x: The generated kernels, (B, N, C).
        table: (h, 2a-1, 2b-1) with a >= height and b >= width.
        height: H of the grid.
        width: W of the grid.
    """
    mean = x.new_empty((x.shape[0], x.shape[2]) if q is not None else 0, dtype=_wide(x))
    if not launches(x):
        if q is not None:
            mean.copy_(x.mean(1, dtype=mean.dtype))
        return naive(q, x, table, height, width).contiguous(), mean
    x, q = _by_channel(x), None if q is None else _by_channel(q)
    gate = x if q is None else q
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    numbers, options = _arguments(x, table, width)
    with on_device(x):
        forward_kernel[_programs(x, table, options)](
            gate, x, table.contiguous(), out, mean, *gate.stride()[:2], *x.stride()[:2], *out.stride()[:2], *numbers,
            GATE=q is not None, **options,
        )  # fmt: skip
    return out, mean


@depthwise_attention.register_fake
def _(q: Tensor | None, x: Tensor, table: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[2]) if q is not None else 0, dtype=_wide(x))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean


@torch.library.custom_op("kernelbank::depthwise_gradients", mutates_args=())
def depthwise_gradients(
    grad: Tensor, q: Tensor | None, x: Tensor, table: Tensor, mean: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dx, d table) for the gradient of o; dq is empty without q."""
    (h, rows, span), layout = table.shape, _layout(table, width)
    d_q, d_x = _room(q, x)
    by_head = [t.unflatten(2, (h, -1)).transpose(1, 2) for t in (grad, x)]
    if not launches(x):
        d_table = naive_table_gradient(by_head[0] @ by_head[1].mT, layout).view(h, rows, span)
        d_x.copy_(naive(None, grad, table.flip(1, 2), height, width))
        if q is not None:
            d_q.copy_(grad * mean[:, None].to(grad.dtype))
            d_x += (grad * q).mean(1, keepdim=True)
        return d_q, d_x, d_table.to(table.dtype)
    grad, q = _by_channel(grad), None if q is None else _by_channel(q)
    gate = grad if q is None else q
    numbers, options = _arguments(x, table, width)
    with on_device(x):
        backward_kernel[_programs(x, table, options)](
            grad, gate, table.contiguous(), mean, d_q, d_x, *grad.stride()[:2], *gate.stride()[:2], *d_x.stride()[:2],
            *numbers, GATE=q is not None, **options,
        )  # fmt: skip
    g, v = (_by_channel(t).unflatten(2, (h, -1)).transpose(1, 2) for t in (grad, x))
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    d_table = table_gradient(g, g, v, v, None, none, None, None, layout, "product", 1.0)
    return d_q, d_x, d_table.view(h, rows, span).to(table.dtype)


@depthwise_gradients.register_fake
def _(
    grad: Tensor, q: Tensor | None, x: Tensor, table: Tensor, mean: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return *_room(q, x), torch.empty(table.shape, dtype=table.dtype, device=table.device)


def _room(q: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return x.new_empty(0) if q is None else torch.empty_like(made), made


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_channel(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _arguments(x: Tensor, table: Tensor, width: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The integers and the options of both kernels."""
    (B, N, C), h, layout = x.shape, table.shape[0], _layout(table, width)
    d, most = C // h, TILE if x.dtype != torch.float32 else TILE // 2
    size = block(B * d, 2 * most)
    numbers = (B, N, C, d, -(-B * d // size), width, layout.span, layout.centre, layout.count)
    return numbers, {"ROWS": block(N, most), "KERNELS": block(N, most), "COLUMNS": size, "PRECISION": precision(x),
                     "num_warps": 8, "num_stages": 2}  # fmt: skip


def _programs(x: Tensor, table: Tensor, options: dict[str, Any]) -> tuple[int]:
    (B, N, C), h = x.shape, table.shape[0]
    return (-(-N // options["ROWS"]) * -(-B * (C // h) // options["COLUMNS"]) * h,)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, x, table, ctx.height, ctx.width = inputs
    ctx.save_for_backward(q, x, table, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, x, table, mean = ctx.saved_tensors
    if differentiated(grad):

        def function(q: Tensor | None, x: Tensor, table: Tensor) -> Tensor:
            return naive(q, x, table, ctx.height, ctx.width)

        return *gradients(function, (q, x, table), ctx.needs_input_grad[:3], grad), None, None
    d_q, d_x, d_table = depthwise_gradients(grad, q, x, table, mean, ctx.height, ctx.width)
    return None if q is None else d_q, d_x, d_table, None, None


depthwise_attention.register_autograd(_backward, setup_context=_save)
