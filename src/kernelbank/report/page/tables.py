"""The tables of the page. Numbers of rows link to runs, and runs to their records. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernelbank.report.sections import count, plural
from kernelbank.report.summary import Spread, SummaryRow
from kernelbank.spec.pipeline import ROLES
from kernelbank.studies.intervals import Interval
from kernelbank.studies.measures import BASELINE
from kernelbank.studies.trained_run import TrainedRun


@dataclass(frozen=True)
class Column:
    """A column of the table of rows: its name, a description, and whether it is sorted numerically."""

    name: str
    help: str
    number: bool = True


COLUMNS = (
    Column("row", "The row of the study, or the name of the run", number=False),
    Column("changed cells", f"The cells in which the mixer differs from {BASELINE}'s; without {BASELINE}, the mixer",
           number=False),
    Column("roles", "N normalisation, C communication between kernels, L non-linearity, derived from the activation",
           number=False),
    Column("params", "Parameters of the model"),
    Column("MACs", "Multiply-adds of one image"),
    Column("s / epoch", "Seconds of a training epoch, validation included: the median over epochs and runs"),
    Column("runs", "Runs that have all their epochs, of all runs"),
    Column("validation top-1", "After the last epoch: mean and sample standard deviation over seeds, per cent"),
    Column("test top-1", "Read once, after the last epoch: mean and sample standard deviation over seeds, per cent"),
    Column(f"less {BASELINE}", f"Test top-1 less {BASELINE}'s at the same seeds with its 95 % interval; not a verdict"),
)  # fmt: skip
RUN_COLUMNS = ("run record", "row", "seed", "learning rate", "epochs", "validation top-1", "test top-1", "s / epoch",
               "code", "SHA-256 of the record")  # fmt: skip


def row_cells(row: SummaryRow, compared: bool) -> list[dict[str, Any]]:
    """Return the cells of a row under `COLUMNS`. `compared` is whether the table has a baseline."""
    marks = "".join(letter if role in row.roles else "·" for letter, role in zip("NCL", ROLES, strict=True))
    changed = " ".join(f"{name}={text}" for name, text in row.changed) if compared else row.mixer
    label = f"{row.row} (baseline)" if row.is_baseline else row.row
    return [
        _cell(label, note=row.what),
        _cell(changed or "-"),
        _cell(marks, kind="roles"),
        _number(count(row.params), row.params),
        _number(count(row.macs), row.macs),
        _number("-" if row.epoch_seconds is None else f"{row.epoch_seconds:.3g}", row.epoch_seconds),
        _number(f"{len(row.finished)} of {len(row.runs)}", len(row.finished), note=state_text(row)),
        _number(spread_text(row.val), row.val.mean if row.val else None),
        _number(spread_text(row.test), row.test.mean if row.test else None),
        _number(
            f"{row.difference.mean:+.2f}" if row.difference else "-",
            row.difference.mean if row.difference else None,
            note=interval_text(row.difference),
        ),
    ]


def _cell(text: str, kind: str = "", note: str = "") -> dict[str, Any]:
    return {"text": text, "kind": kind, "value": None, "linked": False, "note": note}


def _number(text: str, value: float | None, note: str = "") -> dict[str, Any]:
    """Return a number that links to its runs. If it is missing, the row is sorted last."""
    return {"text": text, "kind": "number", "value": "" if value is None else f"{value:.12g}",
            "linked": value is not None, "note": note}  # fmt: skip


def state_text(row: SummaryRow) -> str:
    """Return the numbers of diverged runs and of runs in progress; empty if there are none."""
    parts = [f"{number} {state}" for number, state in ((row.diverged, "diverged"), (row.unfinished, "in progress"))
             if number]  # fmt: skip
    return ", ".join(parts)


def spread_text(spread: Spread | None) -> str:
    """Return a mean with its standard deviation."""
    if spread is None:
        return "-"
    return f"{spread.mean:.2f}" if spread.deviation is None else f"{spread.mean:.2f} ± {spread.deviation:.2f}"


def interval_text(estimate: Interval | None) -> str:
    """Return the ends of an interval; empty if there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:+.2f} to {estimate.high:+.2f}"


def run_cells(run: TrainedRun, sha256: str) -> list[str]:
    """Return the cells of a run under `RUN_COLUMNS`, without the first."""
    return [
        run.row, str(run.seed), f"{run.rate:g}", _epochs(run), f"{run.curve[-1]:.2f}" if run.curve else "-",
        "-" if run.test_top1 is None else f"{run.test_top1:.2f}",
        "-" if run.epoch_seconds is None else f"{run.epoch_seconds:.3g}",
        f"{run.code.version}, {run.code.sources[:10]}", sha256[:16],
    ]  # fmt: skip


def _epochs(run: TrainedRun) -> str:
    done = str(len(run.curve)) if run.finished else f"{len(run.curve)} of {run.epochs}"
    return f"{done}, diverged: {run.failure}" if run.diverged else done


def facts(runs: Sequence[TrainedRun]) -> Iterator[tuple[str, str]]:
    """Yield data, recipe, machines and code of a section in full, as (name, value)."""
    first = runs[0]
    yield "data", f"{first.data.name}, SHA-256 {first.data.sha256}"
    yield "images", f"{first.data.train:,} training, {first.data.val:,} validation, {first.data.test:,} test"
    for name in dict.fromkeys(name for run in runs for name in run.recipe):
        values = dict.fromkeys(str(run.recipe.get(name)) for run in runs)
        yield f"recipe: {name}", " or ".join(values)
    for machine in dict.fromkeys(run.machine for run in runs):
        accelerator = f", {machine.accelerator}" if machine.accelerator else ""
        number = plural(sum(run.machine == machine for run in runs), "run")
        yield (
            "machine",
            (
                f"{machine.cpu}, {machine.cores} cores{accelerator}, {machine.processes} process"
                f"{'es' * (machine.processes != 1)} of {machine.threads} thread{'s' * (machine.threads != 1)}, "
                f"Python {machine.python}, torch {machine.torch} ({number})"
            ),
        )
    for code in dict.fromkeys(run.code for run in runs):
        commit = f", commit {code.commit}" if code.commit else ""
        number = plural(sum(run.code == code for run in runs), "run")
        yield "code", f"kernelbank {code.version}, sources {code.sources}{commit} ({number})"
