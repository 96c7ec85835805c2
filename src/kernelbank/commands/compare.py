"""``kernelbank compare``: learning curves in one figure, and a table."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError, require

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare runs. Runs that differ only in their seed form one row, and the other rows are compared with the
    first."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Folders of runs, finished or not, or files of run records, those of studies included."""
    figure: Annotated[str, tyro.conf.arg(metavar="FILE")] = "compare.png"
    """The file for the curves: .png, .svg or .pdf."""
    json: bool = False
    """Print the table as JSON."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError."""
    options = read(argv)
    require("compare", "report", "matplotlib", "scipy")
    code: int = import_module("kernelbank.report.comparison").run(options.runs, Path(options.figure), options.json)
    return code


def read(argv: list[str]) -> Options:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(Options, "compare", argv)
    if not options.runs:
        raise UsageError("compare", "a run is missing; expected RUN ...")
    if Path(options.figure).suffix not in FORMATS:
        raise UsageError("compare", f"invalid --figure={options.figure!r}; expected a name in {', '.join(FORMATS)}")
    return options
