"""Compare runs: groups of runs that differ only in their seed, and differences with intervals over seeds. Imports no
torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, cast

from scipy import stats

from kernelbank.records import RunRecord

CONFIDENCE = 0.95
FEW = 3  # differing fields that a label has room for


@dataclass(frozen=True)
class Estimate:
    """A mean with half the width of its 95 % interval (Student's t), which is None for a single value."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half is None else f"{self.mean:.2f} ± {self.half:.2f}"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed. `label` names what distinguishes them from the other groups."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """The runs with at least one epoch that did not diverge."""
        return tuple(run for run in self.runs if run.failure is None and run.epochs)

    def curve(self, field: str) -> list[tuple[float, ...]]:
        """Return a field of the epochs of every finished run, by epoch, up to the last epoch that all of them have."""
        return list(zip(*([getattr(epoch, field) for epoch in run.epochs] for run in self.finished), strict=False))


@dataclass(frozen=True)
class Line:
    """The results of a group: top-1 in per cent, and `difference` in validation top-1 to the first group."""

    label: str
    seeds: tuple[int, ...]
    params: int
    macs: int
    train_loss: Estimate | None
    val_top1: Estimate | None
    difference: Estimate | None
    test_top1: Estimate | None
    epochs_to_first: int | None


def grouped(runs: Sequence[RunRecord]) -> tuple[Group, ...]:
    """The groups in the order of their first runs."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(json.dumps(_identity(run), sort_keys=True), []).append(run)
    identities = [json.loads(key) for key in found]
    return tuple(
        Group(_label(identity, identities, members[0].row), tuple(members))
        for identity, members in zip(identities, found.values(), strict=True)
    )


def _identity(run: RunRecord) -> dict[str, Any]:
    """Return the description of a run without its seed, as one flat dictionary."""
    model = run.model.to_document()
    flat = {"model": run.model.name, "mixer": run.mixer, "mlp": run.mlp}
    flat |= {"data": f"{run.data.name} {run.data.sha256[:8]}"}
    flat |= {f"model {name}": value for name, value in model["trunk"].items()}
    flat |= {f"model {name}": model[name] for name in ("img_size", "in_chans", "num_classes", "dropout")}
    return flat | {f"recipe {name}": value for name, value in run.recipe.items()}


def _label(identity: dict[str, Any], others: list[dict[str, Any]], name: str) -> str:
    """Return the values that differ between groups. If there are many, the label is the model, its mixer and the name
    of the first run."""
    known = dict.fromkeys(field for other in others for field in other)
    differing = [field for field in known if len({json.dumps(other.get(field)) for other in others}) > 1]
    bare = [str(identity[field]) for field in differing if field in ("model", "mixer")]
    rest = [f"{field}={identity.get(field)}" for field in differing if field not in ("model", "mixer")]
    parts = [*bare, *(rest if len(rest) <= FEW else [name])]
    return ", ".join(parts) or f"{identity['model']} {identity['mixer']}".strip()


def tabulate(groups: Sequence[Group]) -> tuple[Line, ...]:
    """Return a line for each group."""
    return tuple(_line(group, groups[0]) for group in groups)


def _line(group: Group, first: Group) -> Line:
    curve, goal = (by_epoch_mean(g, "val_top1") for g in (group, first))
    reached = [epoch for epoch, value in enumerate(curve, 1) if goal and value >= goal[-1]]
    last = [(run.seed, run.epochs[-1]) for run in group.finished]
    tests = [run.test_top1 for run in group.finished if run.test_top1 is not None]
    return Line(
        label=group.label,
        seeds=tuple(sorted(run.seed for run in group.runs)),
        params=group.runs[0].params,
        macs=group.runs[0].macs,
        train_loss=estimate([epoch.train_loss for _, epoch in last]),
        val_top1=estimate([epoch.val_top1 for _, epoch in last]),
        difference=None if group is first else difference(_by_seed(group), _by_seed(first)),
        test_top1=estimate(tests),
        epochs_to_first=reached[0] if reached else None,
    )


def _by_seed(group: Group) -> dict[int, float]:
    return {run.seed: run.epochs[-1].val_top1 for run in group.finished}


def by_epoch_mean(group: Group, field: str) -> list[float]:
    """Return a field of the epochs averaged over the finished runs of a group."""
    return [mean(values) for values in group.curve(field)]


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of `values` with its interval, or None if there are none."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None)
    return Estimate(mean(values), _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Estimate | None:
    """Return the difference of means: over pairs if both have the same seeds, otherwise by Welch's method."""
    if not ours or not theirs:
        return None
    if ours.keys() == theirs.keys():
        return estimate([ours[seed] - theirs[seed] for seed in sorted(ours)])
    gap = mean(ours.values()) - mean(theirs.values())
    if min(len(ours), len(theirs)) < 2:
        return Estimate(gap, None)
    parts = [stdev(values.values()) ** 2 / len(values) for values in (ours, theirs)]
    if not sum(parts):
        return Estimate(gap, 0.0)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (ours, theirs), strict=True))
    return Estimate(gap, _quantile(freedom) * math.sqrt(sum(parts)))


def _quantile(freedom: float) -> float:
    return float(cast(Any, stats).t.ppf((1 + CONFIDENCE) / 2, freedom))


COLUMNS = ("run", "seeds", "params", "MACs", "train loss", "validation top-1", "difference", "test top-1", "to first")


def cells_of(line: Line) -> tuple[str, ...]:
    """Return the line as texts under `COLUMNS`."""
    numbers = (line.train_loss, line.val_top1, line.difference, line.test_top1)
    return (
        line.label, " ".join(map(str, line.seeds)), f"{line.params / 1e6:.2f} M", f"{line.macs / 1e9:.3g} G",
        *("-" if number is None else str(number) for number in numbers),
        "-" if line.epochs_to_first is None else str(line.epochs_to_first),
    )  # fmt: skip


def notes(groups: Sequence[Group]) -> Iterator[str]:
    """Yield the notes below the table."""
    runs = [run for group in groups for run in group.runs]
    yield "mean ± half a 95 % interval over seeds (Student's t); differences are paired where the seeds are the same"
    yield "to first: the first epoch whose mean validation top-1 reaches the first row's after its last"
    if all(len(group.finished) < 2 for group in groups):
        yield "one seed each: no interval, so no difference here is a finding"
    if len({run.data.sha256 for run in runs}) > 1:
        yield "the data differ: the numbers are not comparable"
    if len({json.dumps(run.recipe, sort_keys=True) for run in runs}) > 1:
        yield "the recipes differ: comparisons hold within one recipe"
    for run in runs:
        name = f"{run.row} seed {run.seed}"
        if run.failure:
            yield f"{name} diverged: {run.failure}"
        elif len(run.epochs) < run.recipe["epochs"]:
            yield f"{name} has {len(run.epochs)} of {run.recipe['epochs']} epochs"
    if len({run.code.sources for run in runs}) > 1:
        yield "the records were made by different states of the code"


def document(groups: Sequence[Group]) -> dict[str, Any]:
    """The comparison as a JSON document."""
    return {"rows": [asdict(line) for line in tabulate(groups)], "notes": list(notes(groups))}
