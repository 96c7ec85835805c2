"""Whether something else than eager torch runs the operations: transforms of torch.func and forward-mode
differentiation, under which only paths of torch's own differentiable operations are right, and what records operations
for later."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether vmap, grad, jvp or another transform of torch.func, or a forward-mode level, is active."""
    # torch has no public question for either (torch 2.11 to 2.14)
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records the operations."""
    return torch.compiler.is_compiling() or _jit_traces()


def traced() -> bool:
    """Whether torch.export or torch.jit.trace records the operations: a batch of another size runs them later."""
    return torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and _jit_traces())


def _jit_traces() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
