"""The activation axis: the functions between the two steps. An activation is a function here and an entry in
`pipeline.STEPS`; pointwise steps take the scores, normalisers take the scores and what is visible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.statistics import MOMENTUM, total
from kernelbank.spec.pipeline import Pipeline, Step

EPS = 1e-6
"""The epsilon of every normaliser."""


class Scores(NamedTuple):
    """Scores (B, h, T, n) with what is visible: V broadcastable to them, or None when everything is.

    `dim` is the axis a normaliser runs over: -1 the kernels a position sees, -2 the positions that see a kernel.
    """

    a: Tensor
    visible: Tensor | None
    dim: int = -1

    @property
    def n(self) -> Tensor | int:
        """How many entries are visible along the axis, at least 1 so that an empty row stays zero."""
        if self.visible is None:
            return self.a.shape[self.dim]
        return self.visible.sum(self.dim, keepdim=True).clamp(min=1).to(self.a.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the axis; invisible entries are zero already."""
        return values.sum(self.dim, keepdim=True)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over visible entries of the axis."""
        return self.sum(values) / self.n

    def hide(self, values: Tensor) -> Tensor:
        """Zero at invisible entries."""
        return values if self.visible is None else torch.where(self.visible, values, 0)


def _l2(s: Scores) -> Tensor:
    # max(sqrt(x), eps) = sqrt(max(x, eps^2)): the latter has a gradient at x = 0.
    return s.a / s.sum(s.a**2).clamp(min=EPS**2).sqrt()


def _layernorm(s: Scores) -> Tensor:
    centred = s.hide(s.a - s.mean(s.a))
    return centred / (s.mean(centred**2) + EPS).sqrt()


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "relu": F.relu,
    "relu2": lambda a: F.relu(a) ** 2,
    "cube": lambda a: a**3,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "silu": F.silu,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}

OVER: dict[str, Callable[[Scores], Tensor]] = {
    "log_count": lambda s: s.a - torch.as_tensor(s.n, dtype=s.a.dtype, device=s.a.device).log(),
    "count": lambda s: s.a / s.n,
    "sqrt_count": lambda s: s.a / s.n**0.5,
    "l1": lambda s: s.a / s.sum(s.a.abs()).clamp(min=EPS),
    "l2": _l2,
    "rmsnorm": lambda s: s.a / (s.mean(s.a**2) + EPS).sqrt(),
    "center": lambda s: s.a - s.mean(s.a),
    "layernorm": _layernorm,
}


def activate(
    scores: Tensor, visible: Tensor | None, steps: Pipeline, params: Mapping[str, Tensor], training: bool = False
) -> Tensor:
    """The pipeline over scores (B, h, T, n); `visible` broadcasts to them. Statistics run in float32 or wider.

    Invisible entries are zero before and after every step. `params` holds activation_norm of a batchnorm step,
    whose running statistics are updated in training.
    """
    a = scores.to(torch.promote_types(scores.dtype, torch.float32))
    a = Scores(a, visible).hide(a)
    for step, following in zip(steps, (*steps[1:], None), strict=True):
        s = Scores(a, visible, -2 if step.axis == "positions" else -1)
        a = s.hide(_apply(step, following, s, params, training))
    return a.to(scores.dtype)


def _apply(step: Step, following: Step | None, s: Scores, params: Mapping[str, Tensor], training: bool) -> Tensor:
    if step.argument is not None:
        return s.a * step.argument  # scale(x), the one step with an argument
    if step.name == "batchnorm":
        return _batchnorm(s, params, training)
    if step.name in OVER:
        return OVER[step.name](s)
    if step.name == "exp" and following is not None and following.name in ("l1", "l2"):
        return torch.exp(_below_maximum(s, -2 if following.axis == "positions" else -1))
    return POINTWISE[step.name](s.a)


def _below_maximum(s: Scores, dim: int) -> Tensor:
    """a - max a over `dim`, visible entries only; -inf where invisible. The normaliser that follows divides the
    maximum out, so it carries no gradient."""
    if s.visible is None:
        return s.a - s.a.detach().amax(dim, keepdim=True)
    a = torch.where(s.visible, s.a, -torch.inf)
    top = a.detach().amax(dim, keepdim=True)
    return a - torch.where(top.isinf(), 0, top)


def _batchnorm(s: Scores, params: Mapping[str, Tensor], training: bool) -> Tensor:
    """One set of statistics and one affine per head, over batch, queries and visible kernels."""
    weight, bias = (params[f"activation_norm.{n}"].view(-1, 1, 1).to(s.a.dtype) for n in ("weight", "bias"))
    mean, var = params["activation_norm.running_mean"], params["activation_norm.running_var"]
    if training:
        weights = torch.ones_like(s.a) if s.visible is None else s.visible.expand_as(s.a).to(s.a.dtype)
        n = total(weights.sum((0, 2, 3)))
        batch_mean = total(s.a.sum((0, 2, 3))) / n
        batch_var = total((weights * (s.a - batch_mean.view(-1, 1, 1)) ** 2).sum((0, 2, 3))) / n
        with torch.no_grad():
            mean.lerp_(batch_mean.to(mean.dtype), MOMENTUM)
            var.lerp_((batch_var * n / (n - 1).clamp(min=1)).to(var.dtype), MOMENTUM)
        mean, var = batch_mean, batch_var
    normed = (s.a - mean.view(-1, 1, 1).to(s.a.dtype)) / (var.view(-1, 1, 1).to(s.a.dtype) + EPS).sqrt()
    return weight * normed + bias
