"""Attention with a pointwise activation. An entry of its map depends on no other entry, so the map is computed,
activated and used in chunks that fit the cache. Training stores one tensor of the size of the map: the activated scores
if the derivative can be computed from them, else the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.activation import POINTWISE
from kernelbank.ops.bank import TwoStepBank
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.expansion import LARGEST, expanded
from kernelbank.ops.kernel import logits
from kernelbank.ops.linear import onednn
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.closed_form import Affine, between_affine
from kernelbank.ops.paths.framed import attending
from kernelbank.ops.paths.linear import onednn_unsupported
from kernelbank.ops.paths.path import (
    MixerPath,
    Reason,
    first,
    kernel_count,
    needs_every_kernel,
    needs_no_dropout,
    needs_two_step,
)
from kernelbank.ops.paths.toeplitz import strips
from kernelbank.ops.transforms import differentiated, gradients
from kernelbank.spec.pipeline import Pipeline

CHUNK = 5 * 2**18
"""The most scores in a chunk, 5 MiB in float32: few enough for a shared cache, enough to be worth the threads."""
SMALL = 2**18
"""Scores up to which whole images share a chunk."""


@dataclass(frozen=True)
class NonLinearity:
    """`apply`, which may write over its argument, and `derivative`(gradient, stored). What is stored is the output or,
    without `stores_output`, the input."""

    apply: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    stores_output: bool = True


aten = torch.ops.aten
NON_LINEARITIES: dict[str, NonLinearity] = {
    "relu": NonLinearity(torch.relu_, lambda g, a: aten.threshold_backward(g, a, 0)),
    "relu2": NonLinearity(lambda s: s.relu_().square_(), lambda g, a: g * (2 * a.sqrt())),
    "exp": NonLinearity(torch.exp_, lambda g, a: g * a),
    "sigmoid": NonLinearity(torch.sigmoid_, aten.sigmoid_backward),
    "tanh": NonLinearity(torch.tanh_, aten.tanh_backward),
    "softplus": NonLinearity(F.softplus, lambda g, s: g * torch.sigmoid(s), stores_output=False),
    "gelu": NonLinearity(F.gelu, aten.gelu_backward, stores_output=False),
    "silu": NonLinearity(F.silu, aten.silu_backward, stores_output=False),
}


@dataclass(frozen=True)
class Pointwise:
    """gain * f(before(s))."""

    before: Affine
    name: str
    gain: float


def pointwise(steps: Pipeline, kernels: int, positions: int) -> Pointwise | None:
    """`steps` as an affine map, one non-linearity and a scale, or None."""
    parts = between_affine(steps, NON_LINEARITIES, kernels, positions)
    if parts is None or parts[2].shift:
        return None
    before, step, after = parts
    return _without_gain(Pointwise(before, step.name, after.gain))


def _without_gain(steps: Pointwise) -> Pointwise:
    """The same function with its gain inside the non-linearity where that is possible: g relu(s)^2 = relu(sqrt(g) s)^2
    and g exp(s) = exp(s + log g), whose values stay small in half precision."""
    before, sign, gain = steps.before, math.copysign(1.0, steps.gain), abs(steps.gain)
    match steps.name:
        case "relu2" if gain not in (0, 1):
            return Pointwise(Affine(before.gain * gain**0.5, before.shift * gain**0.5), "relu2", sign)
        case "exp" if gain not in (0, 1):
            return Pointwise(Affine(before.gain, before.shift + math.log(gain)), "exp", sign)
        case _:
            return steps


def attend(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """gain * f(scale q k^T + p) v."""
    return _attend(q, bank, p, s, Batched(q))


def attend_onednn(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """As `attend` without gradients, each product of a head by oneDNN's linear."""
    return _attend(q, bank, p, s, OneDNN())


def _attend(q: Tensor, bank: TwoStepBank, p: Params, s: Context, products: Batched | OneDNN) -> Tensor:
    (_, h, T, _), n = q.shape, bank.key.shape[2]
    steps = pointwise(s.spec.activation, n, T)
    assert steps is not None
    key, value = (side.expand(q.shape[0], -1, -1, -1).to(q.dtype) for side in (bank.key, bank.value))
    factors = Factors(bank.scale * steps.before.gain, steps.gain)
    f, grad = NON_LINEARITIES[steps.name], torch.is_grad_enabled()
    if s.geo.sides is not None and _too_large(h * T * n, q) and not s.geo.prefix and not grad:
        table = p["table.weight"]
        blocks = expanded((table,), ("strips", s.geo.grid), lambda: strips(table, s.geo.grid))
        add: Add | None = _from_strips(blocks, steps.before, s.geo.grid)
    else:
        added = _added(logits(bank, p, s), steps.before, (h, T, n), q)
        if grad and any(t is not None and t.requires_grad for t in (q, key, value, added)):
            return _Weighted.apply(q, key, value, added, factors, steps.name)[0]
        add = _from_matrix(added)
    return _forward(q, key, value, factors, add, f, None, products)


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


def _from_strips(blocks: Tensor, before: Affine, grid: tuple[int, int]) -> Add:
    """The relative position of a grid row at a time, read from `toeplitz.strips`."""
    H, W = grid

    def add(scores: Tensor, heads: slice, rows: slice) -> None:
        for y in range(rows.start // W, (rows.stop - 1) // W + 1):
            first, last = max(rows.start, y * W), min(rows.stop, (y + 1) * W)
            block = blocks[heads, first - y * W : last - y * W, (H - 1 - y) * W : (2 * H - 1 - y) * W]
            scores[:, :, first - rows.start : last - rows.start].add_(block, alpha=before.gain)
        if before.shift:
            scores.add_(before.shift)

    return add


class _Weighted(torch.autograd.Function):
    """g f(c q k^T + p) v with q (B, h, T, e), k (B, h, n, e), v (B, h, n, d), p (h, T, n) and the factors c, g."""

    @staticmethod
    def forward(
        q: Tensor, key: Tensor, value: Tensor, added: Tensor | None, factors: Factors, name: str
    ) -> tuple[Tensor, Tensor]:
        stored = q.new_empty(*q.shape[:3], key.shape[2])
        o = _forward(q, key, value, factors, _from_matrix(added), NON_LINEARITIES[name], stored, Batched(q))
        return o, stored

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Factors, str], output: tuple[Tensor, Tensor]
    ) -> None:
        q, key, value, added, ctx.factors, ctx.name = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros of the size of the map
        ctx.save_for_backward(q, key, value, added, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        q, key, value, added, stored = ctx.saved_tensors
        if differentiated(grads[0]):
            function = partial(_functional, factors=ctx.factors, name=ctx.name)
            return (*gradients(function, (q, key, value, added), ctx.needs_input_grad[:4], grads[0]), None, None)
        f, factors, products = NON_LINEARITIES[ctx.name], ctx.factors, Batched(q)
        d_q, d_key, d_value = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, key, value))
        d_added = q.new_zeros(stored.shape[1:]) if ctx.needs_input_grad[3] else None
        for images, heads, rows in chunks(*stored.shape):
            at, d_o = stored[images, heads, rows], grads[0][images, heads, rows]
            a = at if f.stores_output else f.apply(at.clone())
            d_a = products.map(d_o, value[images, heads], factors.output)
            d_s = f.derivative(d_a, at)
            d_value[images, heads] += products.transposed(a, d_o, factors.output)
            d_q[images, heads, rows] = products.narrow(d_s, key[images, heads], factors.scores)
            d_key[images, heads] += products.transposed(d_s, q[images, heads, rows], factors.scores)
            if d_added is not None:
                d_added[heads, rows] += d_s.sum(0)
        return d_q, d_key, d_value, d_added, None, None


def _functional(
    q: Tensor, key: Tensor, value: Tensor, added: Tensor | None, *, factors: Factors, name: str
) -> Tensor:  # fmt: skip
    """As `_Weighted`, by operations that torch differentiates to any order and transforms."""
    scores = q @ key.mT * factors.scores
    return POINTWISE[name](scores if added is None else scores + added) @ value * factors.output


@dataclass(frozen=True)
class Factors:
    """What the scores and the output are multiplied by, inside the products."""

    scores: float
    output: float


class Batched:
    """The products of a chunk, (images, heads) as one batch, into memory that all chunks share."""

    def __init__(self, like: Tensor) -> None:
        self._buffers = [like.new_empty(0), like.new_empty(0)]

    def map(self, q: Tensor, key: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
        """factor q k^T, (images, heads, rows, n), written to `out` if it is given."""
        return self._product(q, key.mT, factor, 0, out)

    def narrow(self, a: Tensor, value: Tensor, factor: float) -> Tensor:
        """factor a v, (images, heads, rows, d)."""
        return self._product(a, value, factor, 1)

    def transposed(self, a: Tensor, rows: Tensor, factor: float) -> Tensor:
        """factor a^T x, (images, heads, n, d)."""
        return self._product(a.mT, rows, factor, 1)

    def _product(self, a: Tensor, b: Tensor, factor: float, index: int, out: Tensor | None = None) -> Tensor:
        shape = (*a.shape[:3], b.shape[3])
        out = self._buffer(index, shape) if out is None else out
        flat, left, right = (t.flatten(0, 1) for t in (out, a, b))
        torch.baddbmm(flat, left, right, beta=0, alpha=factor, out=flat)
        return out

    def _buffer(self, index: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._buffers[index].numel() < size:
            self._buffers[index] = self._buffers[index].new_empty(size)
        return self._buffers[index][:size].view(shape)


class OneDNN:
    """The products of a chunk without gradients, one head after the other by oneDNN's linear."""

    def map(self, q: Tensor, key: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
        """As `Batched`; `out`, which gradients need, is not used."""
        return self._each(q * factor, key)

    def narrow(self, a: Tensor, value: Tensor, factor: float) -> Tensor:
        """As `Batched`."""
        return self._each(a, value.mT * factor)

    @staticmethod
    def _each(x: Tensor, weight: Tensor) -> Tensor:
        pairs = zip(x.flatten(0, 1), weight.flatten(0, 1), strict=True)
        return torch.stack([onednn(one, w, None) for one, w in pairs]).unflatten(0, x.shape[:2])


def _forward(
    q: Tensor, key: Tensor, value: Tensor, factors: Factors, add: Add | None, f: NonLinearity, stored: Tensor | None,
    products: Batched | OneDNN,
) -> Tensor:  # fmt: skip
    """The output (B, h, T, d), token by token in memory; `stored` (B, h, T, n) is filled for the backward pass."""
    (B, h, T, _), n = q.shape, key.shape[2]
    # not a view: autograd does not allow writing to a view that a custom function returns
    o = torch.empty_permuted((B, h, T, value.shape[3]), (0, 2, 1, 3), dtype=q.dtype, device=q.device)
    for images, heads, rows in chunks(B, h, T, n):
        place = None if stored is None else stored[images, heads, rows]
        contiguous = place is not None and place.is_contiguous() and f.stores_output
        a = products.map(q[images, heads, rows], key[images, heads], factors.scores, place if contiguous else None)
        if add is not None:
            add(a, heads, rows)
        if place is not None and not f.stores_output:
            place.copy_(a)
        a = f.apply(a)
        if place is not None and f.stores_output and not contiguous:
            place.copy_(a)
        o[images, heads, rows] = products.narrow(a, value[images, heads], factors.output)
    return o


def chunks(B: int, h: int, T: int, n: int) -> Iterator[tuple[slice, slice, slice]]:
    """(images, heads, queries): several small images, one image, some heads of it, or rows of two heads."""
    a_head = max(T * n, 1)
    images = max(1, SMALL // (h * a_head))
    heads = max(size for size in range(1, h + 1) if h % size == 0 and (size <= 2 or size * a_head <= CHUNK))
    rows = T if heads * a_head <= CHUNK else max(1, CHUNK // (n * heads))
    for image in range(0, B, images):
        for head in range(0, h, heads):
            for row in range(0, T, rows):
                yield (
                    slice(image, min(image + images, B)),
                    slice(head, head + heads),
                    slice(row, min(row + rows, T)),
                )


AHEAD = 1.5
"""The speed of oneDNN's linear relative to F.linear from which it also runs the products of attention
(docs/performance.md)."""
ONEDNN_KERNELS = 256
"""Kernels from which those products are large enough for it, one head at a time."""


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: other activations, hidden kernels, dropout, compilers, transforms."""
    if (reason := first(needs_two_step(s), needs_every_kernel(s), needs_no_dropout(s))) is not None:
        return reason
    if pointwise(s.spec.activation, 2, 2) is None:
        return "the activation is not one non-linearity between affine steps"
    if call.compiling:
        return "a compiler unrolls its chunks"
    return "it has no rule for transforms of torch.func" if call.transformed else None


def preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred on CPUs."""
    return "chunks of the map stay in the cache" if call.device == "cpu" else None


def onednn_path_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: gradients, and what oneDNN's linear does not support."""
    return first(unsupported(s, call, m), onednn_unsupported(call, m))


def onednn_path_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred for many kernels, on a machine where oneDNN's linear is much faster."""
    n, gain = kernel_count(s), m.gain("mkldnn", call.tokens)
    suits = n > ONEDNN_KERNELS and gain >= AHEAD and call.dtype == torch.float32
    return f"{n} kernels, and oneDNN's linear is {gain:.2f}x as fast as F.linear" if suits else None


ONEDNN = MixerPath("pointwise_onednn", attending(attend_onednn), onednn_path_unsupported, onednn_path_preferred)
PATH = MixerPath("pointwise", attending(attend), unsupported, preferred)
