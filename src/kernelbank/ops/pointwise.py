"""Attention with a pointwise activation: its scores need no other score, so they are made, activated and used chunk
by chunk while they lie in the cache. Training keeps one map and nothing else of that size: the activated one where
the derivative follows from it, else the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernelbank.ops.associated import Affine, affine
from kernelbank.ops.bank import TwoStepBank
from kernelbank.ops.kernel import logits
from kernelbank.ops.linear import onednn
from kernelbank.ops.setting import Params, Setting
from kernelbank.pipeline import Pipeline

CHUNK = 2**18
"""Scores in a chunk: 1 MiB in float32, the second-level cache of a core."""


@dataclass(frozen=True)
class NonLinearity:
    """`apply` (it may write over its argument) and `derivative`(gradient, kept): `keeps` the output or the input."""

    apply: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    keeps_output: bool = True


aten = torch.ops.aten
NON_LINEARITIES: dict[str, NonLinearity] = {
    "relu": NonLinearity(torch.relu_, lambda g, a: aten.threshold_backward(g, a, 0)),
    "relu2": NonLinearity(lambda s: s.relu_().square_(), lambda g, a: g * (2 * a.sqrt())),
    "exp": NonLinearity(torch.exp_, lambda g, a: g * a),
    "sigmoid": NonLinearity(torch.sigmoid_, aten.sigmoid_backward),
    "tanh": NonLinearity(torch.tanh_, aten.tanh_backward),
    "softplus": NonLinearity(F.softplus, lambda g, s: g * torch.sigmoid(s), keeps_output=False),
    "gelu": NonLinearity(F.gelu, aten.gelu_backward, keeps_output=False),
    "silu": NonLinearity(F.silu, aten.silu_backward, keeps_output=False),
}


@dataclass(frozen=True)
class Pointwise:
    """gain * f(before(s))."""

    before: Affine
    name: str
    gain: float


def pointwise(steps: Pipeline, kernels: int, positions: int) -> Pointwise | None:
    """`steps` as an affine map, one non-linearity and a scale, or None."""
    at = [index for index, step in enumerate(steps) if step.name in NON_LINEARITIES]
    if len(at) != 1:
        return None
    before, after = (affine(part, kernels, positions) for part in (steps[: at[0]], steps[at[0] + 1 :]))
    if before is None or after is None or after.shift:
        return None
    return Pointwise(before, steps[at[0]].name, after.gain)


def attend(q: Tensor, bank: TwoStepBank, p: Params, s: Setting) -> Tensor:
    """gain * f(scale q k^T + p) v. The scales go into q and v, which are small."""
    (B, h, T, _), n = q.shape, bank.key.shape[2]
    steps, added = pointwise(s.spec.activation, n, T), logits(bank, p, s)
    assert steps is not None
    if added is not None and steps.before.gain != 1:
        added = added * steps.before.gain
    if steps.before.shift:
        added = q.new_full((1, 1, 1), steps.before.shift) if added is None else added + steps.before.shift
    if added is not None:
        added = added.expand(h, T, n)
    q = q * (bank.scale * steps.before.gain)
    key, value = bank.key.expand(B, -1, -1, -1), bank.value.expand(B, -1, -1, -1)
    value = (value * steps.gain).to(q.dtype)
    key, added = key.to(q.dtype), None if added is None else added.to(q.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, key, value, added)):
        return _Weighted.apply(q, key, value, added, steps.name)
    return _forward(q, key, value, added, NON_LINEARITIES[steps.name], None, s)


class _Weighted(torch.autograd.Function):
    """f(q k^T + p) v with q (B, h, T, e), k (B, h, n, e), v (B, h, n, d), p (h, T, n)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, key: Tensor, value: Tensor, added: Tensor | None, name: str) -> Tensor:
        (B, h, T, _), n = q.shape, key.shape[2]
        kept = q.new_empty(B * h, T, n)
        ctx.name, ctx.added = name, added is not None
        ctx.save_for_backward(q, key, value, kept)
        return _forward(q, key, value, added, NON_LINEARITIES[name], kept, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, key, value, kept = ctx.saved_tensors
        f, (B, h, T, _), n = NON_LINEARITIES[ctx.name], q.shape, key.shape[2]
        q, key, value, g = (t.flatten(0, 1) for t in (q, key, value, grads[0]))
        d_q, d_key, d_value = torch.empty_like(q), torch.zeros_like(key), torch.zeros_like(value)
        d_added = q.new_zeros(h, T, n) if ctx.added else None
        for pairs, rows in chunks(B, h, T, n):
            at = kept[pairs, rows]
            d_a = torch.bmm(g[pairs, rows], value[pairs].mT)
            a = at if f.keeps_output else f.apply(at.clone())
            d_value[pairs].baddbmm_(a.mT, g[pairs, rows])
            d_s = f.derivative(d_a, at)
            torch.bmm(d_s, key[pairs], out=d_q[pairs, rows]) if rows == slice(0, T) else d_q[pairs, rows].copy_(
                torch.bmm(d_s, key[pairs])
            )
            d_key[pairs].baddbmm_(d_s.mT, q[pairs, rows])
            if d_added is not None:
                for head, part in _by_image(pairs, h, d_s):
                    d_added[head, rows] += part.sum(0)
        shaped = (t.unflatten(0, (B, h)) for t in (d_q, d_key, d_value))
        return (*shaped, d_added, None)


def _forward(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None,
    f: NonLinearity,
    kept: Tensor | None,
    s: Setting | None,
) -> Tensor:
    """The output (B, h, T, d); `kept` (B h, T, n) is filled for the backward pass if it is given."""
    (B, h, T, _), n = q.shape, key.shape[2]
    q, key, value = (t.flatten(0, 1) for t in (q, key, value))
    o = q.new_empty(B, h, T, value.shape[2])
    flat = o.flatten(0, 1)
    buffer = q.new_empty(0) if kept is None else kept
    for pairs, rows in chunks(B, h, T, n):
        queries = q[pairs, rows]
        if kept is None and s is not None and s.linear is onednn and len(queries) == 1:
            scores = onednn(queries[0], key[pairs.start], None)[None]
        else:
            size = (len(queries), queries.shape[1], n)
            room = buffer.resize_(size) if kept is None else torch.empty(size, dtype=q.dtype, device=q.device)
            scores = torch.bmm(queries, key[pairs].mT, out=room)
        if added is not None:
            for head, part in _by_image(pairs, h, scores):
                part.add_(added[head, rows])
        if kept is not None and not f.keeps_output:
            kept[pairs, rows] = scores
        a = f.apply(scores)
        if kept is not None and f.keeps_output:
            kept[pairs, rows] = a
        flat[pairs, rows] = torch.bmm(a, value[pairs])
    return o


def chunks(B: int, h: int, T: int, n: int) -> Iterator[tuple[slice, slice]]:
    """(pairs of image and head, queries) of at most about CHUNK scores: whole images, then heads, then rows."""
    together = max(1, CHUNK // max(T * n, 1))
    if together >= h:
        step = together // h * h
    else:
        step = max(size for size in range(1, together + 1) if h % size == 0)
    rows = T if together > 1 else max(1, min(T, CHUNK // n))
    for start in range(0, B * h, step):
        for row in range(0, T, rows):
            yield slice(start, min(start + step, B * h)), slice(row, min(row + rows, T))


def _by_image(pairs: slice, h: int, scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(heads, scores (images, heads, rows, n)) of a chunk, which holds whole images or heads of one."""
    if scores.shape[0] >= h:
        yield slice(0, h), scores.view(-1, h, *scores.shape[1:])
    else:
        yield slice(pairs.start % h, (pairs.stop - 1) % h + 1), scores[None]
