"""The frame axis: the static convs around the dynamic conv. `linear` (q conv in, projection out), `bn_relu`
(conv-BN-ReLU, dynamic conv, BN-ReLU-conv-BN: DWNet, arXiv 2106.04263), `bare`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops import statistics
from kernelbank.ops.context import Params, Setting
from kernelbank.ops.statistics import EPS, MOMENTUM

HEAD_EPS = 1e-6  # LayerNorm in timm's ViT


def linear(x: Tensor, p: Params, name: str, s: Setting) -> Tensor:
    """A 1 x 1 static conv on tokens: x W^T + b, b if there is one."""
    return s.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def batch_norm(x_BTC: Tensor, p: Params, name: str, training: bool) -> Tensor:
    """BatchNorm over batch and tokens. Raises ValueError in training on a single value a channel."""
    B, T, C = x_BTC.shape
    if training and B * T == 1 and not statistics.over_processes():
        raise ValueError(f"{name}: BatchNorm needs more than one value a channel in training, got batch {B} x {T}")
    stats = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    normed = statistics.batch_norm(x_BTC.reshape(B * T, C), *stats, weight, bias, training, MOMENTUM, EPS)
    return normed.view(B, T, C)


def enter(x_BTC: Tensor, p: Params, s: Setting) -> tuple[Tensor, Tensor]:
    """(operand, source): what the dynamic conv is applied to, and what generators and predictors read."""
    if s.spec.frame == "bare":
        return x_BTC, x_BTC
    q = linear(x_BTC, p, "q", s)
    if s.spec.frame == "linear":
        return q, x_BTC
    operand = F.relu(batch_norm(q, p, "q_norm", s.training))
    return operand, operand


def leave(o_BTC: Tensor, p: Params, s: Setting) -> Tensor:
    """The static conv after the dynamic one."""
    if s.spec.frame == "bare":
        return o_BTC
    if s.spec.frame == "linear":
        return linear(o_BTC, p, "out", s)
    o_BTC = linear(F.relu(batch_norm(o_BTC, p, "out_norm", s.training)), p, "out", s)
    return batch_norm(o_BTC, p, "last_norm", s.training)


def head_norm(x: Tensor, p: Params, name: str) -> Tensor:
    """LayerNorm over the d channels of a head, the last axis, where the mixer has qk_norm (then it has k_norm)."""
    if "k_norm.weight" not in p:
        return x
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, HEAD_EPS)
