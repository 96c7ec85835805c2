"""Softmax over the kernels through torch's fused attention, which does not store the attention map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.bank import TwoStepBank
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.kernel import logits
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.framed import attending
from kernelbank.ops.paths.path import MixerPath, Reason, needs_two_step
from kernelbank.ops.transforms import traced
from kernelbank.spec.pipeline import L1, Pipeline


def temperature(steps: Pipeline) -> float | None:
    """x of a pipeline that is softmax(x s) over the kernels, or None."""
    x = 1.0
    for step in steps[:-2]:
        if step.argument is None and step.name != "identity":
            return None
        x *= step.argument or 1.0
    return x if len(steps) >= 2 and steps[-2].name == "exp" and steps[-1] == L1 else None


def attend(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """softmax(x (scale q k^T + p)) v."""
    return fused(q, bank, logits(bank, p, s), s.visible, s)


def fused(q: Tensor, bank: TwoStepBank, added: Tensor | None, visible: Tensor | None, s: Context) -> Tensor:
    """The same for what is `added` to the scores and `visible` among them."""
    x = temperature(s.spec.activation)
    assert x is not None
    q, key, value = (t.expand(q.shape[0], -1, -1, -1) for t in (q, bank.key, bank.value))
    mask = visible
    if added is not None:
        mask = (added * x if x != 1 else added).to(q.dtype)[None]
        if visible is not None:
            mask = torch.where(visible, mask, -torch.inf)
    drop = s.attn_drop if s.training else 0.0
    o = F.scaled_dot_product_attention(q, key.to(q.dtype), value.to(q.dtype), mask, drop, scale=bank.scale * x)
    # the strides of the output are those of one kernel: exporters put products with other strides in its place
    return o.clone(memory_format=torch.contiguous_format) if traced() else o


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: activations other than softmax over kernels."""
    if (reason := needs_two_step(s)) is not None:
        return reason
    return "the activation is not softmax over kernels" if temperature(s.spec.activation) is None else None


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred except under forward-mode differentiation and transforms, which torch's fused attention does not
    support on CPUs."""
    return None if call.transformed else "torch's fused attention holds no map"


PATH = MixerPath("sdpa", attending(attend), unsupported, preferred)
