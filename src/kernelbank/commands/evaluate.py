"""``kernelbank evaluate``: the metrics of a run's weights, or of any model."""

from __future__ import annotations

from importlib import import_module

from kernelbank.commands.options import read_options
from kernelbank.commands.train import NEEDED
from kernelbank.errors import require
from kernelbank.train.request import EvaluateOptions


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError."""
    options = read_options(EvaluateOptions, "evaluate", argv)
    options.check()
    require("evaluate", "train", *NEEDED)
    code: int = import_module("kernelbank.train.evaluation").run(options)  # torch takes seconds to import
    return code
