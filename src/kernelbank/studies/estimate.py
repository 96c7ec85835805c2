"""Estimate the time of a study: every row of every host is timed for a few updates in the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter

from torch import Tensor

from kernelbank.analysis.count import multiply_adds
from kernelbank.data.augment import Augmentation
from kernelbank.data.dataset import Dataset, Split
from kernelbank.data.order import Share, epoch_length
from kernelbank.studies.run import Run, build, grid, on_meta_device, one_thread
from kernelbank.studies.session import Setup, divide_cores, open_hosts, pool_for
from kernelbank.studies.study import Study
from kernelbank.train.engine import Engine
from kernelbank.train.loop import train
from kernelbank.train.recipe import Recipe

UPDATES = 2
"""The number of updates that are timed, after as many warm-up updates."""
PROBE = 8
"""The number of images per update and process in the first measurement."""
BUDGET = 4.0
"""The largest time in seconds for the timed updates of a row. The batch size is chosen accordingly, from the first
measurement."""


@dataclass(frozen=True)
class RowEstimate:
    """The size of a row of a host, the time per training image and per evaluated image in seconds, measured with
    updates of `batch` images, and the time of one run."""

    model: str
    row: str
    mixer: str
    params: int
    macs: int
    batch: int
    train_seconds: float
    eval_seconds: float
    run_seconds: float


@dataclass(frozen=True)
class StudyEstimate:
    """The rows, the number of runs, the number of runs at a time, and the reason why the study could not start, if
    any."""

    rows: tuple[RowEstimate, ...]
    seeds: int
    jobs: int
    faults: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The time of all runs in sequence."""
        return self.seeds * sum(row.run_seconds for row in self.rows)


def estimate(study: Study, setup: Setup, notify: Callable[[str], None]) -> StudyEstimate:
    """Time every row of every host. Raises InputError if the study could not start."""
    pool, recipe = pool_for(setup), setup.recipe
    setup = replace(setup, conditions=divide_cores(setup.conditions, pool))
    rows, faults = list[RowEstimate](), list[str]()
    for host in open_hosts(study, setup, notify):
        if not epoch_length(len(host.data.train), recipe.repeats, recipe.batch_size, recipe.drop_last):
            faults.append(f"batch_size={recipe.batch_size} with {recipe.repeats} repeats leaves no update of "
                          f"{len(host.data.train)} training images; the study would not start")  # fmt: skip
        for run in grid(study, hosts=[host.rows], seeds=setup.seeds[:1], recipe=recipe):
            rows.append(_row(run, setup, host.data))
            notify(f"timed {run.model.name} {run.row}: {1 / rows[-1].train_seconds:,.0f} images/s")
    return StudyEstimate(tuple(rows), len(setup.seeds), pool.jobs, tuple(dict.fromkeys(faults)))


def _row(run: Run, setup: Setup, data: Dataset) -> RowEstimate:
    model, spec = on_meta_device(run.model)
    params, macs = sum(p.numel() for p in model.parameters()), multiply_adds(model, spec, data.img_size)
    engine, most = Engine(setup.conditions.hardware), min(run.recipe.batch_size, len(data.train))
    world = engine.part.world
    with one_thread() if engine.device.type == "cpu" else nullcontext():
        batch = _fitting(PROBE * world, most, world)
        training, evaluating = _timed(run, data, engine, batch)
        larger = _fitting(int(BUDGET / (2 * UPDATES * training)), most, world)
        if larger > batch:
            batch = larger
            training, evaluating = _timed(run, data, engine, batch)
    recipe = run.recipe
    steps = epoch_length(len(data.train), recipe.repeats, recipe.batch_size, recipe.drop_last)
    images = min(steps * recipe.batch_size, len(data.train)) or len(data.train)
    tested = 0 if data.test is None else len(data.test)
    evaluated = recipe.epochs * len(data.val) * (1 if recipe.ema is None else 2) + tested
    seconds = recipe.epochs * images * training + evaluated * evaluating
    return RowEstimate(run.model.name, run.row, spec.mixer or "", params, macs, batch, training, evaluating, seconds)


def _fitting(images: int, most: int, world: int) -> int:
    """Return the largest number of images up to `images` and `most` that divides over the processes and, with mixing,
    into pairs."""
    step = 2 * world
    return max(min(images, most) // step * step, step)


def _timed(run: Run, data: Dataset, engine: Engine, batch: int) -> tuple[float, float]:
    """Return the time per training image and per evaluated image in seconds. The training loop runs two epochs of a few
    updates of `batch` images, and the second one is timed."""
    head = replace(
        data, train=_Head(data.train, UPDATES * batch), val=_Head(data.val, 2 * batch), test=None
    )  # fmt: skip
    recipe: Recipe = replace(run.recipe, epochs=2, warmup_epochs=0, batch_size=batch, repeats=1, drop_last=True)
    ends, epochs = list[float](), list[float]()
    train(build(run), head, recipe, seed=run.seed, engine=engine, on_step=lambda _: ends.append(perf_counter()),
          on_epoch=lambda *_: epochs.append(perf_counter()))  # fmt: skip
    evaluations = 1 if recipe.ema is None else 2
    training = (ends[-1] - epochs[0]) / (len(head.train) // batch * batch)
    return training, (epochs[1] - ends[-1]) / (len(head.val) * evaluations)


class _Head:
    """The first images of a split, repeated if it has too few."""

    def __init__(self, split: Split, count: int) -> None:
        self.split, self.count, self.broken = split, count, split.broken

    def __len__(self) -> int:
        return self.count

    def batches(self, shares: Iterable[Share], augment: Augmentation | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `dataset.Split`."""
        real = len(self.split)
        return self.split.batches((replace(share, rows=share.rows % real) for share in shares), augment)
