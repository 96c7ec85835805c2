"""The kernel and size axes: how a kernel is applied. `two_step` by matrix products (`paths.conv` has
grouped convolutions); one-step kernels as convolutions, or by patches where each position has its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelbank.ops.activation import activate
from kernelbank.ops.bank import TwoStepBank, box, two_step_bank
from kernelbank.ops.context import Context, Params
from kernelbank.ops.geometry import Geometry, from_grid, to_grid, unfold
from kernelbank.ops.mix import generated_kernel, learned_kernel, project
from kernelbank.ops.normed import head_norm, scaled_query
from kernelbank.ops.position import matrix, relative, spread
from kernelbank.ops.precision import wide
from kernelbank.ops.rotation import rotate
from kernelbank.ops.transforms import any_batch, jit_traced
from kernelbank.spec import Box, Dynamic, Full, Grouped

Pair = tuple[int, int]
Attend = Callable[[Tensor, TwoStepBank, Params, Context], Tensor]
"""(q (B, h, T, d*t), the bank, params, context) -> o (B, h, T, d)."""


def two_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context, attend: Attend | None = None) -> Tensor:
    """o_i = sum_j phi(scale q_i . k_j + p_ij) v_j (arXiv 2309.10713, section 4.1), by two matrix products or by
    `attend`."""
    bank = project(two_step_bank(source_BTC, p, s), p, s)
    o_BhTd = (attend or products)(queries(operand_BTC, p, s), bank, p, s)
    o_BTC = o_BhTd.transpose(1, 2).flatten(2)
    return o_BTC if bank.value_bias is None else o_BTC + bank.value_bias


def queries(operand_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The operand's patches by head, (B, h, T, d*t)."""
    patches = unfold(normed_operand(operand_BTC, p, s), s.spec.size, s.geo)
    return patches.unflatten(2, (s.heads, -1)).flatten(3).transpose(1, 2)


def normed_operand(operand_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The operand after the norm per head, the learned scale and the rotation of rope, where the spec has them."""
    normed = head_norm(operand_BTC.unflatten(-1, (s.heads, -1)), p, "q_norm", s)
    return rotate(scaled_query(normed, p, s), s).flatten(2)


def products(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """The whole attention map between two matrix products."""
    scores = (q * bank.scale) @ bank.key.transpose(-1, -2)
    return weigh(scores, logits(bank, p, s), s.visible, p, s).to(bank.value.dtype) @ bank.value


def logits(bank: TwoStepBank, p: Params, s: Context) -> Tensor | None:
    """What is added to the scores, (h, T or 1, n): key bias and relative position; None when nothing is."""
    position = relative(p, s)
    if position is None or bank.key_bias is None:
        return bank.key_bias if position is None else position
    return position + bank.key_bias


def weigh(scores: Tensor, added: Tensor | None, visible: Tensor | None, p: Params, s: Context) -> Tensor:
    """The attention map of scores (B, h, T, n): the activation, then dropout."""
    a = activate(scores if added is None else scores + added, visible, s.spec.activation, p, s.training)
    return F.dropout(a, s.attn_drop, s.training)


def one_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """One kernel per position: o_i = sum_t w_it q_{i+t}, and the positional term of a relative position."""
    match s.spec.bank:
        case Box():
            return from_grid(
                torch.zeros_like(operand_BTC[:, : s.geo.prefix]), box(to_grid(operand_BTC, s.geo), s.spec.size)
            )
        case Dynamic():
            kernel, taps = generated_kernel(source_BTC, p, s)
            position = positional_term(taps, p, s)
            return apply_kernel(operand_BTC, kernel, p.get("bias"), position, s).to(operand_BTC.dtype)
        case _:
            weight, bias = learned_kernel(source_BTC, p, s)
            if isinstance(s.spec.kernel, Grouped):
                weight = weight.repeat_interleave(s.dim // s.groups, 1)
            return convolve(operand_BTC, weight, bias, s.groups if isinstance(s.spec.kernel, Full) else s.dim, s.geo)


def positional_term(taps_BnCt: Tensor, p: Params, s: Context) -> Tensor | None:
    """sum_j p_ij sum_t k_jt of a depth-wise kernel (arXiv 2309.10713, section 5.3, for size 1)."""
    if s.geo.sides is None:
        return None
    k_BnC = taps_BnCt.sum(-1) if s.spec.size > 1 else taps_BnCt[..., 0]
    if s.visible is None:
        return spread(k_BnC, p, s)
    position = torch.where(s.visible, matrix(p, s.geo), 0)
    k_Bhnd = k_BnC.unflatten(-1, (s.heads, -1)).transpose(1, 2)
    return (position.to(k_Bhnd.dtype) @ k_Bhnd).transpose(1, 2).flatten(2)


def apply_kernel(x_BTC: Tensor, kernel: Tensor, bias: Tensor | None, position: Tensor | None, s: Context) -> Tensor:
    """A generated kernel (B, 1 or T, R, t): a gate at size 1, a convolution per image, or patches. The positional term
    and the bias are added."""
    B, _, C = x_BTC.shape
    size, shared = s.spec.size, kernel.shape[2]
    if size == 1:
        o = gate(x_BTC, kernel, position)
        return o if bias is None else o + bias
    if kernel.shape[1] == 1:
        weight = kernel[:, 0].repeat_interleave(C // shared, 1).view(B, C, 1, size, size).to(x_BTC.dtype)
        o = convolve(x_BTC, weight, None if bias is None else bias[None], C, s.geo)
    else:
        patches = unfold(x_BTC, size, s.geo).unflatten(2, (shared, C // shared))  # (B, T, R, C/R, t)
        o = (patches.to(wide(x_BTC.dtype)) * kernel[:, :, :, None]).sum(-1).flatten(2)
        o = o if bias is None else o + bias
    return o if position is None else o + position


def gate(x: Tensor, kernel: Tensor, added: Tensor | None) -> Tensor:
    """x (..., C) times a kernel (..., R, 1), R weights for C / R channels each, plus what is added, in one pass."""
    parts, kernel = x.unflatten(-1, (kernel.shape[-2], -1)), kernel.to(x.dtype)
    if added is None:
        return (parts * kernel).flatten(-2)
    dtype = torch.promote_types(x.dtype, added.dtype)
    return torch.addcmul(added.to(dtype).reshape(parts.shape), parts.to(dtype), kernel.to(dtype)).flatten(-2)


def convolve(x_BTC: Tensor, weight: Tensor, bias: Tensor | None, groups: int, geo: Geometry) -> Tensor:
    """The kernel (B or 1, C_out, C_in/g, k, k) over the grid with zeros outside; prefix tokens meet its centre tap.

    One kernel per image runs as one grouped convolution with the batch in the groups.
    """
    image, tokens = to_grid(x_BTC, geo), x_BTC[:, : geo.prefix].transpose(1, 2)[:, :, None]
    o = conv_images(image, weight, bias, groups, weight.shape[-1] // 2)
    if not geo.prefix:
        return o.flatten(2).transpose(1, 2)
    centre = weight.shape[-1] // 2
    prefix = conv_images(tokens, weight[..., centre : centre + 1, centre : centre + 1], bias, groups)
    return torch.cat([prefix.flatten(2), o.flatten(2)], 2).transpose(1, 2)


def conv_images(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    padding: int | Pair = 0,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
) -> Tensor:
    """A convolution with one kernel for all images or one for each: weight (1 or B, C_out, C_in/g, k, k), bias
    (1 or B, C_out). One kernel per image runs as one grouped convolution with the batch in the groups, or as a product
    with the patches in a graph that is recorded for other batches."""
    if is_shared(weight):
        return conv2d(x_BCHW, weight[0], None if bias is None else bias[0], padding, groups, stride, dilation)
    if any_batch(x_BCHW):
        return _by_patches(x_BCHW, weight, bias, groups, padding, stride, dilation)
    (B, C, H, W), out = x_BCHW.shape, weight.shape[1]
    if B == 0:  # without images there are no kernels either: their sum keeps the graph
        weight, bias = weight.sum(0), None if bias is None else bias.sum(0)
        return conv2d(x_BCHW, weight, bias, padding, groups, stride, dilation)
    bias = None if bias is None else bias.expand(B, out).flatten()
    y = conv2d(x_BCHW.reshape(1, B * C, H, W), weight.flatten(0, 1), bias, padding, B * groups, stride, dilation)
    return y.view(B, out, *y.shape[2:])


def is_shared(weight: Tensor) -> bool:
    """Whether the weight (1 or B, ...) is one kernel for all images. torch.jit.trace may trace a batch of one image and
    run another: then only a parameter is known to be shared, and broadcasting is right for both."""
    return isinstance(weight, nn.Parameter) if jit_traced() else weight.shape[0] == 1


def _by_patches(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    padding: int | Pair,
    stride: int | Pair,
    dilation: int | Pair,
) -> Tensor:
    """As `conv_images`, with nothing in its operations that depends on the number of images."""
    out, sides = weight.shape[1], weight.shape[3:]
    pads, steps, gaps = (v if isinstance(v, tuple) else (v, v) for v in (padding, stride, dilation))
    height, width = (
        (side + 2 * pad - gap * (k - 1) - 1) // step + 1
        for side, pad, gap, k, step in zip(x_BCHW.shape[2:], pads, gaps, sides, steps, strict=True)
    )
    patches = F.unfold(x_BCHW, tuple(sides), gaps, pads, steps).unflatten(1, (groups, -1))  # (B, g, C/g t, L)
    y = (weight.flatten(2).unflatten(1, (groups, -1)) @ patches).flatten(1, 2)
    y = y if bias is None else y + bias[..., None]
    return y.view(-1, out, height, width)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int | Pair,
    groups: int,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
) -> Tensor:
    """F.conv2d through flat views: strides of sides of length 1 that look channels-last break torch's CPU backward
    ("grad_weight must be contiguous", torch 2.14)."""
    x, weight = x.flatten().view(x.shape), weight.flatten().view(weight.shape)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
