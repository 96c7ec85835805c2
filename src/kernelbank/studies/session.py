"""Run a study from its options to its run records. Runs with a record are skipped, and interrupted runs are resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from kernelbank.data.dataset import Dataset
from kernelbank.errors import WorkerError
from kernelbank.files import sole_user, writable_folder
from kernelbank.model import ModelSpec
from kernelbank.records import DataIdentity, RunRecord
from kernelbank.studies.hosts import host_model, host_stages, with_rows
from kernelbank.studies.post_scale import with_post_scales
from kernelbank.studies.progress import reporter
from kernelbank.studies.run import Conditions, Run, dataset, grid
from kernelbank.studies.runner import WorkerPool, finished, make_folders, run_all
from kernelbank.studies.shard import WHOLE, Shard
from kernelbank.studies.study import Study
from kernelbank.train.engine import Engine
from kernelbank.train.loop import Stopped
from kernelbank.train.recipe import Recipe
from kernelbank.train.signals import StopRequest, stop_on_signal
from kernelbank.train.sources import enlargement

JOBS = 2
OUTPUTS = ("table.md", "table.json", "study.png", "records/*-seed*.json", "checkpoints/*-seed*.safetensors",
           "weights/*-seed*.safetensors")  # fmt: skip
"""The files of a study below its folder."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The part of a study that is run, and how.

    `hosts` are pairs of a model and the cells that are changed in it, and `model_args` the constructor arguments of all
    hosts. `jobs` is the number of runs at a time; None stands for one per GPU, or on a CPU for two, or one on a single
    core. `cluster` is the address of a Ray cluster, and `shard` the part of the runs.
    """

    hosts: tuple[tuple[str, str], ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    conditions: Conditions
    model_args: tuple[str, ...] = ()
    jobs: int | None = None
    cluster: str | None = None
    shard: Shard = field(default_factory=lambda: WHOLE)


@dataclass(frozen=True)
class Host:
    """The models of a host's rows by label, and the data for them."""

    models: dict[str, ModelSpec]
    data: Dataset

    @property
    def rows(self) -> tuple[dict[str, ModelSpec], DataIdentity]:
        """The models and the identity of the data."""
        return self.models, self.data.identity


class Interrupted(KeyboardInterrupt):
    """The study was stopped by a signal, and its runs wrote checkpoints."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def run(study: Study, setup: Setup, folder: Path) -> list[RunRecord]:
    """Execute the runs without a record in `folder`, and return the run records of the whole grid in order. With a
    shard they are those of the shard, and under torchrun only the first process returns any. Raises InputError,
    Interrupted and WorkerError."""
    engine = Engine(setup.conditions.hardware)
    console = Console(stderr=True, quiet=not engine.main)
    notify = printer(console)
    hosts = [host.rows for host in open_hosts(study, setup, notify)]
    runs = _shard(setup, grid(study, hosts=hosts, seeds=setup.seeds, recipe=setup.recipe))
    with _locked(folder, setup.shard, engine):
        missing = _missing(runs, folder, engine, notify)
        notify(f"study {study.name}{setup.shard}: {len(runs)} runs, {len(runs) - len(missing)} finished before, "
               f"records in {folder}")  # fmt: skip
        with stop_on_signal(notify) as request, reporter(console, missing) as sink:
            for part in (False, True):  # first the runs from whose weights others start
                _run_missing([run for run in missing if (run.start is not None) == part], setup, folder, sink, request)
        engine.close()
        return [RunRecord.load(run.record_path(folder)) for run in runs] if engine.main else []


def open_hosts(study: Study, setup: Setup, notify: Callable[[str], None]) -> list[Host]:
    """The hosts with their rows, each built once without memory, and the data. Raises InputError and SpecError."""
    rows = study.with_starts(setup.rows)
    hosts = []
    for name, cells in setup.hosts:
        conditions, recipe = setup.conditions, setup.recipe
        data = dataset(name, conditions, recipe)
        model = host_model(name, setup.model_args, conditions.source, data, recipe)
        for note in (*data.notes, *enlargement(data, conditions.source)):
            notify(note)
        models = with_rows(model, cells, rows)
        if scaled := [row for row in rows if row.scaled]:
            notify(f"{name}: measuring the outputs of the mixers of {len(scaled)} rows, to scale them")
            stages = host_stages(model, cells)
            models |= with_post_scales(model, stages, scaled, study.row(study.baseline), data)
        hosts.append(Host(models, data))
    return hosts


@contextmanager
def _locked(folder: Path, shard: Shard, engine: Engine) -> Iterator[None]:
    """Create the folder and lock it inside the context, in the first process."""
    if not engine.main:
        engine.wait()
        yield
        return
    writable_folder(folder)
    with sole_user(folder, OUTPUTS, shard.name):
        make_folders(folder)
        engine.wait()
        yield


def _shard(setup: Setup, runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """The runs of the shard; a run is where the run is from whose weights it starts."""
    own = set(setup.shard.of([run for run in runs if run.start is None]))
    return tuple(run for run in runs if (run.start or run) in own)


def _missing(runs: Sequence[Run], folder: Path, engine: Engine, notify: Callable[[str], None]) -> list[Run]:
    """The runs without a record, and those whose weights a missing one needs, as the first process finds them."""
    found = [run.key for run in _usable(runs, folder, notify)] if engine.main else []
    if engine.part.world > 1:
        shared = [found]
        broadcast_object_list(shared)
        found = shared[0]
    return [run for run in runs if run.key not in set(found)]


def _usable(runs: Sequence[Run], folder: Path, notify: Callable[[str], None]) -> list[Run]:
    """The runs that are not repeated."""
    records = finished(runs, folder, notify)
    needed = {run.start for run in runs if run not in records}
    lost = [run for run, record in records.items()
            if run in needed and record.failure is None and not run.weights_path(folder).exists()]  # fmt: skip
    for run in lost:
        notify(f"{run}: its weights, from which others start, are not in the folder; the run is repeated")
    return [run for run in records if run not in lost]


def _run_missing(
    missing: list[Run], setup: Setup, folder: Path, sink: Callable[..., None], request: StopRequest
) -> None:
    pool = pool_for(setup)
    if not missing:
        return
    try:
        if setup.cluster is not None:
            run_on_ray = import_module("kernelbank.studies.cluster").run_on_ray  # an extra
            run_on_ray(missing, setup.conditions, folder, setup.cluster, sink, request)
        else:
            run_all(missing, divide_cores(setup.conditions, pool), folder, pool, sink, request)
    except WorkerError as error:
        again = "finished runs are recorded, and the same command resumes the study"
        raise WorkerError(f"{error}; {again}", error.detail) from None
    except Stopped:
        raise Interrupted(request.exit_code) from None


def pool_for(setup: Setup) -> WorkerPool:
    """Return the processes of a study on this machine: one under torchrun, which starts its own, one per GPU, or on a
    CPU two, or one on a single core."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return WorkerPool()
    count = torch.cuda.device_count() if setup.conditions.hardware.device == "auto" else 0
    if not count:
        return WorkerPool(setup.jobs or min(JOBS, os.cpu_count() or 1))
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    return WorkerPool(setup.jobs or count, tuple(named or map(str, range(count)))[:count])


def divide_cores(conditions: Conditions, pool: WorkerPool) -> Conditions:
    """Return `conditions` with the cores divided between the processes that read images of each run."""
    if conditions.source.workers is not None:
        return conditions
    cores = min(8, max(1, (os.cpu_count() or 1) // pool.jobs))
    return replace(conditions, source=replace(conditions.source, workers=cores))


def printer(console: Console) -> Callable[[str], None]:
    """Return a function that prints lines on `console`."""

    def notify(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return notify
