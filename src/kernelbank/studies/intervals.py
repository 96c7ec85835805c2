"""Intervals and p-values of a mean over seeds by Student's t, and Holm's correction. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, cast

from scipy import stats

CONFIDENCE = 0.95
_STUDENT = cast(Any, stats).t


@dataclass(frozen=True)
class Interval:
    """The mean of n values with its two-sided 95 % interval. `half` is half the width, or None for a single value."""

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float | None:
        """The lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end."""
        return None if self.half is None else self.mean + self.half


def interval(values: Sequence[float], resolution: float = 0.0) -> Interval:
    """Return the mean of `values`, which are paired differences, and its interval: mean ± t s / sqrt(n) with n - 1
    degrees of freedom.

    Args:
        values: At least one difference.
        resolution: A lower bound of the standard deviation s. Accuracies are multiples of one image, so that
            differences may be equal by chance; without the bound their interval would be empty.
    """
    if len(values) < 2:
        return Interval(values[0], None, 1)
    quantile = float(_STUDENT.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(mean(values), quantile * _error(values, resolution), len(values))


def p_above(values: Sequence[float], bound: float, resolution: float = 0.0) -> float:
    """The one-sided p-value of the hypothesis that the true mean is at most `bound`; 1 for fewer than two values."""
    if len(values) < 2:
        return 1.0
    error = _error(values, resolution)
    if not error:
        return 0.0 if mean(values) > bound else 1.0
    return float(_STUDENT.sf((mean(values) - bound) / error, len(values) - 1))


def p_below(values: Sequence[float], bound: float, resolution: float = 0.0) -> float:
    """The one-sided p-value of the hypothesis that the true mean is at least `bound`."""
    return p_above([-value for value in values], -bound, resolution)


def _error(values: Sequence[float], resolution: float) -> float:
    return max(stdev(values), resolution) / math.sqrt(len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's method (1979), in the given order. If the hypotheses with an adjusted
    p-value of at most alpha are rejected, the probability of any false rejection is at most alpha."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
