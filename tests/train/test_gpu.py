"""Training on a GPU, with ``pytest --device cuda``; what run records say about one."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelbank.records import GpuSettings
from kernelbank.schema import decode
from kernelbank.train import loop
from kernelbank.train.engine import Engine, gpu_settings
from kernelbank.train.loop import train

sys.path.insert(0, str(Path(__file__).parent))
from small import RECIPE, tiny_data, tiny_model


def test_the_settings_of_a_gpu_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_settings()
    assert decode(GpuSettings, asdict(found), "settings") == found
    assert found.cuda == torch.version.cuda and not found.deterministic
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "benchmark", True)
        assert gpu_settings().cudnn_benchmark


@pytest.mark.gpu
@pytest.mark.parametrize("mixup", [0.0, 0.8])
@pytest.mark.parametrize("mixer", ["vit", "relu_attention", "layernorm_attention", "dwsa", "ddwconv", "dconv"])
def test_an_update_does_not_wait_for_the_gpu(mixer: str, mixup: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that waits is an error of torch's inside the updates; the losses are read outside of them."""
    updates, update = [0], loop._Run._update

    def watched(self: Any, *arguments: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if updates[0] else before)  # the first one fills caches
        try:
            return update(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode(before)
            updates[0] += 1

    monkeypatch.setattr(loop._Run, "_update", watched)
    train(tiny_model(mixer), tiny_data(), replace(RECIPE, epochs=2, mixup=mixup), seed=0, engine=Engine())
    assert updates == [20]


@pytest.mark.gpu
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The run is stopped after its first epoch and goes on from its checkpoint."""
    whole, parts = tiny_model(), tiny_model()
    train(whole, tiny_data(), RECIPE, seed=0, engine=Engine())
    with pytest.raises(loop.Stopped):
        train(parts, tiny_data(), RECIPE, seed=0, engine=Engine(), checkpoint=tmp_path / "c.pt", stop=lambda: True)
    train(parts, tiny_data(), RECIPE, seed=0, engine=Engine(), checkpoint=tmp_path / "c.pt")
    assert all(torch.equal(tensor, parts.state_dict()[name]) for name, tensor in whole.state_dict().items())
