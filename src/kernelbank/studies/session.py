"""A study from its options to its run records: what is finished is not repeated, what was interrupted goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kernelbank.data.load import load
from kernelbank.errors import WorkerError
from kernelbank.records import RunRecord
from kernelbank.studies.progress import reporter
from kernelbank.studies.run import grid
from kernelbank.studies.runner import finished, run_all
from kernelbank.studies.study import Study
from kernelbank.train.recipe import Recipe

WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What of a study is run: models, rows and seeds of its grid, on which data, by which recipe, with how many runs at
    a time (None: two, or one on one core)."""

    models: tuple[str, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    data: str
    recipe: Recipe
    workers: int | None = None


def run(study: Study, setup: Setup, folder: Path) -> list[RunRecord]:
    """Run what is missing in `folder`; return the run records of the whole grid, in its order. Raises WorkerError."""
    console = Console(stderr=True)
    notify = _printer(console)
    data = load(setup.data).identity
    runs = grid(study, models=setup.models, rows=setup.rows, seeds=setup.seeds, recipe=setup.recipe, data=data)
    done = finished(runs, folder, notify)
    missing = [run for run in runs if run not in done]
    notify(f"study {study.name}: {len(runs)} runs, {len(done)} finished before, records in {folder}")
    try:
        with reporter(console, len(missing), setup.recipe.epochs) as sink:
            run_all(missing, folder, setup.workers or min(WORKERS, os.cpu_count() or 1), sink)
    except WorkerError as error:
        again = "finished runs are recorded, and the same command goes on from there"
        raise WorkerError(f"{error}; {again}", error.detail) from None
    return [RunRecord.load(run.record_path(folder)) for run in runs]


def _printer(console: Console) -> Callable[[str], None]:
    def notify(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return notify
