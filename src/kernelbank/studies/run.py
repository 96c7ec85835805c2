"""One run of a study: what identifies it, and how it becomes a run record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernelbank.data.dataset import Dataset
from kernelbank.model import ModelSpec
from kernelbank.nn.build import build_backbone
from kernelbank.nn.layers import initialise
from kernelbank.records import DataIdentity, EpochResult, RunRecord
from kernelbank.studies.study import Study
from kernelbank.train.checkpoint import discard
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.recipe import Recipe
from kernelbank.train.session import Hooks, begin_record, train_and_test

THREADS = 1
"""Every run has one thread, so that its numbers do not depend on how many runs there are at once."""


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


def grid(
    study: Study,
    *,
    models: Sequence[str],
    rows: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    data: DataIdentity,
) -> tuple[Run, ...]:
    """All runs, seed by seed, so that a study that is stopped holds whole comparisons."""
    return tuple(
        Run(study.name, row.label, study.model(model, row), recipe, data, seed)
        for seed in seeds
        for model in models
        for row in study.rows
        if row.label in rows and model in row.mixers
    )


def execute(run: Run, data: Dataset, folder: Path, on_epoch: Callable[[EpochResult, bool], None]) -> RunRecord:
    """Train and test `run`, or go on from its checkpoint; write its run record, then delete the checkpoint.

    A run that diverges is recorded with its failure.
    """
    checkpoint = run.checkpoint_path(folder)
    with _threads(THREADS):
        model, engine = build(run, data), Engine(Hardware(device="cpu"))
        record = begin_record(
            study=run.study, row=run.row, model=model, spec=run.model, recipe=run.recipe, data=data, seed=run.seed,
            engine=engine,
        )  # fmt: skip
        record, _ = train_and_test(
            model, data, run.recipe, record, engine=engine, checkpoint=checkpoint, hooks=Hooks(on_epoch)
        )
    record.save(run.record_path(folder))
    discard(checkpoint)
    return record


def build(run: Run, data: Dataset) -> torch.nn.Module:
    """The backbone of `run`, its weights drawn from (seed, name) so that rows share what they have in common."""
    sizes = replace(run.model, img_size=data.img_size, in_chans=data.in_chans, num_classes=data.num_classes)
    model = build_backbone(replace(sizes, dropout=replace(sizes.dropout, drop_path_rate=run.recipe.drop_path)))
    initialise(model, run.seed)
    return model


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
