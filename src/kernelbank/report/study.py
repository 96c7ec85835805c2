"""Run a study and write its table to the terminal, and table.md, table.json and study.png to its folder."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.files import replace_text
from kernelbank.records import RunRecord
from kernelbank.report import study_table as tables
from kernelbank.report.study_figure import draw
from kernelbank.studies import session
from kernelbank.studies.session import Interrupted, Setup
from kernelbank.studies.study import Study


def run(study: Study, setup: Setup, folder: Path, as_json: bool) -> int:
    """Execute the missing runs, write the files, print the table and return the exit code. Shards, and processes under
    torchrun except the first, write no table. Raises InputError and WorkerError."""
    try:
        records = session.run(study, setup, folder)
    except KeyboardInterrupt as stop:
        print(f"interrupted: run the same command to resume (run records in {folder})", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else 130
    if setup.shard.name is not None:
        print(f"shard {setup.shard.name}: {len(records)} runs recorded in {folder}/records; once every shard is done, "
              "the same command without --shard writes the table", file=sys.stderr)  # fmt: skip
        return 0
    if not records:
        return 0
    _write(study, records, folder)
    if as_json:
        print(json.dumps(tables.document(study, records), indent=2, allow_nan=False))
    else:
        _show(study, records, folder)
    return 0


def _write(study: Study, records: list[RunRecord], folder: Path) -> None:
    replace_text(folder / "table.md", tables.markdown(study, records))
    replace_text(folder / "table.json", json.dumps(tables.document(study, records), indent=1, allow_nan=False) + "\n")
    draw(study, records, folder / "study.png")


def _show(study: Study, records: list[RunRecord], folder: Path) -> None:
    """Print the table, one part per model, and its notes."""
    console, rows = Console(highlight=False), tables.tabulate(study, records)
    columns = tables.columns_of(records)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for model in dict.fromkeys(row.model for row in rows):
        cells = [tables.cells_of(row, study) for row in rows if row.model == model]
        wide = _table(model, columns, cells)
        fits = console.measure(wide, options=console.options.update(max_width=10_000)).maximum <= console.width
        # where it is too wide for the terminal, the changed cells are below the label
        stacked = [(f"{label}\n{_indented(changed)}", *rest) for label, changed, *rest in cells]
        console.print(wide if fits else _table(model, (columns[0], *columns[2:]), stacked))
        console.print()
    for note in tables.notes(study, records, rows):
        console.print(f"- {note}", markup=False)
    console.print(
        f"{folder}/table.md, table.json, study.png; one run record per run in records/", markup=False, soft_wrap=True
    )


def _indented(changed: str) -> str:
    return textwrap.fill(changed, 28, initial_indent="  ", subsequent_indent="  ", break_long_words=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        right = name in tables.RIGHT
        table.add_column(name, justify="right" if right else "left", no_wrap=right or name == "roles")
    for row in rows:
        table.add_row(*row)
    return table
