"""``kernelbank benchmark``: models and specs side by side, or the plan of a spec and the verdict of every path."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError, require

LARGEST = 2**34
"""The most numbers in the input of a subject: above it (64 GiB in float32) nothing is built."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure models and records side by side, in turns in one process; or, with --explain, print the path that a
    record takes and what every path says of it."""

    subject: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = ()
    """Each one quoted: a timm model, "MODEL : RECORD", a RECORD as one mixer; "accelerate MODEL" for the fastest
    linears; "... @path,path" forces paths. The first is the base of the ratios."""
    batch: tuple[int, ...] = (8,)
    """Images; several are a sweep."""
    img_size: tuple[int, ...] = (224,)
    """Sides of the images of models; several are a sweep with the fitted exponent."""
    grid: tuple[int, ...] = (14,)
    """Sides of the square grid of records; several are a sweep with the fitted exponent."""
    dim: int = 384
    """Channels of records."""
    heads: int = 6
    """Heads of records."""
    train: bool = False
    """A training step: forward, loss, backward, AdamW."""
    bf16: bool = False
    """bfloat16: model and input in inference, autocast in training."""
    rounds: int = 11
    """How many times each subject is timed."""
    threads: int | None = None
    """Threads for torch; as many as it takes by itself unless given."""
    memory: bool = False
    """Measure the peak memory of one call too."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the record, JSON, to FILE."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw images a second against the side to FILE: .svg, .png or .pdf."""
    explain: bool = False
    """Print the plan of one record at --dim, --heads, --grid and --batch, and every path's verdict."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError and SpecError."""
    options = read_options(Options, "benchmark", argv)
    _check(options)
    if options.figure is not None:
        require("--figure", "report", "matplotlib")
    code: int = import_module("kernelbank.benchmark.session").run(options)  # torch takes seconds to import
    return code


def _check(options: Options) -> None:
    """Raise UsageError for what cannot be measured."""
    if not options.subject:
        raise UsageError("benchmark", "nothing to measure: name models or specs, such as: benchmark vit dwsa")
    for name in ("batch", "img_size", "grid"):
        values = getattr(options, name)
        if not values or min(values) < 1:
            raise UsageError("benchmark", f"invalid --{name.replace('_', '-')} {values}; expected numbers >= 1")
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError("benchmark", f"invalid --{name} {value}; expected a number >= 1")
    if len(set(options.subject)) < len(options.subject):
        raise UsageError("benchmark", "a subject is named twice")
    for path, kinds in ((options.figure, (".svg", ".png", ".pdf")), (options.out, (".json",))):
        if path is not None and path.suffix not in kinds:
            raise UsageError("benchmark", f"cannot write {path}; expected {', '.join(kinds)}")
        if path is not None and not path.parent.is_dir():
            raise UsageError("benchmark", f"cannot write {path}: there is no folder {path.parent}")
    numbers = max(
        max(options.batch) * max(options.grid) ** 2 * options.dim, max(options.batch) * max(options.img_size) ** 2 * 3
    )  # fmt: skip
    if numbers > LARGEST:
        size = f"{numbers:.1e} numbers ({4 * numbers / 2**30:.0f} GiB)"
        raise UsageError("benchmark", f"an input of {size} is too large; expected at most {LARGEST:.1e} numbers")
    for name in ("dim", "heads"):
        if getattr(options, name) < 1:
            raise UsageError("benchmark", f"invalid --{name}={getattr(options, name)}; expected a whole number >= 1")
