"""The frame axis: the linear layers around the dynamic convolution. `linear` (q in, projection out), `bn_relu`
(conv-BN-ReLU, dynamic conv, BN-ReLU-conv-BN: DWNet, arXiv 2106.04263), `bare`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops import statistics
from kernelbank.ops.context import Context, Params
from kernelbank.ops.statistics import EPS, MOMENTUM


def linear(x: Tensor, p: Params, name: str, s: Context) -> Tensor:
    """A linear layer on tokens: x W^T + b, with b where there is one. A layer among the context's modules is
    called; any other runs by the planned form."""
    module = s.modules.get(name)
    if module is not None:
        return module(x)
    return s.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def linear_dtype(p: Params, name: str, s: Context) -> torch.dtype:
    """The dtype of the input that the linear layer `name` takes outside autocast: that of its weight, or of the first
    floating-point parameter of its module (float32 for a quantised module, which has none)."""
    module = s.modules.get(name)
    if module is None:
        return p[f"{name}.weight"].dtype
    return next((t.dtype for t in module.parameters() if t.is_floating_point()), torch.float32)


def batch_norm(x_BTC: Tensor, p: Params, name: str, training: bool) -> Tensor:
    """BatchNorm over batch and tokens. Raises ValueError in training on a single value per channel."""
    B, T, C = x_BTC.shape
    if training and B * T == 1 and not statistics.over_processes():
        raise ValueError(
            f"{name}: invalid batch of {B} x {T} tokens; expected more than one value per channel in training"
        )
    stats = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    normed = statistics.batch_norm(x_BTC.reshape(B * T, C), *stats, weight, bias, training, MOMENTUM, EPS)
    return normed.view(B, T, C)


def enter(x_BTC: Tensor, p: Params, s: Context) -> tuple[Tensor, Tensor]:
    """(operand, source): what the dynamic conv is applied to, and what generators and predictors read."""
    if s.spec.frame == "bare":
        return x_BTC, x_BTC
    q = linear(x_BTC, p, "q", s)
    if s.spec.frame == "linear":
        return q, x_BTC
    operand = F.relu(batch_norm(q, p, "q_norm", s.training))
    return operand, operand


def leave(o_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The linear layer after the dynamic convolution."""
    if s.spec.frame == "bare":
        return o_BTC
    if s.spec.frame == "linear":
        return linear(o_BTC, p, "out", s)
    o_BTC = linear(F.relu(batch_norm(o_BTC, p, "out_norm", s.training)), p, "out", s)
    return batch_norm(o_BTC, p, "last_norm", s.training)
