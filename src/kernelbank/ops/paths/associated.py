"""Attention without its N x N map, linear in N. An affine activation lets the products change their order,
(q k^T) v = q (k^T v); a normaliser over the kernels needs the first two moments of a query's scores, and those have a
closed form through k^T k. See docs/performance.md for the derivation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelbank.ops.activation import EPS
from kernelbank.ops.bank import TwoStepBank
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.closed_form import affine, moments
from kernelbank.ops.paths.framed import attending
from kernelbank.ops.paths.path import (
    MixerPath,
    Reason,
    first,
    half_precision,
    kernel_count,
    needs_every_kernel,
    needs_no_dropout,
    needs_two_step,
)
from kernelbank.ops.paths.toeplitz import row_moments
from kernelbank.ops.position import matrix_rows, spread
from kernelbank.spec import Static

# ---- affine ----------------------------------------------------------------------------------------------


def attend_affine(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """g (scale q (k^T v) + p v) + c sum_j v_j, for the activation g s + c."""
    a = affine(s.spec.activation, bank.key.shape[2], q.shape[2])
    assert a is not None
    o = q @ _key_value(bank.key, bank.value, bank.scale * a.gain)
    if s.geo.sides is not None:
        o = torch.add(o, by_position(bank.value, p, s), alpha=a.gain)
    constant = a.shift * bank.value.sum(2, keepdim=True) if a.shift else None
    if bank.key_bias is not None:
        constant = a.gain * (bank.key_bias @ bank.value) + (0 if constant is None else constant)
    return o if constant is None else o + constant


def _key_value(key: Tensor, value: Tensor, factor: float) -> Tensor:
    """factor k^T v, (B, h, e, d), without a pass over the keys for the factor."""
    pairs = key.shape[:2]
    product = torch.baddbmm(key.new_zeros(1, 1, 1), key.mT.flatten(0, 1), value.flatten(0, 1), beta=0, alpha=factor)
    return product.unflatten(0, pairs)


def by_position(x_BhTd: Tensor, p: Params, s: Context) -> Tensor:
    """sum_j p_ij x_j, head by head, (B, h, T, d)."""
    x_BTC = x_BhTd.transpose(1, 2).flatten(2)
    return spread(x_BTC, p, s).unflatten(2, (s.heads, -1)).transpose(1, 2)


# ---- moments ---------------------------------------------------------------------------------------------


def attend_moments(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """(sum_j (s_ij - mu_i) v_j) / sigma_i, with keys and values centred first where the mean is subtracted."""
    steps = moments(s.spec.activation, bank.key.shape[2], q.shape[2])
    assert steps is not None
    centred = steps.normaliser in ("center", "layernorm")
    key, value = (t - t.mean(2, keepdim=True) if centred else t for t in (bank.key, bank.value))
    q = q * (bank.scale * steps.before.gain)
    o = q @ (key.mT @ value)
    if s.geo.sides is not None:
        o = o + steps.before.gain * by_position(value, p, s)
    if steps.normaliser != "center":
        squares, n = _sum_of_squares(q, key, p, s, steps.before.gain, centred), bank.key.shape[2]
        o = o / (squares.clamp(min=EPS**2).sqrt() if steps.normaliser == "l2" else (squares / n + EPS).sqrt())
    o = (o * steps.after.gain).to(value.dtype)
    return o + steps.after.shift * bank.value.sum(2, keepdim=True) if steps.after.shift else o


def _sum_of_squares(q: Tensor, key: Tensor, p: Params, s: Context, gain: float, centred: bool) -> Tensor:
    """sum_j s_ij^2, or sum_j (s_ij - mu_i)^2 with centred keys, (B, h, T, 1): q (k^T k) q + 2 q . (p k) + sum p^2.

    Rows where these terms cancel, so that too few digits are left, are summed kernel by kernel.
    """
    gram = key.mT @ key
    quadratic = ((q @ gram) * q).sum(-1, keepdim=True)
    bound = (q * q).sum(-1, keepdim=True) * gram.square().sum((-1, -2), keepdim=True).sqrt()
    total = quadratic
    if s.geo.sides is not None:
        squares = row_moments(p["table.weight"], p.get("table.prefix"), s.geo.grid, s.geo.prefix)[centred]
        own = gain**2 * squares[..., None].to(q.dtype)
        total = total + 2 * gain * (q * by_position(key, p, s)).sum(-1, keepdim=True) + own
        bound = bound + own
    doubtful = (total < 0.25 * torch.finfo(q.dtype).eps ** 0.25 * bound)[..., 0]
    if bool(doubtful.any()):
        total = _with_exact_rows(total, doubtful, q, key, p, s, gain, centred)
    return total.clamp(min=0)


def _with_exact_rows(
    total: Tensor, rows: Tensor, q: Tensor, key: Tensor, p: Params, s: Context, gain: float, centred: bool
) -> Tensor:
    """`total` with the marked rows (B, h, T) summed kernel by kernel."""
    for b, i in rows.any(-1).nonzero().tolist():
        at = rows[b, i].nonzero()[:, 0]
        scores = q[b, i, at] @ key[b if key.shape[0] > 1 else 0, i].mT
        if s.geo.sides is not None:
            scores = scores + gain * matrix_rows(p, s.geo, i, at)
        if centred:
            scores = scores - scores.mean(-1, keepdim=True)
        index = torch.full_like(at, b), torch.full_like(at, i), at
        total = total.index_put(index, (scores**2).sum(-1, keepdim=True))
    return total


# ---- paths -----------------------------------------------------------------------------------------------

LINEAR_TIME = 190
"""Kernels from which the closed form of a normaliser beats chunks of its map (docs/performance.md)."""


def affine_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: activations that are not affine, hidden kernels, dropout."""
    if (reason := first(needs_two_step(s), needs_every_kernel(s), needs_no_dropout(s))) is not None:
        return reason
    if affine(s.spec.activation, 1, 1) is None:
        return "the activation is not affine, so the products keep their order"
    return None


def affine_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred for more kernels than channels per head."""
    n, d = kernel_count(s), s.dim // s.heads * s.spec.size**2
    return f"q (k^T v) costs {d} per query, (q k^T) v {n}" if n > d else None


def moments_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: other activations, hidden kernels, dropout, half precision, values that cannot be read."""
    if (reason := first(needs_two_step(s), needs_every_kernel(s), needs_no_dropout(s))) is not None:
        return reason
    steps = moments(s.spec.activation, 2, 2)
    if steps is None:
        return "the activation is not one normaliser over kernels between affine steps"
    if steps.before.shift and steps.normaliser in ("rmsnorm", "l2"):
        return f"a shift before {steps.normaliser} is not in its closed form"
    if isinstance(s.spec.bank, Static) and s.spec.bias and s.spec.frame == "bare":
        return "a key bias is not in its closed form"
    if half_precision(call):
        return "sums of squares cancel in half precision"
    readable = not call.compiling and not call.transformed and call.device != "meta"
    return None if readable else "its guard reads values, which traced, transformed and meta tensors do not have"


def moments_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Many kernels, on a CPU: elsewhere the guard would wait for the device."""
    n = kernel_count(s)
    if call.device != "cpu":
        return None
    return f"linear in {n} kernels (from {LINEAR_TIME} on)" if n >= LINEAR_TIME else None


def has_table(s: Context) -> bool:
    """Whether there is a relative table."""
    return s.geo.sides is not None


AFFINE = MixerPath("associated", attending(attend_affine), affine_unsupported, affine_preferred, has_table)
MOMENTS = MixerPath("moments", attending(attend_moments), moments_unsupported, moments_preferred, has_table)
