"""Static kernels of one head: two static convs around the activation, with the GELU in the first one's epilogue."""

from __future__ import annotations

from torch import Tensor

from kernelbank.ops.context import Params, Setting
from kernelbank.ops.geometry import unfold
from kernelbank.ops.kernel import normed_operand, weigh
from kernelbank.spec.pipeline import Step

GELU = (Step("gelu"),)


def two_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Setting) -> Tensor:
    """value phi(key x + key bias) + value bias."""
    x = unfold(normed_operand(operand_BTC, p, s), s.spec.size, s.geo).flatten(2)
    key, bias = p["key.weight"][0].flatten(1), p.get("key.bias")
    bias = None if bias is None else bias[0]
    if s.spec.activation == GELU and not (s.training and s.attn_drop):
        a = s.linear(x, key, bias, gelu=True)
    else:
        a = weigh(s.linear(x, key, bias)[:, None], None, None, p, s)[:, 0].to(x.dtype)
    return s.linear(a, p["value.weight"][0], p.get("value.bias"))
