"""``kernelbank study``: run a study, or go on with it, and show its table."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from kernelbank.commands.options import read_options
from kernelbank.data.load import NAMED_DATA, check_name
from kernelbank.errors import UsageError, require
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.study import Study
from kernelbank.text import suggest
from kernelbank.train.recipes import DIGITS_EPOCHS, digits_recipe
from kernelbank.train.request import check_seed

SEEDS, QUICK_SEEDS, QUICK_EPOCHS = (0, 1, 2), (0, 1), 8


def _shown(metavar: str, default: str) -> Any:
    """How an option whose default depends on others is shown in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run a study of the paper: a grid of specs, trained with one recipe and compared over seeds. Finished runs are not
    repeated: an interrupted study goes on with the same command."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(STUDIES))]
    """softmax: what softmax does in attention. depthwise: the kernel bank with depth-wise kernels. assumptions: the
    choices that the paper leaves open."""
    out: Annotated[str | None, _shown("FOLDER", "runs/STUDY")] = None
    """Where the run records, table.md, table.json and study.png go."""
    seeds: Annotated[tuple[int, ...] | None, _shown("INT ...", " ".join(map(str, SEEDS)))] = None
    """Seeds of the runs."""
    epochs: Annotated[int | None, _shown("INT", str(DIGITS_EPOCHS))] = None
    """Epochs of every run."""
    rows: Annotated[tuple[str, ...] | None, _shown("LABEL ...", "all")] = None
    """Rows to run."""
    models: Annotated[tuple[str, ...] | None, _shown("MODEL ...", "all")] = None
    """Models to run: plain, hierarchical."""
    data: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(NAMED_DATA)}}}")] = next(iter(NAMED_DATA))
    """Data set."""
    quick: bool = False
    """A short version of less than a minute: four rows, two seeds, eight epochs, in runs/STUDY-quick."""
    workers: Annotated[int | None, _shown("INT", "2, or 1 on one core")] = None
    """Runs at a time, each in a process with one thread; the numbers do not depend on it."""
    json: bool = False
    """Print the table as JSON."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError before anything runs."""
    options = read_options(Options, "study", argv)
    study = _study(options.study)
    _check(options, study)
    require("study", "train,report", "timm", "sklearn", "matplotlib", "torchvision", "accelerate")
    folder = Path(options.out or f"runs/{study.name}{'-quick' * options.quick}")
    recipe = digits_recipe(options.epochs or QUICK_EPOCHS) if options.epochs or options.quick else digits_recipe()
    report = import_module("kernelbank.report.study")  # torch, timm and scikit-learn take seconds to import
    setup = report.Setup(
        models=options.models or study.models,
        rows=options.rows or (study.quick if options.quick else tuple(row.label for row in study.rows)),
        seeds=options.seeds or (QUICK_SEEDS if options.quick else SEEDS),
        data=options.data, recipe=recipe, workers=options.workers,
    )  # fmt: skip
    code: int = report.run(study, setup, folder, options.json)
    return code


def _study(name: str) -> Study:
    """The study of this name. Raises UsageError for an unknown one."""
    if name not in STUDIES:
        raise UsageError("study", f"unknown study {name!r}{suggest(name, STUDIES)}; expected {', '.join(STUDIES)}")
    return STUDIES[name]()


def _check(options: Options, study: Study) -> None:
    """Raise UsageError, naming the option, its value and what is expected."""
    check_name(options.data)
    if options.out is not None and not options.out.strip():
        raise UsageError("study", f"invalid --out={options.out!r}; expected the name of a folder")
    labels = [row.label for row in study.rows]
    for name, given, known in (("--seeds", options.seeds, None), ("--rows", options.rows, labels),
                               ("--models", options.models, study.models)):  # fmt: skip
        if given is None:
            continue
        if not given:
            raise UsageError("study", f"invalid {name} without values; expected at least one, or no {name} for all")
        if twice := [value for value in given if given.count(value) > 1]:
            raise UsageError("study", f"{name}: {twice[0]} is given twice")
        if known and (unknown := [str(value) for value in given if value not in known]):
            raise UsageError("study", f"{name}: unknown {name[2:-1]} {unknown[0]!r} of study {study.name}"
                                      f"{suggest(unknown[0], known)}; expected {', '.join(known)}")  # fmt: skip
    for name, value in (("--epochs", options.epochs), ("--workers", options.workers)):
        if value is not None and value < 1:
            raise UsageError("study", f"invalid {name}={value}; expected a whole number >= 1")
    for seed in options.seeds or ():
        check_seed("study", seed)
