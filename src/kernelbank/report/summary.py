"""The rows of a report: one for each study, model, row and learning rate. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, median, stdev

from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.designs import DESIGNS
from kernelbank.studies.intervals import Interval, interval
from kernelbank.studies.measures import BASELINE
from kernelbank.studies.trained_run import TrainedRun


@dataclass(frozen=True)
class Spread:
    """A mean over runs with the sample standard deviation; `deviation` is None for one run."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class SummaryRow:
    """Runs that differ only in their seed.

    `changed` are the cells that differ from the baseline's, and its MLPs, as (field, text). Accuracies are top-1 in per
    cent over the runs that finished; `difference` is test top-1 less the baseline's, paired by seed, with its 95 %
    interval.
    `epoch_seconds` is the median over runs. `diverged` and `unfinished` count runs.
    """

    study: str
    model: str
    row: str
    what: str
    rate: float
    mixer: str
    mlp: str
    changed: tuple[tuple[str, str], ...]
    roles: tuple[str, ...]
    params: int
    macs: int
    epoch_seconds: float | None
    val: Spread | None
    test: Spread | None
    difference: Interval | None
    diverged: int
    unfinished: int
    runs: tuple[TrainedRun, ...]

    @property
    def key(self) -> str:
        """A name for anchors, unique in a setting."""
        return f"{self.study}/{self.model}/{self.row}/{self.rate:g}"

    @property
    def finished(self) -> tuple[TrainedRun, ...]:
        """The runs that have all their epochs."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def is_baseline(self) -> bool:
        """Whether the other rows are compared with this one."""
        return self.row == BASELINE


def ordered(runs: Sequence[TrainedRun]) -> tuple[TrainedRun, ...]:
    """Return the runs ordered by study, by model and row as in the study, by learning rate and by seed."""
    return tuple(sorted(runs, key=_place))


def _place(run: TrainedRun) -> tuple[str, int, str, int, str, float, int]:
    labels = list(_known_rows(run.study))
    return (run.study, _index(HOSTS, run.model), run.model, _index(labels, run.row), run.row, run.rate, run.seed)


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


HOSTS = tuple(dict.fromkeys(host for design in DESIGNS.values() for host in design.hosts))
"""The host models of the designs, in order."""


@cache
def _known_rows(study: str) -> Mapping[str, str]:
    """Return what each row of a study isolates, by label; empty for a study that this version does not have."""
    return {row.label: row.what for row in STUDIES[study]().rows} if study in STUDIES else {}


def summarise(runs: Sequence[TrainedRun]) -> tuple[SummaryRow, ...]:
    """Return the rows of the runs of one setting, in the order of `ordered`."""
    groups: dict[tuple[str, str, str, float], list[TrainedRun]] = {}
    for run in ordered(runs):
        groups.setdefault((run.study, run.model, run.row, run.rate), []).append(run)
    return tuple(
        _row(tuple(members), groups.get((study, model, BASELINE, rate), []))
        for (study, model, _, rate), members in groups.items()
    )


def _row(runs: tuple[TrainedRun, ...], baseline: Sequence[TrainedRun]) -> SummaryRow:
    first, done = runs[0], [run for run in runs if run.finished]
    times = [run.epoch_seconds for run in runs if run.epoch_seconds is not None]
    return SummaryRow(
        study=first.study,
        model=first.model,
        row=first.row,
        what=_known_rows(first.study).get(first.row, ""),
        rate=first.rate,
        mixer=first.mixer,
        mlp=first.mlp,
        changed=_changed(first, baseline[0] if baseline else None),
        roles=first.roles,
        params=first.params,
        macs=first.macs,
        epoch_seconds=median(times) if times else None,
        val=spread([run.curve[-1] for run in done]),
        test=spread([run.test_top1 for run in done if run.test_top1 is not None]),
        difference=None if first.row == BASELINE else _difference(done, baseline),
        diverged=sum(run.diverged for run in runs),
        unfinished=sum(not run.finished and not run.diverged for run in runs),
        runs=runs,
    )


def spread(values: Sequence[float]) -> Spread | None:
    """Return the mean and the sample standard deviation of `values`, or None if there are none."""
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def _changed(run: TrainedRun, baseline: TrainedRun | None) -> tuple[tuple[str, str], ...]:
    """The cells that differ from the baseline's, and the MLPs if they do; where stages differ among themselves, their
    values by stage."""
    if baseline is None or len(run.specs) != len(baseline.specs):
        return ()
    by_stage = [spec.diff(base) for spec, base in zip(run.specs, baseline.specs, strict=True)]
    names = dict.fromkeys(name for differing in by_stage for name in differing)
    values = {name: [spec.text[name] for spec in run.specs] for name in names}
    cells = [(name, texts[0] if len(set(texts)) == 1 else " | ".join(texts)) for name, texts in values.items()]
    return (*cells, *([("mlp", run.mlp)] if run.mlp != baseline.mlp else []))


def _difference(runs: Sequence[TrainedRun], baseline: Sequence[TrainedRun]) -> Interval | None:
    """Return test top-1 minus that of the baseline at the same seeds."""
    theirs = {run.seed: run.test_top1 for run in baseline if run.finished}
    pairs = [(run.test_top1, theirs.get(run.seed)) for run in runs]
    gains = [ours - other for ours, other in pairs if ours is not None and other is not None]
    return interval(gains, resolution=100.0 / runs[0].data.test if runs[0].data.test else 0.0) if gains else None
