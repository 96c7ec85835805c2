"""Which activation pipelines have a closed form without an N x N map: affine ones, and one normaliser between affine
steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernelbank.spec.pipeline import Pipeline

NORMALISERS = ("center", "layernorm", "rmsnorm", "l2")


@dataclass(frozen=True)
class Affine:
    """x -> gain x + shift."""

    gain: float = 1.0
    shift: float = 0.0


def affine(steps: Pipeline, kernels: int, positions: int) -> Affine | None:
    """A pipeline of affine steps as one, over so many visible kernels and positions; None if a step is not affine."""
    gain, shift = 1.0, 0.0
    for step in steps:
        n = positions if step.axis == "positions" else kernels
        match step.name:
            case "identity":
                factor = 1.0
            case "scale":
                factor = step.argument or 1.0
            case "count":
                factor = 1 / n
            case "sqrt_count":
                factor = n**-0.5
            case "log_count":
                factor, shift = 1.0, shift - float(torch.tensor(float(n), dtype=torch.float64).log())
            case _:
                return None
        gain, shift = gain * factor, shift * factor
    return Affine(gain, shift)


@dataclass(frozen=True)
class Moments:
    """A pipeline affine, normaliser over the kernels, affine."""

    before: Affine
    normaliser: str
    after: Affine


def moments(steps: Pipeline, kernels: int, positions: int) -> Moments | None:
    """`steps` as such a pipeline, or None."""
    at = [index for index, step in enumerate(steps) if step.name in NORMALISERS]
    if len(at) != 1 or steps[at[0]].axis == "positions":
        return None
    before, after = (affine(part, kernels, positions) for part in (steps[: at[0]], steps[at[0] + 1 :]))
    return None if before is None or after is None else Moments(before, steps[at[0]].name, after)
