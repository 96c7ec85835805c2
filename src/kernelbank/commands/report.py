"""``kernelbank report``: one HTML page from a folder of run records."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError, require


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one HTML page from run records: the verdict on each claim of the paper with its effect, interval and rule,
    tables, convergence curves, accuracy against cost, and the recipe. The page needs no network. Nothing is trained."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A folder with run records of studies or of training, which may be in subfolders."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: FOLDER/report.html)")] = None
    """The file for the page, which must end in .html."""
    json: bool = False
    """Print verdicts and rows as JSON."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError."""
    options = read(argv)
    require("report", "report", "matplotlib", "jinja2", "plotly", "scipy")
    page = None if options.out is None else Path(options.out)
    code: int = import_module("kernelbank.report.folder").run(Path(options.folder), page, options.json)
    return code


def read(argv: list[str]) -> Options:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(Options, "report", argv)
    if options.out is not None and Path(options.out).suffix != ".html":
        raise UsageError("report", f"invalid --out={options.out!r}; expected a name that ends in .html")
    return options
