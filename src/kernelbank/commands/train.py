"""``kernelbank train``: a model by a recipe."""

from __future__ import annotations

from importlib import import_module

from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.commands.options import read_options
from kernelbank.commands.recipes import note_scaled_warmup, option_value, starting_recipe
from kernelbank.errors import require
from kernelbank.train.recipes import with_origins
from kernelbank.train.request import TrainOptions

NEEDED = ("timm", "torchvision", "accelerate", "safetensors", "sklearn")


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError before anything runs."""
    options = read(argv)
    note_scaled_warmup("train", argv, options.recipe, options.settings)
    if options.show:
        _show_recipe(options)
        return 0
    require("train", "train", *NEEDED)
    for name in options.tracker:
        require(f"tracker {name}", name, name)
    code: int = import_module("kernelbank.train.session").Session(options).run()  # torch takes seconds to import
    return code


def read(argv: list[str]) -> TrainOptions:
    """The options that `argv` states, with the defaults of its recipe. Raises UsageError and InputError."""
    name = option_value(argv, "--recipe") or "paper"
    default = TrainOptions(recipe=name, settings=starting_recipe(argv, name))
    options = read_options(TrainOptions, "train", argv, default)
    options.check()
    return options


def _show_recipe(options: TrainOptions) -> None:
    table = Table("field", "value", "origin", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in with_origins(options.recipe, options.settings):
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)
