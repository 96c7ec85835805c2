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
    """A mean over n values with its two-sided 95 % interval; `half` is None where one value says nothing of spread."""

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
    """The mean of `values`, which are paired differences, with its interval: mean ± t s / sqrt(n), n - 1 degrees of
    freedom.

    Args:
        values: At least one difference.
        resolution: The smallest standard deviation s to believe, so that differences which are equal because accuracy
            comes in steps of one image do not look certain.
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
    """The p-values adjusted by Holm (1979), in the order given: rejecting those of at most alpha keeps the chance of
    any false rejection in the family at alpha."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
