"""``kernelbank study --dry-run``: the rows of a study with their sizes and the estimated time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.report.study_table import sizes_of
from kernelbank.studies.estimate import RowEstimate, StudyEstimate, estimate
from kernelbank.studies.session import Setup, printer
from kernelbank.studies.study import Study
from kernelbank.train.engine import Engine

COLUMNS = ("row", "mixer", "params", "MACs", "images/s", "timed with", "hours a run")
RIGHT = COLUMNS[2:]


def show(study: Study, setup: Setup, as_json: bool) -> int:
    """Time the study's rows and print them; return the exit code. Raises InputError."""
    main = Engine(setup.conditions.hardware).main
    found = estimate(study, setup, printer(Console(stderr=True, quiet=not main)))
    if not main:
        return 0
    if as_json:
        rows = [asdict(row) for row in found.rows]
        print(json.dumps({"study": study.name, **asdict(found), "rows": rows, "hours": found.seconds / 3600}, indent=1))
    else:
        _print(study, setup, found)
    return 0


def _print(study: Study, setup: Setup, found: StudyEstimate) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for model in dict.fromkeys(row.model for row in found.rows):
        console.print(_table(model, [row for row in found.rows if row.model == model]))
        console.print()
    recipe, runs = setup.recipe, found.seeds * len(found.rows)
    hours = found.seconds / 3600
    lines = [
        f"study {study.name}: {runs} runs ({len(found.rows)} rows, {found.seeds} seeds) of {recipe.epochs} epochs, "
        f"batch {recipe.batch_size}, lr {recipe.rates.top:.3g}",
        f"estimated {hours:.3g} hours one run after another; {found.jobs} at a time take at least "
        f"{hours / found.jobs:.3g}, more where they share what limits them",
        *found.faults,
    ]
    for line in lines:
        console.print(f"- {line}", markup=False, soft_wrap=True)


def _table(title: str, rows: Sequence[RowEstimate]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=name in RIGHT)
    for row in rows:
        table.add_row(
            row.row, row.mixer, *sizes_of(row.params, row.macs), f"{1 / row.train_seconds:,.1f}", f"batch {row.batch}",
            f"{row.run_seconds / 3600:.3g}",
        )  # fmt: skip
    return table
