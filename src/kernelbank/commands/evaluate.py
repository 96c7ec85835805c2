"""``kernelbank evaluate``: the metrics of a run's weights, or of any model."""

from __future__ import annotations

from importlib import import_module

from kernelbank.commands.options import read_options
from kernelbank.commands.train import NEEDED
from kernelbank.errors import require
from kernelbank.train.request import EvaluateOptions


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError."""
    options = read(argv)
    require("evaluate", "train", *NEEDED)
    code: int = import_module("kernelbank.train.evaluation").run(options)  # torch takes seconds to import
    return code


def read(argv: list[str]) -> EvaluateOptions:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(EvaluateOptions, "evaluate", argv)
    options.check()
    return options
