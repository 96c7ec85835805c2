"""One run of a study: what identifies it, and how it becomes a record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernelbank.analysis.cost import backbone_cost
from kernelbank.atlas import SKELETONS
from kernelbank.data.dataset import Dataset
from kernelbank.nn.backbone import Backbone
from kernelbank.nn.backbone import build as build_backbone
from kernelbank.nn.layers import initialise
from kernelbank.records import CodeIdentity, DataIdentity, EpochResult, Machine, RunRecord
from kernelbank.studies.study import Study, canonical
from kernelbank.train.checkpoint import discard
from kernelbank.train.engine import Engine
from kernelbank.train.hardware import Hardware
from kernelbank.train.loop import DivergedError, evaluate, train
from kernelbank.train.recipe import Recipe

THREADS = 1
"""Every run has one thread, so its numbers do not depend on how many runs go on at once."""


@dataclass(frozen=True)
class Run:
    """A cell of the grid with its seed. `mixer` is canonical text."""

    study: str
    row: str
    skeleton: str
    mixer: str
    mlp: str
    recipe: Recipe
    data: DataIdentity
    seed: int

    @property
    def key(self) -> str:
        """A readable name, and a hash of everything that the numbers depend on besides the code."""
        identity = {**asdict(self), "sizes": asdict(SKELETONS[self.skeleton])}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w-]+", "-", f"{self.study}-{self.skeleton}-{self.row}")
        return f"{name}-seed{self.seed}-{digest[:10]}"

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a `RunRecord` that say which run it is."""
        sizes, recipe = json.loads(json.dumps([asdict(SKELETONS[self.skeleton]), asdict(self.recipe)]))
        named = {name: getattr(self, name) for name in ("study", "row", "skeleton", "mixer", "mlp", "data", "seed")}
        return {**named, "sizes": sizes, "recipe": recipe}

    def record_path(self, folder: Path) -> Path:
        """Where the record of this run lies in the study's folder."""
        return folder / "records" / f"{self.key}.json"

    def checkpoint_path(self, folder: Path) -> Path:
        """Where its checkpoint lies while it runs."""
        return folder / "checkpoints" / f"{self.key}.safetensors"

    def __str__(self) -> str:
        return f"{self.skeleton} {self.row} seed {self.seed}"


def grid(
    study: Study,
    *,
    skeletons: Sequence[str],
    rows: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    data: DataIdentity,
) -> tuple[Run, ...]:
    """All runs, seed by seed, so that a study that is stopped holds whole comparisons."""
    return tuple(
        Run(study.name, row.label, skeleton, canonical(skeleton, row.mixers[skeleton]), study.mlp, recipe, data, seed)
        for seed in seeds
        for skeleton in skeletons
        for row in study.rows
        if row.label in rows and skeleton in row.mixers
    )


def execute(run: Run, data: Dataset, folder: Path, on_epoch: Callable[[EpochResult, bool], None]) -> RunRecord:
    """Train and test `run`, or go on where its checkpoint ends; write its record, then delete the checkpoint.

    A run that diverges is recorded with its failure.
    """
    code, skeleton, checkpoint = CodeIdentity.here(), SKELETONS[run.skeleton], run.checkpoint_path(folder)
    epochs: list[EpochResult] = []

    def keep(result: EpochResult, restored: bool) -> None:
        epochs.append(result)
        on_epoch(result, restored)

    test, failure = None, None
    try:
        with _threads(THREADS):
            model = build(run, data)
            engine = Engine(Hardware(device="cpu"))
            train(model, data, run.recipe, seed=run.seed, engine=engine, checkpoint=checkpoint, on_epoch=keep)
            test = evaluate(model, data.test, engine=engine) if data.test is not None else None
    except DivergedError as error:
        failure = str(error)
    cost = backbone_cost(skeleton, run.mixer, run.mlp, data.img_size, data.in_chans, data.num_classes)
    record = RunRecord(
        **run.identity,
        code=code,
        machine=Machine.here(THREADS),
        params=cost.params,
        macs=cost.macs,
        epochs=tuple(epochs),
        test_loss=None if test is None else test.loss,
        test_top1=None if test is None else test.top1,
        failure=failure,
    )
    record.save(run.record_path(folder))
    discard(checkpoint)
    return record


def build(run: Run, data: Dataset) -> Backbone:
    """The backbone of `run`, its weights drawn from (seed, name) so that rows share what they have in common."""
    model = build_backbone(
        SKELETONS[run.skeleton],
        run.mixer,
        run.mlp,
        img_size=data.img_size,
        in_chans=data.in_chans,
        num_classes=data.num_classes,
        drop_path_rate=run.recipe.drop_path,
    )
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
