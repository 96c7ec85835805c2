"""Intervals, p-values and Holm's correction, by hand and by their properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelbank.studies.intervals import holm, interval, p_above, p_below


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, s = 1, t(0.975; 2) = 4.3027, half = 4.3027 / sqrt(3)."""
    estimate = interval([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.count) == (2.0, 3)
    assert estimate.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate.low == pytest.approx(2 - 2.484138, rel=1e-6) and estimate.high == pytest.approx(4.484138, rel=1e-6)
    alone = interval([1.5])
    assert (alone.mean, alone.half, alone.low, alone.high) == (1.5, None, None, None)


def test_equal_differences_are_no_certainty() -> None:
    """Accuracy comes in steps of an image: three equal differences have a spread of at least one."""
    assert interval([1.0, 1.0, 1.0], 0.3).half == pytest.approx(4.302653 * 0.3 / math.sqrt(3), rel=1e-6)
    assert p_above([1.0, 1.0], 0.0) == 0.0 and p_above([1.0, 1.0], 1.0) == 1.0
    assert 0.0 < p_above([1.0, 1.0], 0.0, 0.3) < 0.5


def test_p_values_by_hand() -> None:
    """t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom: P(T > t) = (1 - t / sqrt(2 + t^2)) / 2."""
    t = 2 * math.sqrt(3)
    assert p_above([1.0, 2.0, 3.0], 0.0) == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2)
    assert p_below([1.0, 2.0, 3.0], 4.0) == pytest.approx(p_above([1.0, 2.0, 3.0], 0.0))
    assert p_above([1.0, 2.0, 3.0], 2.0) == pytest.approx(0.5) and p_above([5.0], 0.0) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_monotone_and_between_the_raw_value_and_bonferroni(values: list[float]) -> None:
    adjusted = holm(values)
    for raw, value in zip(values, adjusted, strict=True):
        assert raw <= value <= min(1.0, raw * len(values)) + 1e-12
    assert [adjusted[i] for i in sorted(range(len(values)), key=values.__getitem__)] == sorted(adjusted)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(-5, 5))
def test_the_interval_and_the_p_value_agree(values: list[float], bound: float) -> None:
    estimate = interval(values, 0.1)
    assert estimate.low is not None
    if abs(estimate.low - bound) > 1e-6:
        assert (p_above(values, bound, 0.1) < 0.025) == (estimate.low > bound)
