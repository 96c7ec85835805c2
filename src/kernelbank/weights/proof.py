"""A proof that two models are the same: the same random images through both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.weights.architecture import Architecture
from kernelbank.weights.libraries import Absent

IMAGES, SEED, TOLERANCE = 2, 0, 1e-5
Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Proof:
    """max |difference| between the outputs of two models, and the largest |output|, over so many images."""

    difference: float
    scale: float
    images: int = IMAGES

    @property
    def holds(self) -> bool:
        """Whether the difference is within `TOLERANCE` of the largest output, and there is an output at all."""
        return self.difference <= TOLERANCE * self.scale and self.scale > 0


def prove(source: Callable[[], Model], target: Callable[[], Model], architecture: Architecture) -> Proof:
    """Run `IMAGES` random images through both models, built one after the other.

    Raises Absent where a library is not there, InputError where the difference is above `TOLERANCE`.
    """
    height, width = architecture.image
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(IMAGES, architecture.arguments["in_chans"], height, width, generator=generator)
    outputs = []
    with torch.inference_mode():
        for model in (source, target):
            outputs.append(model()(images).double())
    if outputs[0].shape != outputs[1].shape:
        raise InputError(f"not equal: outputs {tuple(outputs[0].shape)} and {tuple(outputs[1].shape)}")
    proof = Proof((outputs[0] - outputs[1]).abs().max().item(), outputs[0].abs().max().item())
    if proof.scale == 0:
        raise Absent("the outputs are all zero: nothing can be compared")
    if not proof.holds:
        raise InputError(f"not equal: max |difference| {proof.difference:.1e} on {IMAGES} random images, outputs up to "
                         f"{proof.scale:.1e}; legal: {TOLERANCE:g} of the largest output")  # fmt: skip
    return proof
