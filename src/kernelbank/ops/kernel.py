"""The kernel and size axes: how a kernel is applied. `two_step` by matrix products here and by grouped
convolutions in `conv`; one-step kernels as convolutions, or by patches where each position has its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.activation import activate
from kernelbank.ops.bank import TwoStepBank, box, two_step_bank
from kernelbank.ops.frame import head_norm
from kernelbank.ops.geometry import Geometry, from_grid, to_grid, unfold
from kernelbank.ops.mix import generated_kernel, learned_kernel, project
from kernelbank.ops.position import relative
from kernelbank.ops.setting import Params, Setting, wide
from kernelbank.spec import Box, Dynamic, Full, Grouped

Pair = tuple[int, int]


def two_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Setting) -> Tensor:
    """o_i = sum_j phi(scale q_i . k_j + p_ij) v_j as two matrix products (paper 4.1)."""
    bank = project(two_step_bank(source_BTC, p, s), p, s)
    patches = unfold(normed_operand(operand_BTC, p, s), s.spec.size, s.geo)
    q_BhTd = patches.unflatten(2, (s.heads, -1)).flatten(3).transpose(1, 2)
    scores = (q_BhTd * bank.scale) @ bank.key.transpose(-1, -2)
    o_BhTd = attention_map(scores, bank, p, s) @ bank.value
    o_BTC = o_BhTd.transpose(1, 2).flatten(2)
    return o_BTC if bank.value_bias is None else o_BTC + bank.value_bias


def normed_operand(operand_BTC: Tensor, p: Params, s: Setting) -> Tensor:
    """The operand after the LayerNorm a head of qk_norm, where the mixer has one."""
    return head_norm(operand_BTC.unflatten(-1, (s.heads, -1)), p, "q_norm").flatten(2)


def attention_map(scores_BhTn: Tensor, bank: TwoStepBank, p: Params, s: Setting) -> Tensor:
    """The scores with key bias and relative position, through the activation and dropout."""
    if bank.key_bias is not None:
        scores_BhTn = scores_BhTn + bank.key_bias
    position = relative(p, s)
    if position is not None:
        scores_BhTn = scores_BhTn + position
    a = activate(scores_BhTn, s.visible, s.spec.activation, p, s.training)
    return F.dropout(a, s.attn_drop, s.training).to(bank.value.dtype)


def one_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Setting) -> Tensor:
    """One kernel a position: o_i = sum_t w_it q_{i+t}, and the positional term of a relative position."""
    match s.spec.bank:
        case Box():
            return from_grid(
                torch.zeros_like(operand_BTC[:, : s.geo.prefix]), box(to_grid(operand_BTC, s.geo), s.spec.size)
            )
        case Dynamic():
            kernel, taps = generated_kernel(source_BTC, p, s)
            o = apply_kernel(operand_BTC, kernel, p.get("bias"), s)
            position = positional_term(taps, p, s)
            return (o if position is None else o + position).to(operand_BTC.dtype)
        case _:
            weight, bias = learned_kernel(source_BTC, p, s)
            if isinstance(s.spec.kernel, Grouped):
                weight = weight.repeat_interleave(s.dim // s.groups, 1)
            return convolve(operand_BTC, weight, bias, s.groups if isinstance(s.spec.kernel, Full) else s.dim, s.geo)


def positional_term(taps_BnCt: Tensor, p: Params, s: Setting) -> Tensor | None:
    """sum_j p_ij sum_t k_jt of a depth-wise kernel (design 1.3; the paper's p_i k at size 1)."""
    position = relative(p, s)
    if position is None:
        return None
    visible = s.visible
    shown = position[None] if visible is None else torch.where(visible, position, 0)
    k_Bhnd = taps_BnCt.sum(-1).unflatten(-1, (s.heads, -1)).transpose(1, 2)
    return (shown.to(k_Bhnd.dtype) @ k_Bhnd).transpose(1, 2).flatten(2)


def apply_kernel(x_BTC: Tensor, kernel: Tensor, bias: Tensor | None, s: Setting) -> Tensor:
    """A generated kernel (B, 1 or T, R, t): a gate at size 1, a convolution an image, or patches."""
    B, _, C = x_BTC.shape
    size, shared = s.spec.size, kernel.shape[2]
    if size > 1 and kernel.shape[1] == 1:
        weight = kernel[:, 0].repeat_interleave(C // shared, 1).view(B, C, 1, size, size).to(x_BTC.dtype)
        return convolve(x_BTC, weight, None if bias is None else bias[None], C, s.geo)
    patches = unfold(x_BTC, size, s.geo).unflatten(2, (shared, C // shared))  # (B, T, R, C/R, t)
    o = (patches.to(wide(x_BTC.dtype)) * kernel[:, :, :, None]).sum(-1).flatten(2)
    return o if bias is None else o + bias


def convolve(x_BTC: Tensor, weight: Tensor, bias: Tensor | None, groups: int, geo: Geometry) -> Tensor:
    """The kernel (B or 1, C_out, C_in/g, k, k) over the grid with zeros outside; prefix tokens meet its centre tap.

    One kernel an image runs as one grouped convolution with the batch in the groups.
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
    (1 or B, C_out). One kernel an image runs as one grouped convolution with the batch in the groups."""
    (B, C, H, W), (kernels, out) = x_BCHW.shape, weight.shape[:2]
    if B == 0:  # no image, no kernel: their sum keeps the graph
        weight, bias = weight.sum(0, keepdim=True), None if bias is None else bias.sum(0, keepdim=True)
    if B == 0 or kernels == 1:
        return conv2d(x_BCHW, weight[0], None if bias is None else bias[0], padding, groups, stride, dilation)
    bias = None if bias is None else bias.expand(B, out).flatten()
    y = conv2d(x_BCHW.reshape(1, B * C, H, W), weight.flatten(0, 1), bias, padding, B * groups, stride, dilation)
    return y.view(B, out, *y.shape[2:])


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
