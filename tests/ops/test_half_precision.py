"""Half precision: scales come before what can overflow."""

from __future__ import annotations

import pytest
import torch
from equality import build
from strategies import Host

from kernelbank import use_path
from kernelbank.ops.paths import pointwise
from kernelbank.ops.paths.closed_form import Affine, affine
from kernelbank.spec import MixerSpec
from kernelbank.spec.pipeline import read_pipeline

HOST = Host(16, 2, (4, 4), 0, 2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("activation", "score"),
    [("relu2,count", 320.0), ("relu2,scale(-0.001)", 320.0), ("exp,count", 12.0), ("exp,scale(-0.0001)", 12.0)],
)
def test_the_chunked_path_is_finite_where_the_plain_path_is(activation: str, score: float, grad: bool) -> None:
    """The squares and exponentials of the largest scores exceed 65504, those of scaled scores do not."""
    mixer = build(MixerSpec.parse(f"relu_attention bias=False activation={activation}"), HOST).eval()
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.value.weight.mul_(0.1)  # so that the products with the values stay finite
        q, k = (linear(x).unflatten(2, (2, 8)).transpose(1, 2) for linear in (mixer.q, mixer.key))
        largest = float((q @ k.mT).abs().max()) * 8**-0.5
    x = x * (score / largest) ** 0.5
    mixer.half()
    outputs = {}
    for path in ("vectorised", "pointwise"):
        tokens = x.half().requires_grad_(grad)
        with torch.set_grad_enabled(grad), use_path(path, "linear"):
            y = mixer(tokens)
        outputs[path] = [y.detach()]
        if grad:
            outputs[path] += torch.autograd.grad(y.float().mean(), [tokens, *mixer.parameters()])
    for plain, chunked in zip(outputs["vectorised"], outputs["pointwise"], strict=True):
        assert bool(plain.isfinite().all()), "the comparison itself overflows"
        assert bool(chunked.isfinite().all())
        scale = float(plain.double().abs().max()) + 1e-3
        assert float((chunked.double() - plain.double()).abs().max()) < 0.05 * scale


@pytest.mark.parametrize(
    "text", ["relu2,count", "relu2,scale(-3)", "exp,count", "exp,scale(-0.5)", "gelu,count", "log_count,sigmoid"]
)
def test_a_gain_inside_is_the_same_function(text: str) -> None:
    steps = pointwise.pointwise(read_pipeline(text), 6, 5)
    assert steps is not None
    before = affine(read_pipeline("log_count"), 6, 5) if text.startswith("log") else Affine()
    s, name = torch.randn(50, dtype=torch.float64), steps.name
    gain = {"count": 1 / 6, "scale(-3)": -3.0, "scale(-0.5)": -0.5}.get(text.rpartition(",")[2], 1.0)
    f = pointwise.POINTWISE[name]
    ours = steps.gain * f(steps.before.gain * s + steps.before.shift)
    assert torch.allclose(ours, gain * f(before.gain * s + before.shift), rtol=1e-12)
    assert abs(steps.gain) == 1 or name not in ("relu2", "exp")
