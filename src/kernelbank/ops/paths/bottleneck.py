"""Static kernels of one head: two linear layers around the activation, with the GELU fused into the first."""

from __future__ import annotations

from torch import Tensor

from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.frame import linear
from kernelbank.ops.geometry import unfold
from kernelbank.ops.kernel import normed_operand, weigh
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.framed import framed
from kernelbank.ops.paths.path import MixerPath, Reason
from kernelbank.spec import Static, TwoStep
from kernelbank.spec.pipeline import Step

GELU = (Step("gelu"),)


def two_step(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """value phi(key x + key bias) + value bias."""
    x = unfold(normed_operand(operand_BTC, p, s), s.spec.size, s.geo).flatten(2)
    if s.spec.size > 1:  # then the kernels are tensors (1, K, C, k, k), (1, K) and (1, C, K)
        p = {**p, "key.weight": p["key.weight"][0].flatten(1), "value.weight": p["value.weight"][0]}
        p |= {"key.bias": p["key.bias"][0]} if "key.bias" in p else {}
    if s.spec.activation == GELU and not (s.training and s.attn_drop) and "key" not in s.modules:
        a = s.linear(x, p["key.weight"], p.get("key.bias"), gelu=True)
    else:
        a = weigh(linear(x, p, "key", s)[:, None], None, None, p, s)[:, 0].to(x.dtype)
    return linear(a, p, "value", s)


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: dynamic banks, several heads."""
    if not isinstance(s.spec.kernel, TwoStep):
        return f"it runs kernel two_step, not {s.spec.kernel}"
    if not isinstance(s.spec.bank, Static):
        return f"its kernels are parameters, not bank={s.spec.bank}"
    return None if s.heads == 1 else f"it is one pair of linear layers, not {s.heads} heads"


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred always."""
    return "static kernels of one head are two linear layers"


PATH = MixerPath("bottleneck", framed(two_step), unsupported, preferred)
