"""The form of most mixer paths: a core between the linear layers of the frame."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernelbank.ops.context import Context, Params
from kernelbank.ops.frame import enter, leave
from kernelbank.ops.geometry import crop, pad_tokens
from kernelbank.ops.kernel import Attend, two_step

Core = Callable[[Tensor, Tensor, Params, Context], Tensor]
"""(operand (B, T, C), source (B, T, C), params, context) -> (B, T, C): the dynamic convolutions."""
Run = Callable[[Tensor, Params, Context], Tensor]


def framed(core: Core) -> Run:
    """Return the core with the linear layers around it, on the padded grid if the spec has one."""

    def run(x_BTC: Tensor, p: Params, s: Context) -> Tensor:
        operand, source = enter(pad_tokens(x_BTC, s.geo), p, s)
        return crop(leave(core(operand, source, p, s), p, s), s.geo)

    return run


def attending(attend: Attend) -> Run:
    """Return the mixer whose attention is `attend`."""
    return framed(lambda operand, source, p, s: two_step(operand, source, p, s, attend))
