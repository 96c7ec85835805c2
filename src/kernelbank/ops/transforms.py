"""Detect what is active around a call: transforms of torch.func and forward-mode differentiation, under which only
torch's own differentiable operations are correct, and compilers, exporters and tracers, which record operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether vmap, grad, jvp or another transform of torch.func, or a forward-mode level, is active."""
    # torch 2.11 to 2.14 have no public function for either
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def untransformed(tensor: Tensor) -> Tensor:
    """Return the values of a tensor under transforms of torch.func, those of every sample of vmap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records the operations."""
    return torch.compiler.is_compiling() or jit_traced()


def traced() -> bool:
    """Whether torch.export or torch.jit.trace records the operations, to run them on batches of other sizes."""
    return torch.compiler.is_exporting() or jit_traced()


def jit_traced() -> bool:
    """Whether torch.jit.trace records the operations."""
    return not torch.compiler.is_compiling() and bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def any_batch(x: Tensor) -> bool:
    """Whether the operations on x (B, ...) are recorded to run for other B too."""
    return jit_traced() or isinstance(x.shape[0], torch.SymInt)


def differentiated(grad: Tensor) -> bool:
    """Whether a backward with this gradient must be differentiable or take a batch of gradients: under
    ``create_graph=True``, ``is_grads_batched=True`` or a transform."""
    batched: bool = torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or transformed() or batched


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of function(*inputs) for the inputs that need one, by torch's differentiation of `function`,
    so that they can be differentiated and transformed in turn. For the backward of an autograd.Function."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that an input that is computed from another one is a separate variable
        values = [None if t is None else t.view_as(t) if graph else t.detach() for t in inputs]
        variables = [t for t, need in zip(values, needed, strict=True) if need and t is not None]
        if not graph:
            variables = [t.requires_grad_() for t in variables]
        y = function(*values)
    results = iter(torch.autograd.grad(y, variables, grad, create_graph=graph))
    return tuple(next(results) if need else None for need in needed)
