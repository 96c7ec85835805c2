"""``kernelbank train``: a model by a recipe."""

from __future__ import annotations

from importlib import import_module

from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.commands.options import read_options
from kernelbank.errors import require
from kernelbank.train.recipes import published, with_origins
from kernelbank.train.request import TrainOptions

NEEDED = ("timm", "torchvision", "accelerate", "safetensors", "sklearn")


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError before anything runs."""
    options = read(argv)
    options.check()
    if options.show:
        _show_recipe(options)
        return 0
    require("train", "train", *NEEDED)
    for name in options.tracker:
        require(f"tracker {name}", name, name)
    code: int = import_module("kernelbank.train.session").Session(options).run()  # torch takes seconds to import
    return code


def read(argv: list[str]) -> TrainOptions:
    """The options, with the defaults of the recipe that `argv` names. Raises UsageError and InputError."""
    name = _value(argv, "--recipe")
    if name is None:
        return read_options(TrainOptions, "train", argv)
    return read_options(TrainOptions, "train", argv, TrainOptions(recipe=name, settings=published(name).recipe))


def _value(argv: list[str], option: str) -> str | None:
    """The value of `option` in `argv`; None without one."""
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _show_recipe(options: TrainOptions) -> None:
    table = Table("field", "value", "origin", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in with_origins(options.recipe, options.settings):
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)
