"""accelerate: same outputs, same state, exact undo."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn

import kernelbank
from kernelbank import use_path
from kernelbank.errors import InputError
from kernelbank.ops.paths.path import PathError

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2),
                                     "window_size": 4},
}  # fmt: skip


def build(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=5, **SMALL[name]).eval()


@pytest.mark.parametrize("form", ["mkldnn", "conv1x1", "linear", None])
@pytest.mark.parametrize("name", SMALL)
def test_same_outputs_same_state_and_exact_undo(name: str, form: str | None) -> None:
    model, x = build(name), torch.randn(2, 3, 32, 32)
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = model(x)
        with kernelbank.accelerate(model) as taken, use_path(*([form] if form else [])):
            assert len(taken) > 4
            assert torch.allclose(model(x), before, atol=1e-5)
            assert model.state_dict().keys() == state.keys()
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_the_models_own(name: str) -> None:
    model, x = build(name), torch.randn(2, 3, 32, 32)
    model(x).square().sum().backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with kernelbank.accelerate(model), use_path("conv1x1"):
        model(x).square().sum().backward()
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, theirs[n], atol=1e-4 * (1 + float(theirs[n].abs().max()))), n


def test_copies_and_pickles_stay_accelerated_and_work() -> None:
    model, x = build("vit_tiny_patch16_224"), torch.randn(1, 3, 32, 32)
    handle = kernelbank.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.allclose(other(x), model(x), atol=1e-6)
    handle.remove()
    assert not any("Accelerated" in type(m).__name__ for m in model.modules())


def test_hooks_between_fc1_and_the_activation_still_hear() -> None:
    model, heard = build("vit_tiny_patch16_224"), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, o: heard.append(o))
    with torch.no_grad(), kernelbank.accelerate(model):
        model(torch.randn(1, 3, 32, 32))
    assert len(heard) == 1 and bool((heard[0] < -0.2).any())


def test_twice_takes_nothing_the_second_time() -> None:
    model = build("vit_tiny_patch16_224")
    first, second = kernelbank.accelerate(model), kernelbank.accelerate(model)
    assert len(second) == 0
    first.remove()


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"invalid model of type str; expected a torch\.nn\.Module"):
        kernelbank.accelerate("vit")  # type: ignore[arg-type]
    linear = nn.Linear(4, 4)
    with (
        kernelbank.accelerate(linear),
        use_path("mkldnn"),
        pytest.raises(PathError, match="no derivative; paths that do"),
    ):
        linear(torch.randn(2, 4))
