"""Which activation pipelines have a closed form without an N x N map: affine ones, and one normaliser between affine
steps."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch

from kernelbank.spec.pipeline import Pipeline, Step

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


def between_affine(
    steps: Pipeline, names: Container[str], kernels: int, positions: int
) -> tuple[Affine, Step, Affine] | None:
    """The only step with a name in `names`, between the affine maps before and after it; None for other pipelines."""
    at = [index for index, step in enumerate(steps) if step.name in names]
    if len(at) != 1:
        return None
    before, after = (affine(part, kernels, positions) for part in (steps[: at[0]], steps[at[0] + 1 :]))
    return None if before is None or after is None else (before, steps[at[0]], after)


@dataclass(frozen=True)
class Moments:
    """A pipeline affine, normaliser over the kernels, affine."""

    before: Affine
    normaliser: str
    after: Affine


def moments(steps: Pipeline, kernels: int, positions: int) -> Moments | None:
    """`steps` as such a pipeline, or None."""
    parts = between_affine(steps, NORMALISERS, kernels, positions)
    if parts is None or parts[1].axis == "positions":
        return None
    before, step, after = parts
    return Moments(before, step.name, after)
