"""The sections of a report: one for each setting, with its verdicts and tables. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernelbank.report.summary import SummaryRow, ordered, summarise
from kernelbank.studies.trained_run import SetAside, TrainedRun, at_best_rate, at_shared_rate, by_setting
from kernelbank.studies.verdicts import ClaimVerdict, decide


@dataclass(frozen=True)
class Section:
    """The runs of one setting, which is data and recipe without the learning rate.

    `differs` are the recipe fields in which the settings of the report differ, with the values of this one. `shared`
    are the verdicts at the learning rate that most runs use, and `best` those with each row at its own best rate, or
    None if only one rate was used.
    """

    runs: tuple[TrainedRun, ...]
    differs: tuple[tuple[str, Any], ...]
    rows: tuple[SummaryRow, ...]
    shared: tuple[ClaimVerdict, ...]
    best: tuple[ClaimVerdict, ...] | None
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The data, the epochs, and the fields that distinguish the setting."""
        first = self.runs[0]
        apart = [f"{name} {value}" for name, value in self.differs if name != "epochs"]
        return ", ".join([first.data.name, plural(first.epochs, "epoch"), *apart])

    @property
    def groups(self) -> tuple[tuple[SummaryRow, ...], ...]:
        """The rows of each study and model."""
        found: dict[tuple[str, str], list[SummaryRow]] = {}
        for row in self.rows:
            found.setdefault((row.study, row.model), []).append(row)
        return tuple(tuple(rows) for rows in found.values())

    @property
    def caveat(self) -> str:
        """The scope of the verdicts."""
        first, sizes = self.runs[0], sorted(run.params for run in self.runs)
        return (
            f"Verdicts hold for this scale only: {first.data.name} with {first.data.train:,} training and "
            f"{first.data.test:,} test images, {plural(first.epochs, 'epoch')}, models of {count(sizes[0])} to "
            f"{count(sizes[-1])} parameters. Intervals are over seeds: they do not cover the choice of the images."
        )


def sections(runs: Sequence[TrainedRun]) -> tuple[Section, ...]:
    """Return the sections of a report, starting with the one with most runs."""
    settings = tuple(by_setting(runs))
    fields = _differing([members[0] for members in settings])
    return tuple(_section(ordered(members), fields) for members in settings)


def _section(runs: tuple[TrainedRun, ...], fields: Sequence[str]) -> Section:
    searched = len({(run.study, run.model, run.row, run.rate) for run in runs}) > len(
        {(run.study, run.model, run.row) for run in runs}
    )
    return Section(
        runs=runs,
        differs=tuple((name, runs[0].recipe.get(name)) for name in fields),
        rows=summarise(runs),
        shared=decide(at_shared_rate(runs)),
        best=decide(at_best_rate(runs)) if searched else None,
        notes=tuple(_notes(runs)),
    )


def _differing(firsts: Sequence[TrainedRun]) -> tuple[str, ...]:
    """Return the recipe fields in which settings on the same data differ."""
    names = dict.fromkeys(name for run in firsts for name in run.recipe)
    data = dict.fromkeys(run.data.sha256 for run in firsts)
    recipes = [[run.recipe for run in firsts if run.data.sha256 == sha] for sha in data]
    return tuple(name for name in names if name not in ("lr", "warmup_lr")
                 and any(len({json.dumps(recipe.get(name)) for recipe in group}) > 1 for group in recipes))  # fmt: skip


def _notes(runs: Sequence[TrainedRun]) -> Iterator[str]:
    """Yield the notes on the runs of a section."""
    states = dict.fromkeys(run.code.sources for run in runs)
    if len(states) > 1:
        named = ", ".join(
            f"{_code(runs, state)} ({plural(sum(r.code.sources == state for r in runs), 'run')})" for state in states
        )
        yield f"The runs were made by {len(states)} states of the code: {named}."
    machines = {run.machine for run in runs}
    if len(machines) > 1:
        yield f"The runs were made on {len(machines)} machines or with different versions; their times do not compare."
    for run in runs:
        if run.diverged:
            yield f"Diverged: {_name(run)}: {run.failure}"
        elif not run.finished:
            yield f"In progress: {_name(run)}: {len(run.curve)} of {run.epochs} epochs; it is not part of any verdict."
    yield from _unpaired(runs)


def _code(runs: Sequence[TrainedRun], sources: str) -> str:
    code = next(run.code for run in runs if run.code.sources == sources)
    return f"version {code.version}, sources {sources[:10]}"


def _name(run: TrainedRun) -> str:
    return f"{run.study}, {run.model}, {run.row}, seed {run.seed}"


def _unpaired(runs: Sequence[TrainedRun]) -> Iterator[str]:
    """Yield the rows of a study and model without seeds that other rows have."""
    groups: dict[tuple[str, str], dict[str, set[int]]] = {}
    for run in runs:
        groups.setdefault((run.study, run.model), {}).setdefault(run.row, set()).add(run.seed)
    for (study, model), rows in groups.items():
        every = set[int]().union(*rows.values()) if study != "train" else set[int]()
        lacking: dict[tuple[int, ...], list[str]] = {}
        for row, seeds in rows.items():
            if missing := tuple(sorted(every - seeds)):
                lacking.setdefault(missing, []).append(row)
        for missing, labels in lacking.items():
            yield (f"Missing seeds in {study}, {model}: {', '.join(labels)} without {', '.join(map(str, missing))}. "
                   "Differences use the seeds that both rows have.")  # fmt: skip


def evaluated(verdicts: Sequence[ClaimVerdict]) -> tuple[ClaimVerdict, ...]:
    """Return the verdicts on claims of which at least one part was measured."""
    return tuple(verdict for verdict in verdicts if any(finding.effect is not None for finding in verdict.findings))


def report_notes(found: Sequence[Section], aside: Sequence[SetAside]) -> tuple[str, ...]:
    """Return the notes above all sections: files that were not used, and settings that are not compared."""
    lines = [f"Not used: {item.file}: {item.reason}" for item in aside]
    if len(found) > 1:
        lines.append(
            f"The runs have {len(found)} settings (data or recipe); runs are compared inside one setting only."
        )
    return tuple(lines)


def plural(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def count(value: float) -> str:
    """Return a number with three digits and K, M or G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:g}"
