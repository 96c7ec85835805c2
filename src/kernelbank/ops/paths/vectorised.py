"""Every spec, vectorised: attention by two matrix products, one-step kernels as gates, convolutions or patches."""

from __future__ import annotations

from torch import Tensor

from kernelbank.ops import kernel
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.framed import framed
from kernelbank.ops.paths.path import MixerPath, Reason, needs_every_kernel, needs_static_tensors
from kernelbank.spec import TwoStep


def core(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """The dynamic convolutions of either kind."""
    steps = kernel.two_step if isinstance(s.spec.kernel, TwoStep) else kernel.one_step
    return steps(operand_BTC, source_BTC, p, s)


def one_step_with_table(s: Context) -> bool:
    """Whether a one-step kernel has a table over every position."""
    return s.geo.sides is not None and not isinstance(s.spec.kernel, TwoStep) and needs_every_kernel(s) is None


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: static kernels that are modules."""
    return needs_static_tensors(s)


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred if no other path is."""
    if one_step_with_table(s):
        return "one kernel per image is a gate, and the table a positional operator"
    return "no other path is faster for this spec"


PATH = MixerPath("vectorised", framed(core), unsupported, preferred, one_step_with_table)
