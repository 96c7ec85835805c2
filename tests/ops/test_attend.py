"""`attend` against the mixer's operator, its shortcuts against the map, masks, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernelbank import Mixer, SpecError, attend, use_path
from kernelbank.ops.activation import activate
from kernelbank.spec.pipeline import read_pipeline

PIPELINES = (
    "softmax",
    "identity,count",
    "relu,count",
    "layernorm,count",
    "relu,l1",
    "softmax@positions",
    "softmax(0.5)",
)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_it_is_the_middle_of_a_mixer(pipeline: str) -> None:
    mixer = Mixer(f"vit activation={pipeline}", 24, 3, (3, 4), prefix=1, dtype=torch.float64)
    x = drawn(2, 13, 24)
    q, k, v = (part(x).unflatten(-1, (3, 8)).transpose(1, 2) for part in (mixer.q, mixer.key, mixer.value))
    o = mixer.out(attend(q, k, v, pipeline).transpose(1, 2).flatten(2))
    with use_path("reference"):
        assert torch.allclose(o, mixer(x), atol=1e-10)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_outputs_and_gradients_equal_those_of_the_map(pipeline: str, masked: bool, biased: bool) -> None:
    q, k, v, b = drawn(2, 3, 5, 4), drawn(2, 3, 7, 4), drawn(2, 3, 7, 6), drawn(3, 5, 7)
    visible = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.4 if masked else None
    if visible is not None:
        visible[0, 0, 2] = False  # a query that sees nothing
    bias = b if biased else None
    scores = (q @ k.mT) * 0.3
    a = activate(scores if bias is None else scores + bias, visible, read_pipeline(pipeline), {}, False)
    expected = a @ v
    inputs = (q, k, v, *((b,) if biased else ()))
    upstream = torch.randn_like(expected)
    want = torch.autograd.grad(expected, inputs, upstream)
    o = attend(q, k, v, pipeline, bias=bias, visible=visible, scale=0.3)
    assert torch.allclose(o, expected, atol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(o, inputs, upstream), want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)
    if visible is not None:
        assert (o[0, :, 2] == 0).all()


def test_half_precision_and_dropout() -> None:
    q = drawn(1, 2, 6, 4).detach().bfloat16()
    for pipeline in PIPELINES:
        assert attend(q, q, q, pipeline).dtype == torch.bfloat16
        assert attend(q, q, q, pipeline, dropout=0.5).isfinite().all()


REFUSED = {
    "pipeline": ({"pipeline": "relu,cuont"}, "cuont"),
    "no pipeline": ({"pipeline": "none"}, "invalid pipeline='none'"),
    "batchnorm": ({"pipeline": "batchnorm,count"}, "batchnorm has parameters"),
    "shapes": ({"k": torch.zeros(1, 2, 3, 5)}, "invalid shapes"),
    "heads": ({"k": torch.zeros(1, 1, 3, 4)}, "invalid shapes"),
    "tokens": ({"q": torch.zeros(2, 3, 4)}, "invalid q of shape"),
    "mask": ({"visible": torch.zeros(3, 3)}, "invalid visible of dtype torch.float32"),
    "dropout": ({"dropout": 1.0}, "invalid dropout=1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_argument(case: str) -> None:
    changed, message = REFUSED[case]
    arguments = {"q": torch.zeros(1, 2, 3, 4), "k": torch.zeros(1, 2, 3, 4), "v": torch.zeros(1, 2, 3, 4)}
    with pytest.raises(SpecError, match=message):
        attend(**(arguments | changed))  # type: ignore[arg-type]
