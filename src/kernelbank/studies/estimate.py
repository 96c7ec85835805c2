"""How long a study would take: every row of every host, timed for a few updates through the training loop itself."""

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
from kernelbank.studies.run import Run, build, built, grid, one_thread
from kernelbank.studies.session import Setup, crew_for, open_hosts, shared_out
from kernelbank.studies.study import Study
from kernelbank.train.engine import Engine
from kernelbank.train.loop import train
from kernelbank.train.recipe import Recipe

UPDATES = 2
"""Updates that are timed, after as many that are not."""
PROBE = 8
"""Images of an update, on each process, with which timing starts."""
BUDGET = 4.0
"""Seconds that the timed updates of a row take at most, if the probe can be believed: the batch is chosen for it."""


@dataclass(frozen=True)
class RowEstimate:
    """A row of a host: its size, the seconds of training and of evaluating one image, from updates of `batch` images,
    and the seconds of one run."""

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
    """The rows, the number of runs, how many run at a time, and what would keep the study from starting."""

    rows: tuple[RowEstimate, ...]
    seeds: int
    jobs: int
    faults: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """All runs one after another."""
        return self.seeds * sum(row.run_seconds for row in self.rows)


def estimate(study: Study, setup: Setup, notify: Callable[[str], None]) -> StudyEstimate:
    """Time every row of every host. Raises InputError as a study that cannot start does."""
    crew, recipe = crew_for(setup), setup.recipe
    setup = replace(setup, conditions=shared_out(setup.conditions, crew))
    rows, faults = list[RowEstimate](), list[str]()
    for host in open_hosts(study, setup, notify):
        if not epoch_length(len(host.data.train), recipe.repeats, recipe.batch_size, recipe.drop_last):
            faults.append(f"batch_size={recipe.batch_size} with {recipe.repeats} repeats leaves no update of "
                          f"{len(host.data.train)} training images; the study would not start")  # fmt: skip
        for run in grid(study, hosts=[host.rows], seeds=setup.seeds[:1], recipe=recipe):
            rows.append(_row(run, setup, host.data))
            notify(f"timed {run.model.name} {run.row}: {1 / rows[-1].train_seconds:,.0f} images/s")
    return StudyEstimate(tuple(rows), len(setup.seeds), crew.jobs, tuple(dict.fromkeys(faults)))


def _row(run: Run, setup: Setup, data: Dataset) -> RowEstimate:
    model, spec = built(run.model)
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
    """The number of images nearest below `images`, at most `most`, that processes share evenly and mixing pairs."""
    step = 2 * world
    return max(min(images, most) // step * step, step)


def _timed(run: Run, data: Dataset, engine: Engine, batch: int) -> tuple[float, float]:
    """The seconds of training and of evaluating an image, by the loop itself with updates of `batch` images: two epochs
    of a few updates, of which the second counts."""
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
    """The first images of a split, repeated where it has fewer."""

    def __init__(self, split: Split, count: int) -> None:
        self.split, self.count, self.broken = split, count, split.broken

    def __len__(self) -> int:
        return self.count

    def batches(self, shares: Iterable[Share], augment: Augmentation | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `dataset.Split`."""
        real = len(self.split)
        return self.split.batches((replace(share, rows=share.rows % real) for share in shares), augment)
