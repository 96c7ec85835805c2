"""``kernelbank compare``: learning curves in one figure, and the table."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.errors import UsageError
from kernelbank.report.compare import COLUMNS, Group, cells_of, document, grouped, notes, tabulate
from kernelbank.report.curves import draw
from kernelbank.train.runs import read_run


def run(runs: Sequence[str], figure: Path, as_json: bool) -> int:
    """Compare the runs, write the figure and print the table; return the exit code. Raises InputError."""
    paths = [Path(text) for text in dict.fromkeys(runs)]
    with _warnings_on_stderr():
        groups = grouped([read_run(path) for path in paths])
    if not any(group.finished for group in groups):
        raise UsageError("compare", "none of the runs has an epoch to compare")
    draw(groups, figure)
    if as_json:
        print(json.dumps(document(groups), indent=2, allow_nan=False))
    else:
        _show(groups, figure)
    return 0


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("kernelbank"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _show(groups: Sequence[Group], figure: Path) -> None:
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
