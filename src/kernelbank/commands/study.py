"""``kernelbank study``: run or resume a study, and show its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kernelbank.commands.options import default_text, read_options
from kernelbank.commands.recipes import note_scaled_warmup, option_value, starting_recipe
from kernelbank.data.load import NAMED_DATA
from kernelbank.errors import UsageError, require
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.designs import DESIGNS, Design, find_design
from kernelbank.studies.shard import WHOLE, Shard
from kernelbank.studies.study import Study
from kernelbank.text import suggest
from kernelbank.train.hardware import Hardware
from kernelbank.train.recipe import Recipe
from kernelbank.train.recipes import RECIPES, digits_recipe
from kernelbank.train.request import TRACKERS, DataOptions, ModelOptions, check_seed

NEEDED = ("timm", "sklearn", "matplotlib", "torchvision", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run a study of the paper: rows that change cells of a host model's mixers, trained with one recipe and compared
    over seeds. Finished runs are not repeated: the same command resumes an interrupted study. Under torchrun every
    run is trained by all processes."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(STUDIES))] = ""
    """softmax: what softmax does in attention. depthwise: the kernel bank with depth-wise kernels. assumptions: the
    choices that the paper leaves open. kernels: where kernels come from. future: larger kernels, hierarchical banks, no
    FFN. swap: another activation in a model that was trained with softmax."""
    out: Annotated[str | None, default_text("FOLDER", "runs/STUDY, runs/STUDY-DESIGN")] = None
    """The folder for the run records, table.md, table.json and study.png."""
    design: Annotated[str | None, default_text("|".join(DESIGNS), "digits without --data")] = None
    """The defaults of the options below: hosts, rows, seeds, recipe and data."""
    models: Annotated[tuple[str, ...] | None, default_text("MODEL ...", "the design's")] = None
    """The host models: models of ours, or ViTs and Swins of timm."""
    model_args: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Arguments of the hosts' constructors, values as JSON: patch_size=4 depth=6."""
    rows: Annotated[tuple[str, ...] | None, default_text("LABEL ...", "the design's, or all")] = None
    """The labels of the rows to run."""
    seeds: Annotated[tuple[int, ...] | None, default_text("INT ...", "the design's, or 0 1 2")] = None
    """The seeds of the runs."""
    quick: bool = False
    """The design quick: four rows, two seeds, eight epochs of digits in less than a minute."""
    dry_run: bool = False
    """Print rows, parameters, multiply-adds and estimated hours, from a few timed steps, and stop."""
    jobs: Annotated[int | None, default_text("INT", "one on each GPU; on a CPU 2, or 1 on one core")] = None
    """The number of runs at a time, each in its own process. Results do not depend on it."""
    shard: Annotated[str | None, default_text("K/N", "all runs")] = None
    """Run part K of N of the runs, for schedulers. All parts write to one folder."""
    on: Annotated[str | None, default_text("ray|ray://HOST:PORT", "this machine")] = None
    """Run on a Ray cluster, one task per run: the cluster that Ray finds, or the one at an address."""
    json: bool = False
    """Print the table as JSON."""
    tracker: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], tyro.conf.arg(metavar="|".join(TRACKERS))
    ] = ()
    """Also log every run to these, through Accelerate."""
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))] = ""
    """The recipe that the options below start from."""
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=digits_recipe)


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError before anything runs."""
    options, design = read(argv)
    study = _study(options.study)
    require("study", "train,report", *NEEDED)
    for name in options.tracker:
        require(f"tracker {name}", name, name)
    if options.on is not None:
        require(f"--on {options.on}", "ray", "ray")
    note_scaled_warmup("study", argv, options.recipe, options.settings)
    session = import_module("kernelbank.studies.session")  # torch, timm and scikit-learn take seconds to import
    run = import_module("kernelbank.studies.run")
    setup = session.Setup(
        hosts=tuple((name, design.hosts.get(name, "")) for name in options.models or design.hosts),
        model_args=options.model_args,
        rows=options.rows or design.rows.get(study.name, study.labels),
        seeds=options.seeds or design.seeds,
        recipe=options.settings,
        conditions=run.Conditions(source=options.source, hardware=options.hardware, trackers=options.tracker),
        jobs=options.jobs,
        cluster=options.on,
        shard=WHOLE if options.shard is None else Shard.parse(options.shard),
    )
    if options.dry_run:
        code: int = import_module("kernelbank.report.dry_run").show(study, setup, options.json)
        return code
    folder = Path(options.out or f"runs/{_name(study, options)}")
    code = import_module("kernelbank.report.study").run(study, setup, folder, options.json)
    return code


NO_DESIGN = Design(what="as the options say", hosts={}, seeds=(0, 1, 2), recipe="")


def read(argv: list[str]) -> tuple[Options, Design]:
    """The options, with the defaults of the design and of the recipe that `argv` names, and the design. Raises
    UsageError and InputError."""
    data, name = option_value(argv, "--data"), option_value(argv, "--design")
    if name is None and ("--quick" in argv or data is None or data in NAMED_DATA):
        name = "quick" if "--quick" in argv else "digits"
    design = NO_DESIGN if name is None else find_design(name)
    recipe = option_value(argv, "--recipe")
    default = Options(
        design=name,
        recipe=recipe or design.recipe,
        settings=_settings(argv, recipe, design),
        source=DataOptions(data=design.data, train_images=design.train_images),
        hardware=Hardware(device="cpu") if (data or design.data) in NAMED_DATA else Hardware(),
    )
    options = read_options(Options, "study", argv, default)
    _check(options, _study(options.study), design)
    return options, design


def _settings(argv: list[str], recipe: str | None, design: Design) -> Recipe:
    """The recipe by name as published, else the design's with its changes."""
    if recipe is not None:
        return starting_recipe(argv, recipe)
    return starting_recipe(argv, design.recipe or "digits", design.changes)


def _name(study: Study, options: Options) -> str:
    """The study's folder below runs/: one for each design."""
    if options.design == "digits":
        return study.name
    return f"{study.name}-{options.design or Path(options.source.data or '').name}"


def _study(name: str) -> Study:
    """The study of this name. Raises UsageError for an unknown one."""
    if name not in STUDIES:
        raise UsageError("study", f"unknown study {name!r}{suggest(name, STUDIES)}; expected {', '.join(STUDIES)}")
    return STUDIES[name]()


def _check(options: Options, study: Study, design: Design) -> None:
    """Raise UsageError, naming the option, its value and what is expected."""
    if options.quick and options.design != "quick":
        raise UsageError("study", f"--quick and --design {options.design} exclude each other; expected one of them")
    if options.out is not None and not options.out.strip():
        raise UsageError("study", f"invalid --out={options.out!r}; expected the name of a folder")
    for name, given in (("--seeds", options.seeds), ("--rows", options.rows), ("--models", options.models)):
        if given is not None and not given:
            raise UsageError("study", f"invalid {name} without values; expected at least one, or no {name}")
        if twice := [value for value in given or () if (given or ()).count(value) > 1]:
            raise UsageError("study", f"{name}: {twice[0]} is given twice")
    if unknown := [label for label in options.rows or () if label not in study.labels]:
        near = suggest(unknown[0], study.labels)
        raise UsageError("study", f"--rows: unknown row {unknown[0]!r} of study {study.name}{near}; expected "
                                  f"{', '.join(study.labels)}")  # fmt: skip
    options.source.check("study")
    if not options.recipe:
        raise UsageError("study", f"--recipe is missing; expected one of {', '.join(RECIPES)}, or --design")
    if not options.models and not design.hosts:
        raise UsageError("study", "--models is missing; expected the host models, or --design")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError("study", f"invalid --jobs={options.jobs}; expected a whole number >= 1")
    ModelOptions(model_args=options.model_args).arguments("study")
    for seed in options.seeds or ():
        check_seed("study", seed, "--seeds")
    if options.shard is not None:
        Shard.parse(options.shard)
    if options.on is not None and options.on != "ray" and not options.on.startswith("ray://"):
        raise UsageError("study", f"invalid --on={options.on}; expected ray or ray://HOST:PORT")
