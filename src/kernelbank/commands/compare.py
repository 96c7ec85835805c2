"""``kernelbank compare``: curves over each other, and the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError, require
from kernelbank.train.runs import read_run

if TYPE_CHECKING:
    from kernelbank.report.compare import Group


@dataclass(frozen=True, kw_only=True)
class Options:
    """Runs beside each other: what differs in the seed alone is one row, the first row is what the others are compared
    with."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs, finished or not, or record files, those of studies too."""
    figure: Annotated[str, tyro.conf.arg(metavar="FILE")] = "compare.png"
    """Where the curves go: .png, .svg or .pdf."""
    json: bool = False
    """Print the table as JSON."""


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code. Raises InputError."""
    options = read_options(Options, "compare", argv)
    if not options.runs:
        raise UsageError("compare", "no run is named; legal: RUN RUN ...")
    if Path(options.figure).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError("compare", f"--figure: {options.figure!r} is not legal; legal: a name in .png, .svg or .pdf")
    require("compare", "report", "matplotlib", "scipy")
    from kernelbank.report import compare  # noqa: PLC0415  (scipy is an extra)
    from kernelbank.report.curves import draw  # noqa: PLC0415  (matplotlib takes a second)

    paths = [Path(text) for text in dict.fromkeys(options.runs)]
    groups = compare.grouped([read_run(path) for path in paths])
    if not any(group.finished for group in groups):
        raise UsageError("compare", "none of the runs has an epoch to compare")
    draw(groups, Path(options.figure))
    if options.json:
        print(json.dumps(compare.document(groups), indent=2, allow_nan=False))
    else:
        _show(groups, options.figure)
    return 0


def _show(groups: Sequence[Group], figure: str) -> None:
    from kernelbank.report.compare import COLUMNS, cells_of, notes, tabulate  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("run", "seeds") else "right", no_wrap=name != "run")
    for line in tabulate(groups):
        table.add_row(*cells_of(line))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)
    console.print()
    for note in notes(groups):
        console.print(f"- {note}", markup=False, soft_wrap=True)
    console.print(f"curves in {figure}", markup=False, soft_wrap=True)
