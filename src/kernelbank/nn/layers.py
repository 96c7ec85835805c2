"""Layers around the mixer that timm lacks, and initialisation that depends on the names of parameters alone."""

from __future__ import annotations

import hashlib

import torch
import torch.fx
from torch import Tensor, nn

from kernelbank.nn.mixer import Mixer, initialise_tensor
from kernelbank.ops.statistics import batch_norm, over_processes
from kernelbank.spec.inventory import Tensor as Entry


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the batch and tokens of (B, T, C), the norm before the MLP of a bn_relu backbone. Inside
    `ops.statistics.synchronised` its statistics are over all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return _normed(self, x)


# A leaf of torch.fx, since torch's BatchNorm checks the shape.
torch.fx.wrap("_normed")


def _normed(norm: TokenBatchNorm, x: Tensor) -> Tensor:
    if not over_processes():
        return nn.BatchNorm1d.forward(norm, x.flatten(0, 1)).view(x.shape)
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    state = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return batch_norm(x.flatten(0, 1), *state, norm.training, norm.momentum, norm.eps).view(x.shape)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Initialise every parameter from the seed and its name alone, so that models with a parameter of the same name and
    shape start from the same values.

    The parameters of mixers are initialised as their inventory states. Elsewhere matrices are drawn from a truncated
    normal of standard deviation 0.02, as in timm's ViT; weights with one axis are 1 and biases 0.
    """
    entries: dict[str, Entry] = {}
    for path, module in model.named_modules():
        if isinstance(module, Mixer):
            entries |= {f"{path}.{entry.name}".lstrip("."): entry for entry in module.entries}
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(_name_seed(seed, name))
        initialise_tensor(parameter, entries.get(name) or _entry(name, parameter), generator)


def _name_seed(seed: int, name: str) -> int:
    """63 bits of the SHA-256 of "seed:name": the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _entry(name: str, parameter: Tensor) -> Entry:
    if name.endswith("bias"):
        return Entry(name, tuple(parameter.shape), "zeros")
    return Entry(name, tuple(parameter.shape), "linear" if parameter.ndim > 1 else "ones")
