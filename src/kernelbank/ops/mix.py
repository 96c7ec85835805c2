"""The mix axis: how the kernels that a position sees combine. `stack` leaves them as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.bank import TwoStepBank, generate_taps, generator_dtype
from kernelbank.ops.context import Context, Params
from kernelbank.ops.frame import linear, linear_dtype
from kernelbank.ops.geometry import axis_visibility, cached, pool_cells
from kernelbank.ops.precision import full_precision, wide
from kernelbank.spec import All, Dynamic, Own, Pool, Predict, Project


def project(bank: TwoStepBank, p: Params, s: Context) -> TwoStepBank:
    """r learned combinations of the n kernels: E^T k, F^T v (Linformer, arXiv 2006.04768)."""
    if not isinstance(s.spec.mix, Project):
        return bank
    E, other = p["E"], p.get("F", p["E"])
    return bank._replace(key=E.t().to(bank.key) @ bank.key, value=other.t().to(bank.value) @ bank.value)


def average(values_BnX: Tensor, s: Context) -> Tensor:
    """The mean of values over V_i, in float32 or wider: (B, 1, X) where every position sees all of them, else
    (B, T, X)."""
    if isinstance(s.geo.support, All) and s.mask is None:
        return values_BnX.mean(1, keepdim=True, dtype=wide(values_BnX.dtype))
    values_BnX = values_BnX.to(wide(values_BnX.dtype))
    if isinstance(s.spec.support, Own):
        return values_BnX
    if s.mask is None:
        return _mean_by_axes(values_BnX, s)
    visible = s.mask[:, 0] if s.visible is None else s.visible[:, 0]
    visible = visible.to(values_BnX.dtype)
    return (visible / visible.sum(-1, keepdim=True).clamp(min=1)) @ values_BnX


def _mean_by_axes(values_BnX: Tensor, s: Context) -> Tensor:
    """What a grid position sees is the product of its axes, so a sum over it is a sum along y, then along x."""
    (H, W), P, support = s.geo.grid, s.geo.prefix, s.geo.support
    rows, columns = (cached(axis_visibility, support, side, s.geo.device).to(values_BnX.dtype) for side in (H, W))
    prefix, on_grid = values_BnX[:, :P].sum(1, keepdim=True), values_BnX[:, P:]
    summed = (rows @ on_grid.unflatten(1, (H, W)).flatten(2)).unflatten(2, (W, -1))  # (B, H, W, X)
    count = (rows.sum(1)[:, None] * columns.sum(1)[None, :]).flatten()[:, None] + P
    means = ((columns @ summed).flatten(1, 2) + prefix) / count
    return torch.cat([values_BnX.mean(1, keepdim=True).expand(-1, P, -1), means], 1) if P else means


def generated_kernel(source_BTC: Tensor, p: Params, s: Context) -> tuple[Tensor, Tensor]:
    """(kernel (B, 1 or T, R, t), taps (B, n, R, t)): the one-step kernel of a dynamic bank, and what was averaged.

    `mean` generates, then averages; `pool` averages the features, then generates. Runs outside autocast.
    """
    assert isinstance(s.spec.bank, Dynamic)
    with full_precision(source_BTC):
        features = pool_cells(source_BTC.to(generator_dtype(p, s)), s.spec.bank.stride, s.geo)
        if isinstance(s.spec.mix, Pool):
            pooled = average(features, s).to(features.dtype)
            taps, _ = generate_taps(pooled, p, s)
            kernel = taps
        else:
            taps, _ = generate_taps(features, p, s)
            kernel = average(taps, s)
        shape = (s.shared, s.spec.size**2)
        return kernel.unflatten(-1, shape), taps.unflatten(-1, shape)


def coefficients(source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """pi (B, K): softmax(z / tau) or sigmoid(z / tau), z predicted from the features pooled over all tokens."""
    assert isinstance(s.spec.mix, Predict)
    with full_precision(source_BTC):
        first = "predict" if s.spec.mix.r is None else "reduce"
        z = source_BTC.to(wide(source_BTC.dtype)).mean(1).to(linear_dtype(p, first, s))
        if s.spec.mix.r is not None:
            z = F.relu(linear(z, p, "reduce", s))
        z = linear(z, p, "predict", s).to(wide(z.dtype))
        z = z / (s.temperature if s.training and s.temperature is not None else s.spec.mix.tau)
        return torch.softmax(z, -1) if s.spec.mix.gate == "softmax" else torch.sigmoid(z)


def learned_kernel(source_BTC: Tensor, p: Params, s: Context) -> tuple[Tensor, Tensor | None]:
    """(weight (B or 1, C_out, C_in/g, k, k), bias (B or 1, C) or None) of a static one-step bank."""
    weight, bias = p["weight"], p.get("bias")
    if not isinstance(s.spec.mix, Predict):
        return weight, bias
    pi = coefficients(source_BTC, p, s)
    with full_precision(source_BTC):
        mixed = torch.einsum("bk,k...->b...", pi, weight.to(pi.dtype)).to(weight.dtype)
        return mixed, None if bias is None else (pi @ bias.to(pi.dtype)).to(bias.dtype)
