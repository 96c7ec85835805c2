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
from kernelbank.ops.expansion import LARGEST, expanded
from kernelbank.ops.kernel import logits
from kernelbank.ops.linear import onednn
from kernelbank.ops.setting import Params, Setting
from kernelbank.ops.toeplitz import strips
from kernelbank.pipeline import Pipeline

CHUNK = 2**20
"""The most scores in a chunk, 4 MiB in float32: few enough for a shared cache, enough to be worth the threads."""
SMALL = 2**18
"""Scores up to which whole images share a chunk."""


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
    steps = pointwise(s.spec.activation, n, T)
    assert steps is not None
    q = q * (bank.scale * steps.before.gain)
    key, value = (side.expand(B, -1, -1, -1).to(q.dtype) for side in (bank.key, bank.value))
    value = value * steps.gain
    f, grad = NON_LINEARITIES[steps.name], torch.is_grad_enabled()
    if s.geo.sides is not None and _too_large(h * T * n, q) and not s.geo.prefix and not grad:
        table = p["table.weight"]
        made = expanded((table,), ("strips", s.geo.grid), lambda: strips(table, s.geo.grid))
        return _forward(q, key, value, _from_strips(made, steps.before, s.geo.grid), f, None, s.linear is onednn)
    added = _added(logits(bank, p, s), steps.before, (h, T, n), q)
    if grad and any(t is not None and t.requires_grad for t in (q, key, value, added)):
        return _Weighted.apply(q, key, value, added, steps.name)
    return _forward(q, key, value, _from_matrix(added), f, None, s.linear is onednn)


Add = Callable[[Tensor, slice, slice], object]
"""(scores (images, heads, rows, n) of some heads and rows) -> the scores with what is added, in place."""


def _too_large(scores: int, like: Tensor) -> bool:
    return scores * like.element_size() > LARGEST


def _added(logits: Tensor | None, before: Affine, shape: tuple[int, int, int], like: Tensor) -> Tensor | None:
    """What is added to the scaled scores, (h, T, n)."""
    if logits is not None and before.gain != 1:
        logits = logits * before.gain
    if before.shift:
        logits = like.new_full((1, 1, 1), before.shift) if logits is None else logits + before.shift
    return None if logits is None else logits.expand(shape).to(like.dtype)


def _from_matrix(added: Tensor | None) -> Add | None:
    return None if added is None else lambda scores, heads, rows: scores.add_(added[heads, rows])


def _from_strips(made: Tensor, before: Affine, grid: tuple[int, int]) -> Add:
    """The relative position of a grid row at a time, read from `toeplitz.strips`."""
    H, W = grid

    def add(scores: Tensor, heads: slice, rows: slice) -> None:
        for y in range(rows.start // W, (rows.stop - 1) // W + 1):
            first, last = max(rows.start, y * W), min(rows.stop, (y + 1) * W)
            block = made[heads, first - y * W : last - y * W, (H - 1 - y) * W : (2 * H - 1 - y) * W]
            scores[:, :, first - rows.start : last - rows.start].add_(block, alpha=before.gain)
        if before.shift:
            scores.add_(before.shift)

    return add


class _Weighted(torch.autograd.Function):
    """f(q k^T + p) v with q (B, h, T, e), k (B, h, n, e), v (B, h, n, d), p (h, T, n)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, key: Tensor, value: Tensor, added: Tensor | None, name: str) -> Tensor:
        (B, h, T, _), n = q.shape, key.shape[2]
        kept = q.new_empty(B * h, T, n)
        ctx.name, ctx.added = name, added is not None
        ctx.save_for_backward(q, key, value, kept)
        return _forward(q, key, value, _from_matrix(added), NON_LINEARITIES[name], kept, False)

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
            d_q[pairs, rows] = torch.bmm(d_s, key[pairs])
            d_key[pairs].baddbmm_(d_s.mT, q[pairs, rows])
            if d_added is not None:
                for head, part in _by_image(pairs, h, d_s):
                    d_added[head, rows] += part.sum(0)
        shaped = (t.unflatten(0, (B, h)) for t in (d_q, d_key, d_value))
        return (*shaped, d_added, None)


def _forward(
    q: Tensor, key: Tensor, value: Tensor, add: Add | None, f: NonLinearity, kept: Tensor | None, by_onednn: bool
) -> Tensor:
    """The output (B, h, T, d); `kept` (B h, T, n) is filled for the backward pass if it is given."""
    (B, h, T, _), n = q.shape, key.shape[2]
    q, key, value = (t.flatten(0, 1) for t in (q, key, value))
    o = q.new_empty(B, h, T, value.shape[2])
    flat, room = o.flatten(0, 1), q.new_empty(0)
    for pairs, rows in chunks(B, h, T, n):
        queries = q[pairs, rows]
        if by_onednn and len(queries) == 1:
            scores = onednn(queries[0], key[pairs.start], None)[None]
        else:
            scores = torch.bmm(queries, key[pairs].mT, out=room.resize_(len(queries), queries.shape[1], n))
        if add is not None:
            for heads, part in _by_image(pairs, h, scores):
                add(part, heads, rows)
        if kept is not None and not f.keeps_output:
            kept[pairs, rows] = scores
        a = f.apply(scores)
        if kept is not None and f.keeps_output:
            kept[pairs, rows] = a
        flat[pairs, rows] = torch.bmm(a, value[pairs])
    return o


def chunks(B: int, h: int, T: int, n: int) -> Iterator[tuple[slice, slice]]:
    """(pairs of image and head, queries): several small images, one image, some heads of it, or rows of one head."""
    a_head = max(T * n, 1)
    if h * a_head <= CHUNK:
        step = h * max(1, SMALL // (h * a_head))
    else:
        step = max((size for size in range(1, h + 1) if h % size == 0 and size * a_head <= CHUNK), default=1)
    rows = T if step * a_head <= CHUNK or step > 1 else max(1, CHUNK // n)
    for start in range(0, B * h, step):
        for row in range(0, T, rows):
            yield slice(start, min(start + step, B * h)), slice(row, min(row + rows, T))


def _by_image(pairs: slice, h: int, scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(heads, scores (images, heads, rows, n)) of a chunk, which holds whole images or heads of one."""
    if scores.shape[0] >= h:
        yield slice(0, h), scores.view(-1, h, *scores.shape[1:])
    else:
        yield slice(pairs.start % h, (pairs.stop - 1) % h + 1), scores[None]
