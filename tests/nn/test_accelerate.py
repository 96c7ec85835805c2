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
from kernelbank.ops import machine
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


HALF = {"fast": 2.0, "slow": 0.5}


@pytest.fixture
def bfloat16_is(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> float:
    gain = HALF[request.param]
    monkeypatch.setattr("kernelbank.nn.accelerate.half_gain", lambda dtype: gain)
    return gain


@pytest.mark.parametrize("bfloat16_is", ["fast"], indirect=True)
@pytest.mark.parametrize("spec", [None, "activation=relu,count", "activation=batchnorm,count"])
@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_takes_and_gives_float32_and_is_undone(name: str, spec: str | None, bfloat16_is: float) -> None:
    model, x = build(name), torch.randn(2, 3, 32, 32)
    if spec is not None:
        kernelbank.replace_mixers(model, spec)
    state = {path: (tensor, tensor.clone()) for path, tensor in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        before = model(x)
        with kernelbank.accelerate(model, dtype="bfloat16") as handle:
            assert handle.dtype == torch.bfloat16 and "2.00" in handle.reason
            during, features = model(x), model.forward_features(x)
        after = model(x)
    assert during.dtype == torch.float32 and features.dtype == torch.bfloat16
    assert not torch.equal(during, before)
    assert float((during - before).abs().max()) < 0.05 * float(before.abs().max())
    assert torch.equal(after, before)
    assert not model._forward_hooks and not model._forward_pre_hooks
    for path, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[path][0] and tensor.dtype == state[path][1].dtype and torch.equal(tensor, state[path][1])


@pytest.mark.parametrize("bfloat16_is", ["fast"], indirect=True)
def test_copies_and_pickles_compute_in_bfloat16_too(bfloat16_is: float) -> None:
    model, x = build("vit_tiny_patch16_224"), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), kernelbank.accelerate(model, dtype="bfloat16"):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("bfloat16_is", ["fast"], indirect=True)
def test_weights_are_cast_once_and_running_statistics_stay(bfloat16_is: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)).eval()
    model[3].bias = nn.Parameter(torch.zeros(4))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), kernelbank.accelerate(model, dtype=torch.bfloat16):
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        y = model(x)
        assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
        dtypes = {path: tensor.dtype for path, tensor in model.state_dict().items()}
    assert y.dtype == torch.float32
    assert dtypes["0.weight"] == torch.bfloat16
    assert dtypes["1.running_mean"] == dtypes["1.running_var"] == torch.float32


@pytest.mark.parametrize("bfloat16_is", ["slow"], indirect=True)
def test_where_bfloat16_is_slower_the_model_stays_in_float32(
    bfloat16_is: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = build("vit_tiny_patch16_224"), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), kernelbank.accelerate(model, dtype="bfloat16") as handle:
        assert handle.dtype is None and "0.50 times" in handle.reason and len(handle) > 0
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model(x).dtype == torch.float32
    assert "stays in float32" in caplog.text


def test_the_gain_of_bfloat16_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    monkeypatch.setattr(machine, "_half_gains", {})
    monkeypatch.setattr(machine, "_least", lambda steps: calls.append(1) or dict.fromkeys(steps, 4.0) | {"half": 2.0})
    assert machine.half_gain(torch.bfloat16) == machine.half_gain(torch.bfloat16) == 2.0
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (lambda model: model, "int8", "invalid dtype='int8'; expected 'bfloat16', 'float16'"),
        (lambda model: model, torch.float64, "invalid dtype=torch.float64"),
        (lambda model: model.train(), "bfloat16", "training mode"),
        (lambda model: model.double(), "bfloat16", "expected torch.float32"),
        (lambda model: model.to("meta"), "bfloat16", "invalid device meta"),
    ],
)
def test_models_that_cannot_be_lowered(change: Any, dtype: Any, message: str) -> None:
    model = change(build("vit_tiny_patch16_224"))
    with pytest.raises(InputError, match=message):
        kernelbank.accelerate(model, dtype=dtype)
    assert not any("Accelerated" in type(m).__name__ for m in model.modules())
