"""Whole models under torch.compile: one graph, one recompilation at most for a second batch size, the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from tiny_models import PLAIN, STAGES, drawn
from torch import nn
from torch._dynamo.utils import counters

import kernelbank
import kernelbank.models

STAGE: dict[str, Any] = STAGES | {"depths": (2,), "num_heads": (2,)}
MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "vit": ("vit_kb_small_patch16_224", PLAIN, None),
    "vit, relu with positions": ("vit_kb_small_patch16_224", PLAIN, "vit_relpos activation=relu,count"),
    "vit, dwsa": ("vit_kb_small_patch16_224", PLAIN, "dwsa"),
    "swin": ("swin_kb_tiny_patch4_window7_224", STAGE, None),
    "swin, dwsa_window": ("swin_kb_tiny_patch4_window7_224", STAGE, "dwsa_window support=window(2, alternate)"),
    "timm's vit with layernorm": ("deit_small_patch16_224", PLAIN, "activation=layernorm,count"),
    "timm's swin with relu": ("swin_tiny_patch4_window7_224", STAGE, "activation=relu,count"),
}
FAST = ("vit", "swin")
CASES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def build(name: str) -> nn.Module:
    model, sizes, spec = MODELS[name]
    built = timm.create_model(model, **sizes)
    return drawn(built if spec is None else kernelbank.replace_mixers(built, spec))


def graphs() -> int:
    """How many graphs torch.compile has made since the last reset."""
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _no_graphs() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_model_is_one_graph_for_every_batch(name: str, dynamic: bool | None) -> None:
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = torch.randn(batch, 3, 32, 32)
            assert torch.allclose(compiled(x), model(x), rtol=1e-3, atol=1e-4), batch
    assert 1 <= graphs() <= (1 if dynamic else 2)


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_is_one_graph(name: str) -> None:
    model, x = build(name), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(run(x).square().mean(), list(model.parameters()), allow_unused=True)
        for run in (model, compiled)
    ]
    assert graphs() == 1
    largest = max(float(eager.abs().max()) for eager in gradients[0] if eager is not None)
    for (path, _), eager, traced in zip(model.named_parameters(), *gradients, strict=True):
        assert (eager is None) == (traced is None), path
        assert eager is None or torch.allclose(traced, eager, rtol=1e-3, atol=1e-5 * largest), path
