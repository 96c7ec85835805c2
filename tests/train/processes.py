"""What a process of a distributed test runs: ``python processes.py CASE FILE``; the first process writes FILE."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from small import RECIPE, tiny_data, tiny_model

from kernelbank import Mixer
from kernelbank.ops import machine
from kernelbank.ops.linear import plain
from kernelbank.ops.machine import unprobed
from kernelbank.ops.paths import LINEAR_PATHS
from kernelbank.train import loop
from kernelbank.train.engine import Engine, full
from kernelbank.train.hardware import Hardware
from kernelbank.train.loop import evaluate, train
from kernelbank.train.recipe import Recipe

MIXERS = ("vit", "ddwconv", "vit activation=batchnorm")


def losses(mixer: str, recipe: Recipe, hardware: Hardware, dtype: torch.dtype, checkpoint: Path | None = None) -> Any:
    """The loss after every step, the epochs, and the weights' sum of absolute values."""
    loop.SYNC_EVERY = 1
    engine, told = Engine(hardware), list[float]()
    model = tiny_model(mixer).to(dtype)
    history = train(model, tiny_data(dtype=dtype), recipe, seed=3, engine=engine, checkpoint=checkpoint,
                    on_step=lambda step: told.append(step.loss))  # fmt: skip
    norm = sum(full(tensor).double().abs().sum().item() for tensor in model.state_dict().values())
    epochs = [{**asdict(epoch), "seconds": 0, "waited": 0} for epoch in history.epochs]
    return {"losses": told, "epochs": epochs, "norm": norm}


def equal() -> Any:
    """50 updates in float64 without anything random in the model, for a row without and two with BatchNorm; and one
    of these whose processes keep their statistics to themselves."""
    hardware = Hardware(device="cpu")
    found = {mixer: losses(mixer, RECIPE, hardware, torch.float64) for mixer in MIXERS}
    alone = Hardware(device="cpu", sync_batchnorm=False)
    return {**found, "alone": losses("ddwconv", replace(RECIPE, epochs=2), alone, torch.float64)}


def everything() -> Any:
    """DDP with EMA, mixing, repeated augmentation and accumulation; and an evaluation of 37 images."""
    recipe = replace(RECIPE, epochs=2, mixup=0.8, cutmix=1.0, repeats=3, ema=0.9, shift=0)
    found = losses("dconv", recipe, Hardware(device="cpu", micro_batch=4), torch.float32)
    engine = Engine(Hardware(device="cpu"))
    metrics = evaluate(tiny_model().eval(), tiny_data().val, engine=engine, batch_size=5)
    return {**found, "metrics": asdict(metrics), "world": engine.part.world}


def together(_: Path) -> Any:
    """Both: starting a process takes longer than they do."""
    return {"equal": equal(), "everything": everything()}


def probed(_: Path) -> Any:
    """Two epochs, where the probe of every process prefers another linear layer, which rounds differently; and a digest
    of the weights. GAINS holds the gains of the processes."""
    gain = float(os.environ["GAINS"].split()[int(os.environ.get("RANK", "0"))])
    machine.probe = lambda device="cpu", dtype=None: machine.Machine(device, 1, True, False, {"conv1x1": (gain, gain)})
    other = replace(LINEAR_PATHS["conv1x1"], run=lambda *x, **options: plain(*x, **options) * (1 + 1e-4))
    LINEAR_PATHS["conv1x1"] = other
    with torch.no_grad():  # outside training the probe decides
        mixer, x = Mixer("vit", 16, 2, (4, 4)).eval(), torch.ones(1, 16, 16)
        y = mixer(x)
        with unprobed():
            differs = not torch.equal(y, mixer(x))
    recipe = replace(RECIPE, epochs=2, ema=0.9)
    found = losses("vit", recipe, Hardware(device="cpu", micro_batch=4), torch.float32)
    return {**found, "differs": differs}


def sharded(folder: Path) -> Any:
    """FSDP2, interrupted by nothing and then continued from its checkpoint of the epoch before."""
    hardware = Hardware(device="cpu", parallel="fsdp2", micro_batch=4)
    recipe = replace(RECIPE, epochs=2, ema=0.9)
    path = folder.with_suffix(".safetensors")
    whole = losses("vit", recipe, hardware, torch.float32, path)
    previous = path.with_name(f"{path.stem}.previous.safetensors")
    engine = Engine(hardware)
    if engine.main:
        previous.replace(path)
    engine.wait()
    resumed = losses("vit", recipe, hardware, torch.float32, path)
    return {"whole": whole, "resumed": resumed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, file = sys.argv[1], Path(sys.argv[2])
    answer = {"together": together, "probed": probed, "sharded": sharded}[case](file)
    engine = Engine(Hardware(device="cpu"))
    if engine.main:
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps(answer))
        beside.replace(file)
    engine.close()
