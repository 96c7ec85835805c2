"""The definition (`ops.reference`) as a path that can be forced."""

from __future__ import annotations

from kernelbank.ops import reference
from kernelbank.ops.context import Call, Context
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.path import MixerPath, Reason, first, needs_no_dropout, never_preferred


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: dropout, linear layers that are modules."""
    names = ", ".join(s.modules)
    modules = f"it reads the weights of {names}, which must be called as modules" if names else None
    return first(needs_no_dropout(s), modules)


PATH = MixerPath("reference", reference.mixer, unsupported, never_preferred)
