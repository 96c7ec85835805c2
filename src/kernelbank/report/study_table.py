"""The table of a study from its run records, as text and as a document. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from kernelbank.records import CodeIdentity, RunRecord
from kernelbank.spec import MixerSpec
from kernelbank.spec.pipeline import ROLES
from kernelbank.studies.study import Study
from kernelbank.train.recipe import stated

EPOCHS_TO_BASELINE = (
    "to baseline: the first epoch at which the row's validation top-1, averaged over its seeds, reaches that of the "
    "baseline after its last epoch; - if none does"
)


@dataclass(frozen=True)
class TableRow:
    """One row in one model. `changed` are the cells that differ from the baseline's, and the MLPs, as (field, text);
    numbers are over the seeds that finished, top-1 in per cent, `*_sd` the sample standard deviation (None for one).
    `start_top1` is the validation top-1 before the first update of a row that starts from trained weights."""

    model: str
    row: str
    what: str
    mixer: str
    changed: tuple[tuple[str, str], ...]
    roles: tuple[str, ...]
    params: int
    macs: int
    seeds: tuple[int, ...]
    test_top1: float | None
    test_top1_sd: float | None
    val_top1: float | None
    epochs_to_baseline: int | None
    start_top1: float | None
    failures: tuple[str, ...]


def tabulate(study: Study, records: Sequence[RunRecord]) -> tuple[TableRow, ...]:
    """Return the table rows that have records, in the order of the study."""
    cells: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        cells.setdefault((record.model.name, record.row), []).append(record)
    return tuple(
        _row(study, cells[model, row.label], cells.get((model, study.baseline), []))
        for model in dict.fromkeys(record.model.name for record in records)
        for row in study.rows
        if (model, row.label) in cells
    )


def _row(study: Study, records: list[RunRecord], baseline: list[RunRecord]) -> TableRow:
    first = records[0]
    done = [record for record in records if record.failure is None]
    test = [record.test_top1 for record in done if record.test_top1 is not None]
    starts = [record.start_top1 for record in records if record.start_top1 is not None]
    curve, goal = mean_curve(records), mean_curve(baseline)
    reached = [epoch for epoch, value in enumerate(curve, 1) if goal and value >= goal[-1]]
    specs = specs_of(first)
    return TableRow(
        model=first.model.name,
        row=first.row,
        what=study.row(first.row).what,
        mixer=first.mixer,
        changed=_changed_here(study, first, baseline[0] if baseline else None),
        roles=tuple(role for role in ROLES if any(role in spec.roles for spec in specs)),
        params=first.params,
        macs=first.macs,
        seeds=tuple(sorted(record.seed for record in records)),
        test_top1=mean(test) if test else None,
        test_top1_sd=stdev(test) if len(test) > 1 else None,
        val_top1=curve[-1] if curve else None,
        epochs_to_baseline=reached[0] if reached else None,
        start_top1=mean(starts) if starts else None,
        failures=tuple(f"seed {record.seed}: {record.failure}" for record in records if record.failure),
    )


def specs_of(record: RunRecord) -> tuple[MixerSpec, ...]:
    """Return the specs of the mixers of a record: one if all stages are equal, otherwise one per stage."""
    return tuple(MixerSpec.parse(text) for text in record.mixer.split("|"))


def mean_curve(records: Sequence[RunRecord]) -> list[float]:
    """Validation top-1 by epoch, averaged over the runs that finished."""
    return [mean(values) for values in by_epoch(records)]


def by_epoch(records: Sequence[RunRecord]) -> list[tuple[float, ...]]:
    """The validation top-1 of every run that finished, epoch by epoch."""
    curves = [[epoch.val_top1 for epoch in record.epochs] for record in records if record.failure is None]
    return list(zip(*curves, strict=True))


def _changed_here(study: Study, record: RunRecord, baseline: RunRecord | None) -> tuple[tuple[str, str], ...]:
    """The cells in which the row differs from the baseline, or states that it does, and its MLPs where they differ."""
    specs = specs_of(record)
    mixers = _stated(study, record.row, specs) if baseline is None else _changed(specs, specs_of(baseline))
    other = study.row(record.row).mlp if baseline is None else record.mlp != baseline.mlp
    return (*mixers, ("mlp", record.mlp)) if other else mixers


def _changed(specs: tuple[MixerSpec, ...], baseline: tuple[MixerSpec, ...]) -> tuple[tuple[str, str], ...]:
    """Return the cells that differ from the baseline's. If stages differ from each other, the values are by stage."""
    count = max(len(specs), len(baseline))
    specs, baseline = (each * (count if len(each) == 1 else 1) for each in (specs, baseline))
    by_stage = [spec.diff(base) for spec, base in zip(specs, baseline, strict=True)]
    return _texts(specs, dict.fromkeys(name for differing in by_stage for name in differing))


def _stated(study: Study, label: str, specs: tuple[MixerSpec, ...]) -> tuple[tuple[str, str], ...]:
    """The cells that the study states for the row and not, or otherwise, for the baseline: where no record of the
    baseline says what its host has."""
    row, baseline = (study.row(each).stated() for each in (label, study.baseline))
    return _texts(specs, [name for name, text in row.items() if baseline.get(name) != text])


def _texts(specs: tuple[MixerSpec, ...], names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    values = {name: [spec.text[name] for spec in specs] for name in names}
    return tuple((name, texts[0] if len(set(texts)) == 1 else " | ".join(texts)) for name, texts in values.items())


# ---- text ----------------------------------------------------------------------------------------------------

COLUMNS = ("row", "changed cells", "roles", "params", "MACs", "test top-1", "to baseline")
RIGHT = ("params", "MACs", "test top-1", "val top-1", "to baseline")
LEGEND = "roles: N normalisation, C communication between kernels, L non-linearity, derived from the activation"


def columns_of(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """Return `COLUMNS`, with validation top-1 for data without a test split."""
    return COLUMNS if records[0].data.test else tuple(name.replace("test", "val") for name in COLUMNS)


def cells_of(row: TableRow, study: Study) -> tuple[str, ...]:
    """Return the row as texts under `columns_of`."""
    changed = " ".join(f"{name}={text}" for name, text in row.changed)
    marks = "".join(letter if role in row.roles else "·" for letter, role in zip("NCL", ROLES, strict=True))
    accuracy = row.val_top1 if row.test_top1 is None else row.test_top1
    top1 = "diverged" if accuracy is None else f"{accuracy:.1f}"
    if row.test_top1_sd is not None:
        top1 += f" ± {row.test_top1_sd:.1f}"
    if row.failures and accuracy is not None:
        top1 += f" ({len(row.failures)} of {len(row.seeds)} diverged)"
    label = f"{row.row} (baseline)" if row.row == study.baseline else row.row
    reached = "-" if row.epochs_to_baseline is None else str(row.epochs_to_baseline)
    return (label, changed or "-", marks, *sizes_of(row.params, row.macs), top1, reached)


def sizes_of(params: int, macs: int) -> tuple[str, str]:
    """Return parameters in thousands and multiply-adds in millions, or in millions and billions if they are large."""
    small = params < 1e6
    return (f"{params / 1e3:.1f} K" if small else f"{params / 1e6:.2f} M",
            f"{macs / 1e6:.2f} M" if macs < 1e8 else f"{macs / 1e9:.3f} G")  # fmt: skip


def notes(study: Study, records: Sequence[RunRecord], rows: Sequence[TableRow]) -> Iterator[str]:
    """Yield the notes below the table: definitions, sample sizes, divergence, different states of the code."""
    first, top1 = records[0], [row.test_top1 for row in rows if row.test_top1 is not None]
    runs, seeds = len(records), sorted({record.seed for record in records})
    recipe = ", ".join(f"{name} {value}" for name, value in stated(first.recipe).items())
    mlp = next((record.mlp for record in records if record.row == study.baseline), first.mlp)
    yield f"{runs} runs, seeds {', '.join(map(str, seeds))}; mlp {mlp}; {recipe}"
    if first.data.test:
        yield "test top-1: mean ± sample standard deviation over seeds, in per cent; read once, after the last epoch"
    else:
        yield "val top-1: mean over seeds of the validation split after the last epoch, in per cent; no test split"
    yield LEGEND
    yield EPOCHS_TO_BASELINE
    yield from _fine_tuned(study, records, rows)
    if not any(row.row == study.baseline for row in rows):
        yield f"the baseline {study.baseline!r} is not among the rows: nothing is compared with it"
    for row in rows:
        for failure in row.failures:
            yield f"diverged: {row.model} {row.row}, {failure}"
    images = f"{first.data.test} test images" if first.data.test else f"{first.data.val} validation images"
    if top1:
        error = 100 * math.sqrt(mean(top1) * (100 - mean(top1)) / 1e4 / first.data.test)
        images += f": a standard error of {error:.1f} points at {mean(top1):.0f} %, beside the spread over seeds"
    yield f"demonstration on {first.data.name}: no verdicts ({images})"
    here = CodeIdentity.here()
    if other := sum(record.code.sources != here.sources for record in records):
        yield f"{other} of {runs} records were made by another state of the code than this one"


def _fine_tuned(study: Study, records: Sequence[RunRecord], rows: Sequence[TableRow]) -> Iterator[str]:
    """What rows start from, and where: their 0 epochs."""
    for row in rows:
        tuning = study.row(row.row).fine_tuning
        if tuning is not None and row.start_top1 is not None:
            rate = next(record.recipe["lr"] for record in records if record.row == row.row)
            yield (f"{row.model} {row.row}: from the weights of {tuning.row}, {tuning.epochs} more with lr {rate:g}; "
                   f"validation top-1 {row.start_top1:.1f} before the first update")  # fmt: skip


def markdown(study: Study, records: Sequence[RunRecord]) -> str:
    """Return the study as Markdown: its questions, a table per model, notes, the figure."""
    rows, columns = tabulate(study, records), columns_of(records)
    lines = [f"# {study.title}", "", *(f"- {question}" for question in study.questions), ""]
    for model in dict.fromkeys(row.model for row in rows):
        lines += [f"## {model}", "", _line(columns), _line(["---:" if name in RIGHT else "---" for name in columns])]
        lines += [_line(cells_of(row, study)) for row in rows if row.model == model]
        lines.append("")
    lines += ["Rows:", "", *(f"- `{row.row}`: {row.what}" for row in {row.row: row for row in rows}.values()), ""]
    lines += [*(f"- {note}" for note in notes(study, records, rows)), "", "![validation top-1 by epoch](study.png)", ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def document(study: Study, records: Sequence[RunRecord]) -> dict[str, Any]:
    """The study as a JSON document."""
    rows = tabulate(study, records)
    return {
        "study": study.name,
        "title": study.title,
        "questions": list(study.questions),
        "baseline": study.baseline,
        "rows": [{**asdict(row), "changed": dict(row.changed)} for row in rows],
        "notes": list(notes(study, records, rows)),
        "records": len(records),
    }
