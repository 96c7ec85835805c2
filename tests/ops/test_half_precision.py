"""Half precision: scales come before what can overflow."""

from __future__ import annotations

import copy

import pytest
import torch
from equality import build, normal
from strategies import Host
from torch import Tensor

from kernelbank import Mixer, use_path
from kernelbank.ops.paths import MIXER_PATHS, PathError, pointwise
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


ROWS = (
    "relu_attention", "relu_attention position=relative", "strided_bank",
    "swin support=window(2, 1)", "nat support=neighborhood(3)",
)  # fmt: skip
LARGEST = {
    "relu2,count": 320.0, "relu2,scale(-0.001)": 320.0, "relu2,sqrt_count": 200.0, "relu2,rmsnorm": 300.0,
    "relu2,l1": 300.0, "relu2,l2": 300.0, "cube,count": 45.0, "exp,count": 12.0, "exp,scale(-0.0001)": 12.0,
    "exp,l1": 20.0,
}  # fmt: skip
"""The largest score of each activation, whose square, cube or exponential exceeds 65504 in most cases."""


@pytest.mark.parametrize("activation", LARGEST)
@pytest.mark.parametrize("row", ROWS)
def test_every_path_is_the_exact_value_rounded(row: str, activation: str) -> None:
    """Outputs and gradients of every path in half precision equal the definition in float64, with the same weights."""
    text = f"{row} bias=False activation={activation}"
    exact = build(MixerSpec.parse(text), HOST).eval()
    x = normal(2, 16, 16, seed=2)
    with torch.no_grad():
        exact.value.weight.mul_(0.005)  # so that the outputs are far below 65504
        q, k = (linear(x).unflatten(2, (2, 8)).transpose(1, 2) for linear in (exact.q, exact.key))
        x = (x * (LARGEST[activation] / float((q @ k.mT).abs().max() * 8**-0.5)) ** 0.5).half()
        mixer = copy.deepcopy(exact).half()
        exact.load_state_dict({name: tensor.double() for name, tensor in mixer.state_dict().items()})
    defined, compared = results(exact, x.double(), "reference"), 0
    for path in MIXER_PATHS:
        if path == "reference":  # in half precision it rounds what the others keep in float32
            continue
        try:
            ours = results(mixer, x, path)
        except PathError:
            continue
        compared += 1
        for value, exactly in zip(ours, defined, strict=True):
            largest = float(exactly.abs().max()) + 1e-3
            assert float((value.double() - exactly).abs().max()) < 0.05 * largest, path
    assert compared >= 2


def results(mixer: Mixer, x: Tensor, path: str) -> list[Tensor]:
    """The output of the mixer on a path, and the gradients of its mean."""
    tokens = x.clone().requires_grad_()
    with use_path(path, "linear"):
        y = mixer(tokens)
    return [y.detach(), *torch.autograd.grad(y.float().mean(), [tokens, *mixer.parameters()], materialize_grads=True)]


@pytest.mark.parametrize(
    "text",
    [
        "relu2,count",
        "relu2,scale(-3)",
        "cube,count",
        "cube,scale(-3)",
        "exp,count",
        "exp,scale(-0.5)",
        "gelu,count",
        "log_count,sigmoid",
    ],
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
    assert abs(steps.gain) == 1 or name not in ("relu2", "cube", "exp")
