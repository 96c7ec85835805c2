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
"""The largest number of elements in the input of a subject, 64 GiB in float32."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure models and single mixers side by side, in turns in one process. With --explain, print the path that a
    spec runs on and, for every other path, why it was not chosen."""

    subject: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = ()
    """What to measure, each quoted: "MODEL" of timm, "MODEL : SPEC" for a model with other mixers, "SPEC" for one
    mixer, "accelerate MODEL" for linear layers in the fastest form, "bfloat16:MODEL" for that and bfloat16,
    "compile:MODEL" for torch.compile, "onnx:FILE" and "openvino:FILE" for an ONNX file in onnxruntime or OpenVINO.
    "... @path,path" forces paths. Ratios are relative to the first."""
    batch: tuple[int, ...] = (8,)
    """Batch sizes. Every one is measured."""
    img_size: tuple[int, ...] = (224,)
    """Sides of the images of models. From three on, the growth of the time is fitted."""
    grid: tuple[int, ...] = (14,)
    """Sides of the square grids of single mixers. From three on, the growth of the time is fitted."""
    dim: int = 384
    """Channels of single mixers."""
    heads: int = 6
    """Heads of single mixers."""
    train: bool = False
    """Measure a training step: forward, loss, backward, AdamW."""
    bf16: bool = False
    """Use bfloat16: for the model and its input in inference, by autocast in training."""
    rounds: int = 11
    """The number of times that each subject is timed."""
    threads: int | None = None
    """The threads of torch; torch's default if not given."""
    memory: bool = False
    """Also measure the peak memory of one call."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the results to FILE as JSON."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Plot images per second against the side to FILE: .svg, .png or .pdf."""
    explain: bool = False
    """Print the plan of one spec at --dim, --heads, --grid and --batch, and the verdict on every path."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises InputError and SpecError."""
    options = read(argv)
    if options.figure is not None:
        require("--figure", "report", "matplotlib")
    code: int = import_module("kernelbank.benchmark.session").run(options)  # torch takes seconds to import
    return code


def read(argv: list[str]) -> Options:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(Options, "benchmark", argv)
    _check(options)
    return options


def _check(options: Options) -> None:
    """Raise UsageError for options that cannot be measured."""
    if not options.subject:
        raise UsageError("benchmark", "a subject is missing; expected models or specs, such as: benchmark vit dwsa")
    for name in ("batch", "img_size", "grid"):
        values = getattr(options, name)
        if not values or min(values) < 1:
            raise UsageError("benchmark", f"invalid --{name.replace('_', '-')} {values}; expected numbers >= 1")
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError("benchmark", f"invalid --{name} {value}; expected a number >= 1")
    if len(set(options.subject)) < len(options.subject):
        raise UsageError("benchmark", "a subject is given twice; expected each once")
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
