"""One run of a study: what identifies it, under which conditions it is computed, and how it becomes a run record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kernelbank.data.dataset import Dataset
from kernelbank.model import ModelSpec, TimmTrunk
from kernelbank.nn.build import build_backbone
from kernelbank.nn.layers import initialise
from kernelbank.records import DataIdentity, RunRecord
from kernelbank.studies.study import Study
from kernelbank.train.checkpoint import discard
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.model import InitialWeights, create, described
from kernelbank.train.recipe import Recipe
from kernelbank.train.request import DataOptions
from kernelbank.train.session import Hooks, begin_record, train_and_test
from kernelbank.train.sources import open_dataset
from kernelbank.train.tracking import tracking


@dataclass(frozen=True)
class Run:
    """One cell of the grid with one seed."""

    study: str
    row: str
    model: ModelSpec
    recipe: Recipe
    data: DataIdentity
    seed: int

    @property
    def key(self) -> str:
        """A readable name, and a hash of everything that the numbers depend on besides the code."""
        identity = {
            "study": self.study, "row": self.row, "model": self.model.to_document(), "recipe": asdict(self.recipe),
            "data": asdict(self.data), "seed": self.seed,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w-]+", "-", f"{self.study}-{self.model.name}-{self.row}")
        return f"{name}-seed{self.seed}-{digest[:10]}"

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a `RunRecord` that say which run it is."""
        named = {name: getattr(self, name) for name in ("study", "row", "model", "data", "seed")}
        return {**named, "recipe": json.loads(json.dumps(asdict(self.recipe)))}

    def record_path(self, folder: Path) -> Path:
        """Where the run record lies in the study's folder."""
        return folder / "records" / f"{self.key}.json"

    def checkpoint_path(self, folder: Path) -> Path:
        """Where the checkpoint lies while the run trains."""
        return folder / "checkpoints" / f"{self.key}.safetensors"

    def __str__(self) -> str:
        return f"{self.model.name} {self.row} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Where the images of runs come from, on which hardware runs are computed, and which trackers they report to.
    Which run it is does not depend on them."""

    source: DataOptions
    hardware: Hardware = field(default_factory=Hardware)
    trackers: tuple[str, ...] = ()


def grid(
    study: Study,
    *,
    hosts: Sequence[tuple[dict[str, ModelSpec], DataIdentity]],
    seeds: Sequence[int],
    recipe: Recipe,
) -> tuple[Run, ...]:
    """All runs, seed by seed, so that a study that is stopped holds whole comparisons. A host is its model with the
    cells of every row, by label, and the data as it sees them."""
    return tuple(
        Run(study.name, label, model, recipe, data, seed)
        for seed in seeds
        for models, data in hosts
        for label, model in models.items()
    )


def execute(run: Run, conditions: Conditions, folder: Path, hooks: Hooks) -> RunRecord:
    """Train and test `run`, or go on from its checkpoint; write its run record, then delete the checkpoint.

    A run that diverges is recorded with its failure. Where several processes train it together, the first one writes.
    """
    checkpoint = run.checkpoint_path(folder)
    trackers = folder / "trackers" / run.key
    if conditions.trackers:
        trackers.mkdir(parents=True, exist_ok=True)
    engine = Engine(conditions.hardware, conditions.trackers, trackers if conditions.trackers else None)
    with one_thread() if engine.device.type == "cpu" else nullcontext():
        data = dataset(run.model.name, conditions, run.recipe)
        model = build(run)
        record = begin_record(
            study=run.study, row=run.row, model=model, spec=run.model, recipe=run.recipe, data=data, seed=run.seed,
            engine=engine,
        )  # fmt: skip
        settings = {"study": run.study, "row": run.row, "model": run.model.name, "seed": run.seed, **record.recipe}
        with tracking(engine, trackers, run.key[-10:], settings) if conditions.trackers else nullcontext() as track:
            record, _ = train_and_test(
                model, data, run.recipe, record, engine=engine, checkpoint=checkpoint, hooks=hooks.tracked(track)
            )
    if engine.main:
        record.save(run.record_path(folder))
        discard(checkpoint)
    engine.wait()
    return record


@cache
def dataset(name: str, conditions: Conditions, recipe: Recipe) -> Dataset:
    """The data as the model `name` sees them, opened once in a process. Raises InputError."""
    console = Console(stderr=True, quiet=parent_process() is not None)  # one process shows how far it is
    return open_dataset(name, conditions.source, recipe, Engine(conditions.hardware), console)


def build(run: Run) -> torch.nn.Module:
    """The model of `run` with its weights before training."""
    return drawn(run.model, run.seed)


def drawn(spec: ModelSpec, seed: int) -> torch.nn.Module:
    """The model of `spec` with weights drawn from `seed`: those of our trunks from (seed, name), so that rows share
    what they have in common; those of a stock model from the seed before its mixers are replaced."""
    if isinstance(spec.trunk, TimmTrunk):
        return create(spec, InitialWeights(), seed=seed)[0]
    model = build_backbone(spec)
    initialise(model, seed)
    return model


def built(spec: ModelSpec) -> tuple[torch.nn.Module, ModelSpec]:
    """The model of `spec` without memory for its weights, and its description with the mixers that it has. Raises
    InputError and SpecError where it cannot be built."""
    with torch.device("meta"):
        model, _ = create(spec, InitialWeights(), seed=0)
    return model, described(spec, model)


@contextmanager
def one_thread() -> Iterator[None]:
    """On a CPU every run has one thread, so that its numbers do not depend on how many runs there are at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
