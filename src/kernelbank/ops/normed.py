"""The norm and the scale of a two_step kernel: queries and kernels normalised over the channels of a head, and scores
times a learned number per head."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.context import Context, Params
from kernelbank.ops.precision import wide
from kernelbank.spec import TwoStep

HEAD_EPS = 1e-6
"""The epsilon of LayerNorm and RMSNorm, as in timm."""
LARGEST_SCALE = 100.0
"""Of the scores (Swin V2, arXiv 2111.09883)."""


def head_norm(x: Tensor, p: Params, name: str, s: Context) -> Tensor:
    """x (..., d) normalised over the channels of a head, the last axis, as the kernel of the spec states."""
    assert isinstance(s.spec.kernel, TwoStep)
    match s.spec.kernel.norm:
        case "layernorm":
            weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
            return F.layer_norm(x, weight.shape, weight, bias, HEAD_EPS)
        case "rmsnorm":
            weight = p[f"{name}.weight"]
            return F.rms_norm(x, weight.shape, weight, HEAD_EPS)
        case "l2":
            return F.normalize(x.to(wide(x.dtype)), dim=-1).to(x.dtype)
        case _:
            return x


def scaled_query(x_BThd: Tensor, p: Params, s: Context) -> Tensor:
    """Queries (B, T, h, d) times sqrt(d) and the learned scale of their head, min(exp(logit_scale), 100), since the
    scores are later multiplied by 1 / sqrt(d); x itself where the scale is fixed."""
    assert isinstance(s.spec.kernel, TwoStep)
    if s.spec.kernel.scale == "fixed":
        return x_BThd
    factor = p["logit_scale"].to(wide(x_BThd.dtype)).clamp(max=math.log(LARGEST_SCALE)).exp()
    return (x_BThd * (factor * x_BThd.shape[-1] ** 0.5)[:, None]).to(x_BThd.dtype)
