"""The activation axis: its two tables, and values worked by hand."""

from __future__ import annotations

import pytest
import torch

from kernelbank.ops.activation import OVER, POINTWISE, activate
from kernelbank.spec.pipeline import STEPS, read_pipeline


def apply(text: str, scores: list[float], visible: list[bool] | None = None) -> list[float]:
    s = torch.tensor(scores, dtype=torch.float64).view(1, 1, 1, -1)
    V = None if visible is None else torch.tensor(visible).view(1, 1, 1, -1)
    return activate(s, V, read_pipeline(text), {}).flatten().tolist()


def test_every_step_has_its_function_and_every_function_its_step() -> None:
    assert {*POINTWISE, *OVER, "scale", "batchnorm"} == STEPS.keys()
    assert not POINTWISE.keys() & OVER.keys()


def test_softmax_is_torch_softmax_at_any_size_of_logit() -> None:
    logits = [1e4, 1e4 - 1, -1e4, 3.0]
    expected = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0).tolist()
    assert apply("softmax", logits) == pytest.approx(expected, abs=1e-15)
    tempered = torch.softmax(torch.tensor(logits, dtype=torch.float64) / 2, 0).tolist()
    assert apply("softmax(2)", logits) == pytest.approx(tempered, abs=1e-15)


@pytest.mark.parametrize(("text", "expected"), [
    ("relu,count", [0.5, 0, 0, 0]), ("identity,count", [0.5, -1, 0, 0]),
    ("log_count", [1 - 0.6931471805599453, -2.6931471805599453, 0, 0]),
    ("l1", [1 / 3, -2 / 3, 0, 0]), ("l2", [1 / 5**0.5, -2 / 5**0.5, 0, 0]), ("center", [1.5, -1.5, 0, 0]),
    ("sqrt_count", [1 / 2**0.5, -2 / 2**0.5, 0, 0]), ("sigmoid", [0.7310585786300049, 0.11920292202211755, 0, 0]),
    ("layernorm", [1.5 / (2.25 + 1e-6) ** 0.5, -1.5 / (2.25 + 1e-6) ** 0.5, 0, 0]),
    ("rmsnorm", [1 / (2.5 + 1e-6) ** 0.5, -2 / (2.5 + 1e-6) ** 0.5, 0, 0]),
    ("softmax", [0.9525741268224334, 0.04742587317756678, 0, 0]),
])  # fmt: skip
def test_only_visible_entries_count(text: str, expected: list[float]) -> None:
    """Two of four visible: n = 2, and invisible entries are zero whatever they held."""
    assert apply(text, [1, -2, 77, -55], [True, True, False, False]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_a_row_that_sees_nothing_stays_zero_and_finite(name: str) -> None:
    step = "scale(2)" if name == "scale" else name
    statistics = {
        "weight": torch.ones(1),
        "bias": torch.ones(1),
        "running_mean": torch.ones(1),
        "running_var": torch.ones(1),
    }
    params = {f"activation_norm.{n}": t for n, t in statistics.items()}
    s = torch.full((1, 1, 1, 3), 5.0, dtype=torch.float64, requires_grad=True)
    a = activate(s, torch.zeros(1, 1, 1, 3, dtype=torch.bool), read_pipeline(step), params)
    a.sum().backward()
    assert not a.any() and not s.grad.any()


def test_dead_rows_have_finite_gradients() -> None:
    """relu kills the row; l1 and l2 divide by eps, not by zero, and sqrt has no infinite slope there."""
    for text in ("relu,l1", "relu,l2", "relu,rmsnorm", "relu,layernorm"):
        s = torch.full((1, 1, 1, 4), -1.0, requires_grad=True)
        activate(s, None, read_pipeline(text), {}).sum().backward()
        assert s.grad.isfinite().all(), text
