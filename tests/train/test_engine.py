"""The engine: accumulation keeps the batch, averaged weights average, temperatures anneal, layers decay."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from kernelbank.errors import InputError
from kernelbank.nn.mixer import Mixer
from kernelbank.train import loop
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.loop import train
from kernelbank.train.optimiser import build_optimiser

sys.path.insert(0, str(Path(__file__).parent))
from small import RECIPE, tiny_data, tiny_model


def trained(hardware: Hardware, mixer: str = "vit", **changes: object) -> nn.Module:
    model = tiny_model(mixer).double()
    recipe = replace(RECIPE, epochs=2, **changes)  # type: ignore[arg-type]
    train(model, tiny_data(50, dtype=torch.float64), recipe, seed=0, engine=Engine(hardware))
    return model


@pytest.mark.parametrize("micro", [1, 3, 7, 16])
def test_accumulated_micro_batches_are_the_batch(micro: int) -> None:
    """Without BatchNorm, whose statistics are those of the micro-batch; a last batch of 2 images included."""
    whole = trained(Hardware(device="cpu"), drop_last=False)
    parts = trained(Hardware(device="cpu", micro_batch=micro), drop_last=False)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)


def test_gradient_checkpointing_and_determinism_change_nothing() -> None:
    whole = trained(Hardware(device="cpu"))
    same = trained(Hardware(device="cpu", grad_checkpointing=True, deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def test_bfloat16_trains_by_autocast_with_weights_in_float32() -> None:
    model = tiny_model("ddwconv")
    hardware = Hardware(device="cpu", precision="bfloat16")
    history = train(model, tiny_data(), replace(RECIPE, epochs=2), seed=0, engine=Engine(hardware))
    exact = train(
        tiny_model("ddwconv"), tiny_data(), replace(RECIPE, epochs=2), seed=0, engine=Engine(Hardware(device="cpu"))
    )
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert history.epochs[-1].train_loss != exact.epochs[-1].train_loss
    assert history.epochs[-1].train_loss == pytest.approx(exact.epochs[-1].train_loss, rel=0.1)


def test_averaged_weights_follow_their_definition() -> None:
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), list[torch.Tensor]()
    run = loop._Run(model, tiny_data(), replace(RECIPE, ema=0.5), 0, Engine(Hardware(device="cpu")), None)
    average = model[1].weight.detach().clone()
    real = run.optimiser.step

    def step() -> None:
        real()
        seen.append(model[1].weight.detach().clone())

    run.optimiser.step = step  # type: ignore[method-assign]
    run.train_epoch(0, None, None)
    for weight in seen:
        average = 0.5 * average + 0.5 * weight
    assert len(seen) == 10 and run.state.ema is not None
    torch.testing.assert_close(run.state.ema.module[1].weight, average)


def test_the_temperature_is_set_by_epoch_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = tiny_model("dconv"), list[set[float | None]]()
    recipe = replace(RECIPE, epochs=4, temperature=30.0, temperature_epochs=2)
    mixers = [m for m in model.modules() if isinstance(m, Mixer) and str(m.spec).startswith("dconv")]
    train(model, tiny_data(), recipe, seed=0, engine=Engine(Hardware(device="cpu")),
          on_step=lambda step: told.append({m.temperature for m in mixers}))  # fmt: skip
    assert len(mixers) == 2 and [told[i] for i in (0, 9, 10, 20, 39)] == [{30.0}, {30.0}, {15.5}, {None}, {None}]
    assert {m.temperature for m in mixers} == {None}


def test_layer_decay_gives_deeper_layers_lower_rates() -> None:
    model = tiny_model()
    optimiser = build_optimiser(model, replace(RECIPE, layer_decay=0.5))
    scales = {id(p): group["lr_scale"] for group in optimiser.param_groups for p in group["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert by_name["head.weight"] == 1.0 and by_name["blocks.1.attn.q.weight"] == 0.5
    assert by_name["blocks.0.attn.q.weight"] == 0.25 and by_name["patch_embed.proj.weight"] == 0.125
    with pytest.raises(InputError, match=r"invalid layer_decay=0\.5 for a model without group_matcher"):
        build_optimiser(nn.Linear(2, 2), replace(RECIPE, layer_decay=0.5))


def test_mixing_is_in_pairs() -> None:
    recipe = replace(RECIPE, mixup=0.8)
    with pytest.raises(InputError, match="invalid micro_batch=3 for"):
        train(tiny_model(), tiny_data(), recipe, seed=0, engine=Engine(Hardware(device="cpu", micro_batch=3)))
