"""Compare two models by running the same random images through both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.weights.dialects import MissingLibraryError

IMAGES, SEED, TOLERANCE = 2, 0, 1e-5
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Proof:
    """The largest absolute difference between the outputs of two models and the largest absolute output."""

    difference: float
    scale: float
    images: int = IMAGES

    @property
    def holds(self) -> bool:
        """Whether the difference is within `TOLERANCE` of the largest output, and the outputs are not all zero."""
        return self.difference <= TOLERANCE * self.scale and self.scale > 0


def prove(source: Callable[[], Run], target: Callable[[], Run], spec: ModelSpec) -> Proof:
    """Run `IMAGES` random images through both models, which are built one after the other.

    Raises:
        MissingLibraryError: If a library is missing, or the outputs are all zero.
        InputError: If the outputs differ by more than `TOLERANCE` of the largest.
    """
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(IMAGES, spec.in_chans, *spec.image, generator=generator)
    outputs = []
    with torch.inference_mode():
        for model in (source, target):
            outputs.append(model()(images).double())
    if outputs[0].shape != outputs[1].shape:
        raise InputError(f"not equal: outputs {tuple(outputs[0].shape)} and {tuple(outputs[1].shape)}")
    proof = Proof((outputs[0] - outputs[1]).abs().max().item(), outputs[0].abs().max().item())
    if proof.scale == 0:
        raise MissingLibraryError("the outputs are all zero and cannot be compared")
    if not proof.holds:
        raise InputError(f"not equal: max |difference| {proof.difference:.1e} on {IMAGES} random images, outputs up to "
                         f"{proof.scale:.1e}; expected at most {TOLERANCE:g} of the largest output")  # fmt: skip
    return proof
