"""The data and the model of a run from its options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kernelbank.data.dataset import Dataset
from kernelbank.data.images import FileSplit, Loading
from kernelbank.data.load import NAMED_DATA, open_data
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.train.engine import Engine
from kernelbank.train.model import InitialWeights, describe, expected_input
from kernelbank.train.request import DataOptions, ModelOptions
from kernelbank.zoo import NAMED, SMALL

ENLARGED = 2
"""From this factor on, a run prints that images are enlarged."""


def open_dataset(model: str, options: DataOptions, crop_pct: float, engine: Engine, console: Console) -> Dataset:
    """Return the data set. The first process of every machine unpacks it while the others wait. Raises InputError."""
    if options.data is None:
        raise InputError("data: --data is missing; expected a data set by name, a folder or an archive")
    if model in SMALL and options.data not in NAMED_DATA and options.img_size is None:
        raise InputError(f"invalid img_size=None for model {model}, which takes any size; expected --img-size")
    workers = min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    (channels, height, width), mean, std = expected_input(model)
    size = (channels, options.img_size or height, options.img_size or width)
    loading = Loading(
        size=size, mean=mean, std=std, crop_pct=crop_pct, workers=workers, max_broken=options.max_broken
    )  # fmt: skip
    with engine.accelerator.local_main_process_first(), _unpacking(console, engine.main) as progress:
        return open_data(
            options.data, loading, cache=options.cache_folder, download=options.download, progress=progress
        )


@contextmanager
def _unpacking(console: Console, shown: bool) -> Iterator[Any]:
    """Give a function that shows the progress of reading an archive as a bar."""
    with ExitStack() as stack:
        bars: list[tuple[Progress, Any]] = []

        def update(done: int, size: int) -> None:
            if not shown:
                return
            if not bars:
                bar = stack.enter_context(Progress(console=console, transient=True))
                bars.append((bar, bar.add_task("reading", total=size)))
            bars[0][0].update(bars[0][1], completed=done)

        yield update


def initial_weights(options: ModelOptions) -> InitialWeights:
    """Return where the weights of a run come from. A mixer replaces those of a model with weights."""
    weights = InitialWeights(options.initial_checkpoint, options.pretrained)
    return replace(weights, mixer=options.mixer) if weights.given else weights


def model_spec(name: str, weights: ModelOptions, source: DataOptions, data: Dataset, verb: str) -> ModelSpec:
    """Return the description of the model for `data`, before a mixer replaces those of a model with weights. Raises
    InputError, SpecError and UsageError."""
    takes_any_size = name in NAMED or source.data in NAMED_DATA or source.img_size is not None
    size = data.img_size if takes_any_size else None  # some stock models have no img_size
    mixer = None if initial_weights(weights).given else weights.mixer
    return describe(
        name, mixer=mixer, mlp=weights.mlp, arguments=weights.arguments(verb), img_size=size,
        in_chans=data.in_chans, num_classes=data.num_classes,
    )  # fmt: skip


def enlargement(data: Dataset, source: DataOptions) -> Iterator[str]:
    """Yield a line if images are enlarged to the model's own size, which nobody asked for."""
    size = data.train.first_size() if isinstance(data.train, FileSplit) and source.img_size is None else None
    if size is not None and ENLARGED * min(size) <= min(data.img_size):
        first, seen = (f"{height} x {width}" for height, width in (size, data.img_size))
        yield f"the first image is {first} and is enlarged to the model's {seen}; --img-size N sets another size"
