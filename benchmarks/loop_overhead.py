"""Measure the overhead of the training loop over a plain PyTorch loop with the same model, optimiser and loader.

``python benchmarks/loop_overhead.py --rounds 15`` trains the same epoch with both in every round, in alternating order.
The ratio is the time of our loop over that of the plain one; the goal is at most 1.05. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median, quantiles
from time import perf_counter

import timm
import torch
import tyro
from torch import nn
from torch.nn import functional as F

import kernelbank.models  # noqa: F401  (registers ours with timm)
from kernelbank.data.dataset import Dataset, TensorSplit
from kernelbank.data.order import Part, epoch_rows, updates
from kernelbank.records import MachineIdentity
from kernelbank.train.engine import Engine
from kernelbank.train.loop import _Run
from kernelbank.train.optimiser import build_optimiser
from kernelbank.train.recipe import Recipe
from kernelbank.train.recipes import published


@dataclass
class Options:
    """Measure the overhead of the training loop."""

    model: str = "vit_kb_test_patch16_64"
    """A model of timm's or ours."""
    size: int = 64
    """Height and width of the images."""
    batch: int = 32
    """Images per update."""
    steps: int = 12
    """Updates per epoch."""
    rounds: int = 15
    """Epochs with each loop."""
    threads: int = 1
    """Threads of torch."""


def bare(model: nn.Module, data: Dataset, recipe: Recipe, device: torch.device) -> float:
    """The seconds of an epoch in a minimal loop."""
    optimiser = build_optimiser(model, recipe)
    rows = epoch_rows(len(data.train), 1, 0, 0)
    shares = [u.shares[0] for u in updates(rows, rows, recipe.batch_size, recipe.batch_size, True, Part())]
    model.train()
    begun = perf_counter()
    total = torch.zeros((), device=device)
    for images, labels in data.train.batches(shares, recipe.augmentation):
        images, labels = images.to(device), labels.to(device)
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or 1.0)
        optimiser.step()
        total += loss.detach()
    total.item()
    return perf_counter() - begun


def ours(model: nn.Module, data: Dataset, recipe: Recipe, engine: Engine) -> float:
    """The seconds of the same epoch in our loop, without the evaluation and the checkpoint, which the other lacks."""
    run = _Run(model, data, recipe, 0, engine, None)
    begun = perf_counter()
    run.train_epoch(0, None, None)
    return perf_counter() - begun


def main(options: Options) -> None:
    """Run the rounds and print the result."""
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    count = options.batch * options.steps
    images = torch.randn(count, 3, options.size, options.size, generator=generator)
    split = TensorSplit(images, torch.arange(count) % 10)
    data = Dataset("random", "none", split, split, None, 10, 3, (options.size, options.size))
    recipe = replace(published("digits").recipe, batch_size=options.batch, drop_last=True)
    engine = Engine()
    model = timm.create_model(options.model, num_classes=10).to(engine.device)
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for index in range(options.rounds + 1):  # the first warms up
        for which in ("bare", "ours") if index % 2 else ("ours", "bare"):
            copy = deepcopy(model)
            gc.collect()
            if which == "bare":
                taken = bare(copy, data, recipe, engine.device)
            else:
                taken = ours(copy, data, recipe, engine)
            if index:
                seconds[which].append(taken)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    print(json.dumps({
        "model": options.model, "batch": options.batch, "steps": options.steps, "rounds": options.rounds,
        "ratio_median": round(median(ratios), 4), "ratio_quartiles": [round(low, 4), round(high, 4)],
        "milliseconds_a_step": {name: round(1e3 * median(s) / options.steps, 3) for name, s in seconds.items()},
        "device": str(engine.device), "machine": vars(MachineIdentity.here(options.threads)),
        "load": os.getloadavg()[0],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
