"""The statistics of BatchNorm: of this process's batch, or inside `synchronised` of the batches of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.scope import Scope

EPS, MOMENTUM = 1e-5, 0.1  # torch.nn.BatchNorm's


_synchronised = Scope("kernelbank_synchronised", False)


@contextmanager
def synchronised() -> Iterator[None]:
    """Compute the statistics in training over all processes, as torch's SyncBatchNorm, on any device.

    Every process must run the same forward passes. Without a process group this has no effect.
    """
    with _synchronised.entered(True):
        yield


def over_processes() -> bool:
    """Whether statistics are summed over processes."""
    return _synchronised.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Sum(torch.autograd.Function):
    """The sum over processes. Its gradient is the sum of their gradients, since the loss of every process depends on
    it. Both are linear, so that derivatives of any order and in forward mode are sums too."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.apply(grads[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _Sum.apply(tangents[0])


def total(x: Tensor) -> Tensor:
    """Return `x` summed over processes if statistics are, else `x`."""
    if not over_processes():
        return x
    summed: Tensor = _Sum.apply(x)
    return summed


def batch_norm(
    x_NC: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, momentum: float, eps: float
) -> Tensor:
    """BatchNorm of (N, C) over N; `mean` and `var` are the running statistics, which training moves by `momentum`.

    The biased variance normalises and the unbiased one is stored. Statistics are computed in float32 or wider.
    """
    if not (training and over_processes()):
        return F.batch_norm(x_NC, mean, var, weight, bias, training, momentum, eps)
    x = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    sums = total(torch.cat([x.new_tensor([len(x)]), x.sum(0)]))
    n, batch_mean = sums[0].detach(), sums[1:] / sums[0].detach()
    centred = x - batch_mean
    batch_var = total((centred**2).sum(0)) / n
    with torch.no_grad():
        mean.lerp_(batch_mean.to(mean.dtype), momentum)
        var.lerp_((batch_var * n / (n - 1).clamp(min=1)).to(var.dtype), momentum)
    return (centred / (batch_var + eps).sqrt() * weight + bias).to(x_NC.dtype)
