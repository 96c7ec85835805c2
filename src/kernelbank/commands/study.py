"""``kernelbank study``: run a study, or go on with it, and show its table."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.commands.options import read_options
from kernelbank.data.load import DATASETS, check_name, load
from kernelbank.errors import UsageError, WorkerError, require
from kernelbank.files import replace_text, sole_user, writable_folder
from kernelbank.records import RunRecord
from kernelbank.report import study_table as tables
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.study import Study
from kernelbank.text import suggest
from kernelbank.train.recipes import DIGITS_EPOCHS, digits_recipe

SEEDS, QUICK_SEEDS, QUICK_EPOCHS, WORKERS = (0, 1, 2), (0, 1), 8, 2
OUTPUTS = ("table.md", "table.json", "study.png", "records/*-seed*.json", "checkpoints/*-seed*.safetensors")
"""What a study writes below its folder."""


def _shown(metavar: str, default: str) -> Any:
    """How an option that is worked out later is shown in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run a study of the paper: a grid of records, trained with one recipe and compared over seeds. What is
    finished is not repeated: an interrupted study goes on where it was."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(STUDIES))]
    """softmax: what softmax does in attention. depthwise: the kernel bank with depth-wise kernels. assumptions: the
    choices that the paper leaves open."""
    out: Annotated[str | None, _shown("FOLDER", "runs/STUDY")] = None
    """Where the records, table.md, table.json and study.png go."""
    seeds: Annotated[tuple[int, ...] | None, _shown("INT ...", " ".join(map(str, SEEDS)))] = None
    """Seeds of the runs."""
    epochs: Annotated[int | None, _shown("INT", str(DIGITS_EPOCHS))] = None
    """Epochs of every run."""
    rows: Annotated[tuple[str, ...] | None, _shown("LABEL ...", "all")] = None
    """Rows to run."""
    skeleton: Literal["both", "plain", "hierarchical"] = "both"
    """Backbones to run."""
    data: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(DATASETS)}}}")] = next(iter(DATASETS))
    """Data set."""
    quick: bool = False
    """A taste in less than a minute: four rows, two seeds, eight epochs, in runs/STUDY-quick."""
    workers: Annotated[int | None, _shown("INT", f"{WORKERS}, or 1 on one core")] = None
    """Runs at a time, each in a process with one thread; the numbers do not depend on it."""
    json: bool = False
    """Print the table as JSON."""


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code. Raises InputError before anything runs."""
    options = read_options(Options, "study", argv)
    study = _study(options.study)
    _check(options, study)
    require("study", "train,report", "timm", "sklearn", "matplotlib", "torchvision", "accelerate")
    folder = writable_folder(Path(options.out or f"runs/{study.name}{'-quick' * options.quick}"))
    try:
        with sole_user(folder, OUTPUTS):
            records = _run(options, study, folder)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on where it was (records in {folder})", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(tables.document(study, records), indent=2, allow_nan=False))
    else:
        _show(study, records, folder)
    return 0


def _study(name: str) -> Study:
    """The study of this name. Raises UsageError for an unknown one."""
    if name not in STUDIES:
        raise UsageError("study", f"unknown study {name!r}{suggest(name, STUDIES)}; legal: {', '.join(STUDIES)}")
    return STUDIES[name]()


def _check(options: Options, study: Study) -> None:
    """Raises UsageError, naming the option, its value and what is legal."""
    labels = [row.label for row in study.rows]
    check_name(options.data)
    if options.out is not None and not options.out.strip():
        raise UsageError("study", "--out: an empty name is no folder")
    seeds, rows = options.seeds or (), options.rows or ()
    for name, given in (("--seeds", options.seeds), ("--rows", options.rows)):
        if given is None:
            continue
        if not given:
            raise UsageError("study", f"{name} is empty: name at least one, or leave the option out for all of them")
        if twice := [value for value in given if given.count(value) > 1]:
            raise UsageError("study", f"{name}: {twice[0]} is given twice")
    if unknown := [row for row in rows if row not in labels]:
        raise UsageError("study", f"--rows: unknown row {unknown[0]!r} of study {study.name}"
                                  f"{suggest(unknown[0], labels)}; legal: {', '.join(labels)}")  # fmt: skip
    for name, value, least in [("--epochs", options.epochs, 1), ("--workers", options.workers, 1),
                               *(("--seeds", seed, 0) for seed in seeds)]:  # fmt: skip
        if value is not None and value < least:
            raise UsageError("study", f"{name}={value} is not legal; legal: a whole number >= {least}")


def _run(options: Options, study: Study, folder: Path) -> list[RunRecord]:
    """Run what is missing and write the outputs; the records of the whole grid, in its order. Raises WorkerError."""
    # torch, timm and scikit-learn take seconds to import: only once the options are known to be good
    from kernelbank.report.study_figure import draw  # noqa: PLC0415
    from kernelbank.studies.progress import reporter  # noqa: PLC0415
    from kernelbank.studies.run import grid  # noqa: PLC0415
    from kernelbank.studies.runner import finished, run_all  # noqa: PLC0415

    console = Console(stderr=True)

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    recipe = digits_recipe(options.epochs or QUICK_EPOCHS) if options.epochs or options.quick else digits_recipe()
    skeletons = study.skeletons if options.skeleton == "both" else (options.skeleton,)
    rows = options.rows or (study.quick if options.quick else [row.label for row in study.rows])
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    data = load(options.data).identity
    runs = grid(study, skeletons=skeletons, rows=rows, seeds=seeds, recipe=recipe, data=data)
    there = finished(runs, folder, tell)
    missing = [run for run in runs if run not in there]
    tell(f"study {study.name}: {len(runs)} runs, {len(there)} finished before, records in {folder}")
    try:
        with reporter(console, len(missing), recipe.epochs) as sink:
            run_all(missing, folder, options.workers or min(WORKERS, os.cpu_count() or 1), sink)
    except WorkerError as error:
        again = "what is finished is recorded: the same command goes on where it was"
        raise WorkerError(f"{error}; {again}", error.detail) from None
    records = [RunRecord.load(run.record_path(folder)) for run in runs]
    replace_text(folder / "table.md", tables.markdown(study, records))
    replace_text(folder / "table.json", json.dumps(tables.document(study, records), indent=1, allow_nan=False) + "\n")
    draw(study, records, folder / "study.png")
    return records


def _show(study: Study, records: list[RunRecord], folder: Path) -> None:
    """The table, a part for each skeleton, and its notes."""
    console, rows = Console(highlight=False), tables.tabulate(study, records)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for skeleton in dict.fromkeys(row.skeleton for row in rows):
        cells = [tables.cells_of(row, study) for row in rows if row.skeleton == skeleton]
        wide = _table(skeleton, tables.COLUMNS, cells)
        fits = console.measure(wide, options=console.options.update(max_width=10_000)).maximum <= console.width
        # where it is too wide for the terminal, the changed cells stand below the label
        stacked = [(f"{label}\n{_indented(changed)}", *rest) for label, changed, *rest in cells]
        console.print(wide if fits else _table(skeleton, (tables.COLUMNS[0], *tables.COLUMNS[2:]), stacked))
        console.print()
    for note in tables.notes(study, records, rows):
        console.print(f"- {note}", markup=False)
    console.print(
        f"{folder}/table.md, table.json, study.png; a record per run in records/", markup=False, soft_wrap=True
    )


def _indented(changed: str) -> str:
    return textwrap.fill(changed, 28, initial_indent="  ", subsequent_indent="  ", break_long_words=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        right = name in tables.RIGHT
        shown.add_column(name, justify="right" if right else "left", no_wrap=right or name == "roles")
    for row in rows:
        shown.add_row(*row)
    return shown
