"""One run of a study: its identity, its conditions, and its execution to a run record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kernelbank.data.dataset import Dataset
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec, TimmTrunk
from kernelbank.nn.build import build_backbone
from kernelbank.nn.layers import initialise
from kernelbank.records import DataIdentity, RunRecord
from kernelbank.studies.study import Study
from kernelbank.train.checkpoint import discard
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.loop import evaluate
from kernelbank.train.model import InitialWeights, create, described
from kernelbank.train.recipe import Recipe
from kernelbank.train.request import DataOptions
from kernelbank.train.run_weights import keep_weights
from kernelbank.train.session import Hooks, begin_record, train_and_test
from kernelbank.train.sources import open_dataset
from kernelbank.train.tracking import tracking


@dataclass(frozen=True)
class Run:
    """One cell of the grid with one seed. `start` is the run from whose weights it starts; the weights of a run are
    kept where others start from them (`keep`)."""

    study: str
    row: str
    model: ModelSpec
    recipe: Recipe
    data: DataIdentity
    seed: int
    start: Run | None = None
    keep: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """A readable name and a hash of everything besides the code that the results depend on."""
        identity = {
            "study": self.study, "row": self.row, "model": self.model.to_document(), "recipe": asdict(self.recipe),
            "data": asdict(self.data), "seed": self.seed,
        }  # fmt: skip
        if self.start is not None:
            identity["start"] = self.start.key
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w-]+", "-", f"{self.study}-{self.model.name}-{self.row}")
        return f"{name}-seed{self.seed}-{digest[:10]}"

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of the `RunRecord` that identify the run."""
        named = {name: getattr(self, name) for name in ("study", "row", "model", "data", "seed")}
        start = None if self.start is None else self.start.key
        return {**named, "recipe": json.loads(json.dumps(asdict(self.recipe))), "start": start}

    def record_path(self, folder: Path) -> Path:
        """The path of the run record in the folder of the study."""
        return folder / "records" / f"{self.key}.json"

    def checkpoint_path(self, folder: Path) -> Path:
        """The path of the checkpoint while the run is trained."""
        return folder / "checkpoints" / f"{self.key}.safetensors"

    def weights_path(self, folder: Path) -> Path:
        """Where the weights at the end of the run are kept for runs that start from them."""
        return folder / "weights" / f"{self.key}.safetensors"

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
    """All runs, seed by seed, so that a study that is stopped holds whole comparisons. A host is its model with the
    cells of every row, by label, and the data as it sees them."""
    starts = {row.fine_tuning.row for row in study.rows if row.fine_tuning}

    def one(label: str, models: dict[str, ModelSpec], data: DataIdentity, seed: int) -> Run:
        tuning = study.row(label).fine_tuning
        if tuning is None:
            return Run(study.name, label, models[label], recipe, data, seed, keep=label in starts)
        start = one(tuning.row, models, data, seed)
        return Run(study.name, label, models[label], fine_tuning_recipe(recipe, tuning.epochs), data, seed, start)

    return tuple(one(label, models, data, seed) for seed in seeds for models, data in hosts for label in models)


FINE_TUNING_RATE = 0.25
"""The learning rates of fine-tuning, as a part of those of training from scratch. Ours."""


def fine_tuning_recipe(recipe: Recipe, epochs: int) -> Recipe:
    """`recipe` for going on for `epochs` from trained weights: lower rates, the same share of them for the warm-up, no
    annealing of temperatures."""
    rates = {name: FINE_TUNING_RATE * getattr(recipe, name) for name in ("lr", "warmup_lr", "min_lr")}
    warmup = recipe.warmup_epochs * epochs // recipe.epochs
    return replace(recipe, epochs=epochs, warmup_epochs=warmup, temperature_epochs=0, **rates)


def execute(run: Run, conditions: Conditions, folder: Path, hooks: Hooks) -> RunRecord:
    """Train and test `run`, or go on from its checkpoint; write its run record, then delete the checkpoint.

    A run that diverges is recorded with its failure, and so is one that would start from its weights. Where several
    processes train it together, the first one writes.

    Raises:
        InputError: If the weights that the run starts from are not in the folder.
    """
    checkpoint = run.checkpoint_path(folder)
    trackers = folder / "trackers" / run.key
    if conditions.trackers:
        trackers.mkdir(parents=True, exist_ok=True)
    engine = Engine(conditions.hardware, conditions.trackers, trackers if conditions.trackers else None)
    with one_thread() if engine.device.type == "cpu" else nullcontext():
        data = dataset(run.model.name, conditions, run.recipe)
        failure = None if run.start is None else _failure(run.start, folder)
        model = build(run) if run.start is None or failure else started(run, run.start, folder)
        record = begin_record(
            study=run.study, row=run.row, model=model, spec=run.model, recipe=run.recipe, data=data, seed=run.seed,
            engine=engine,
        )  # fmt: skip
        if failure:
            return _recorded(replace(record, start=run.identity["start"], failure=failure), run, folder, engine)
        if run.start is not None:
            before = evaluate(model.to(engine.device), data.val, engine=engine)
            record = replace(record, start=run.start.key, start_top1=before.top1)
        settings = {"study": run.study, "row": run.row, "model": run.model.name, "seed": run.seed, **record.recipe}
        with tracking(engine, trackers, run.key[-10:], settings) if conditions.trackers else nullcontext() as track:
            record, _ = train_and_test(
                model, data, run.recipe, record, engine=engine, checkpoint=checkpoint, hooks=hooks.tracked(track)
            )
    return _recorded(record, run, folder, engine)


def _recorded(record: RunRecord, run: Run, folder: Path, engine: Engine) -> RunRecord:
    """Write the run record, after the weights if they are kept, and delete the checkpoint."""
    checkpoint = run.checkpoint_path(folder)
    if engine.main:
        if run.keep and record.failure is None:
            path = run.weights_path(folder)
            path.parent.mkdir(exist_ok=True)
            keep_weights(checkpoint, path, record.model)
        record.save(run.record_path(folder))
        discard(checkpoint)
    engine.wait()
    return record


def _failure(start: Run, folder: Path) -> str | None:
    """Why there are no weights of `start`, if it diverged."""
    path = start.record_path(folder)
    failure = RunRecord.load(path).failure if path.exists() else None
    return None if failure is None else f"{start}, from whose weights it starts, diverged: {failure}"


def started(run: Run, start: Run, folder: Path) -> torch.nn.Module:
    """The model of `run` with the weights at the end of `start`, whose mixers are replaced by its own as ``kernelbank
    train --initial-checkpoint`` does it (see `nn.edit.carry`); what is new is drawn from the seed.

    Raises:
        InputError: If the weights are not in the folder, or do not fit.
    """
    path = start.weights_path(folder)
    if not path.exists():
        raise InputError(f"start: there is no {path}, from which {run} starts; expected the weights of {start} in the "
                         "study's folder, which every node must see")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return create(run.model, InitialWeights(str(path), mixer=run.model.mixer), seed=run.seed)[0]


@cache
def dataset(name: str, conditions: Conditions, recipe: Recipe) -> Dataset:
    """Return the data for the model `name`. They are opened once per process. Raises InputError."""
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
