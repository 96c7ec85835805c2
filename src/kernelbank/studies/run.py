"""One run of a study: its identity, its conditions, and its execution to a run record."""

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
    """One row of the grid with one seed."""

    study: str
    row: str
    model: ModelSpec
    recipe: Recipe
    data: DataIdentity
    seed: int

    @property
    def key(self) -> str:
        """A readable name and a hash of everything besides the code that the results depend on."""
        identity = {
            "study": self.study, "row": self.row, "model": self.model.to_document(), "recipe": asdict(self.recipe),
            "data": asdict(self.data), "seed": self.seed,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w-]+", "-", f"{self.study}-{self.model.name}-{self.row}")
        return f"{name}-seed{self.seed}-{digest[:10]}"

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of the `RunRecord` that identify the run."""
        named = {name: getattr(self, name) for name in ("study", "row", "model", "data", "seed")}
        return {**named, "recipe": json.loads(json.dumps(asdict(self.recipe)))}

    def record_path(self, folder: Path) -> Path:
        """The path of the run record in the folder of the study."""
        return folder / "records" / f"{self.key}.json"

    def checkpoint_path(self, folder: Path) -> Path:
        """The path of the checkpoint while the run is trained."""
        return folder / "checkpoints" / f"{self.key}.safetensors"

    def __str__(self) -> str:
        return f"{self.model.name} {self.row} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The source of the images, the hardware and the trackers of all runs. They are not part of the identity of a
    run."""

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
    """Return all runs, ordered by seed, so that a study that is stopped early contains complete comparisons. A host is
    the models of its rows by label, and the identity of the data."""
    return tuple(
        Run(study.name, label, model, recipe, data, seed)
        for seed in seeds
        for models, data in hosts
        for label, model in models.items()
    )


def execute(run: Run, conditions: Conditions, folder: Path, hooks: Hooks) -> RunRecord:
    """Train and test `run`, or resume it from its checkpoint; write its run record and delete the checkpoint. A run
    that diverges is recorded with its failure. If several processes train the run together, the first one writes."""
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
    """Return the data for the model `name`. They are opened once per process. Raises InputError."""
    console = Console(stderr=True, quiet=parent_process() is not None)  # one process shows how far it is
    return open_dataset(name, conditions.source, recipe, Engine(conditions.hardware), console)


def build(run: Run) -> torch.nn.Module:
    """Return the model of `run`. The weights of our trunks are drawn from (seed, name), so that rows share the initial
    values of common parameters. Those of a stock model are drawn from the seed before its mixers are replaced."""
    if isinstance(run.model.trunk, TimmTrunk):
        return create(run.model, InitialWeights(), seed=run.seed)[0]
    model = build_backbone(run.model)
    initialise(model, run.seed)
    return model


def on_meta_device(spec: ModelSpec) -> tuple[torch.nn.Module, ModelSpec]:
    """Return the model of `spec` on the meta device, and its description with the mixers that it has. Raises InputError
    and SpecError if it cannot be built."""
    with torch.device("meta"):
        model, _ = create(spec, InitialWeights(), seed=0)
    return model, described(spec, model)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread per run on a CPU, so that results do not depend on the number of runs at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
