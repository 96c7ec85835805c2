"""The data and the model of a run from its options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kernelbank.data.assemble import with_fewer
from kernelbank.data.dataset import Dataset
from kernelbank.data.images import FileSplit, Loading
from kernelbank.data.load import NAMED_DATA, open_data
from kernelbank.data.resident import ResidentSplit, on_device
from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.train.engine import Engine
from kernelbank.train.model import InitialWeights, describe, expected_input
from kernelbank.train.recipe import Recipe
from kernelbank.train.request import DataOptions, ModelOptions
from kernelbank.zoo import NAMED, SMALL

ENLARGED = 2
"""How many times an image is enlarged, at least, where a run says so."""


def open_dataset(model: str, options: DataOptions, recipe: Recipe | float, engine: Engine, console: Console) -> Dataset:
    """The data for training by `recipe`, or for evaluation with a centre crop of that share. Archives are unpacked and
    images decoded by the first process of every machine while the others wait. Raises InputError."""
    assert options.data is not None
    if model in SMALL and options.data not in NAMED_DATA and options.img_size is None:
        raise InputError(f"invalid img_size=None for model {model}, which takes any size; expected --img-size")
    workers = min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    (channels, height, width), mean, std = expected_input(model)
    size = (channels, options.img_size or height, options.img_size or width)
    crop_pct, augment = (recipe.crop_pct, recipe.augmentation) if isinstance(recipe, Recipe) else (recipe, None)
    loading = Loading(
        size=size, mean=mean, std=std, crop_pct=crop_pct, workers=workers, max_broken=options.max_broken
    )  # fmt: skip
    with engine.accelerator.local_main_process_first(), _unpacking(console, engine.main) as progress:
        data = open_data(
            options.data, loading, cache=options.cache_folder, download=options.download, progress=progress
        )
        if options.train_images is not None:
            data = with_fewer(data, options.train_images)
    # a progress of its own: it counts images, not bytes
    with engine.accelerator.local_main_process_first(), _unpacking(console, engine.main, "decoding") as progress:
        return on_device(data, augment, engine.device, options.memory_share, options.cache_folder, progress)


@contextmanager
def _unpacking(console: Console, shown: bool, what: str = "reading") -> Iterator[Any]:
    """A bar for an archive or for images, from the first block that is read."""
    with ExitStack() as stack:
        bars: list[tuple[Progress, Any]] = []

        def update(done: int, size: int) -> None:
            if not shown:
                return
            if not bars:
                bar = stack.enter_context(Progress(console=console, transient=True))
                bars.append((bar, bar.add_task(what, total=size)))
            bars[0][0].update(bars[0][1], completed=done, total=size)

        yield update


def initial_weights(options: ModelOptions) -> InitialWeights:
    """Where the weights of a run come from; a mixer replaces those of given weights."""
    given = options.pretrained or options.initial_checkpoint is not None
    return InitialWeights(options.initial_checkpoint, options.pretrained, options.mixer if given else None)


def model_spec(name: str, weights: ModelOptions, source: DataOptions, data: Dataset, verb: str) -> ModelSpec:
    """The description of the model for `data`, before a mixer replaces those of given weights. Raises InputError,
    SpecError and UsageError."""
    takes_any_size = name in NAMED or source.data in NAMED_DATA or source.img_size is not None
    size = data.img_size if takes_any_size else None  # some stock models have no img_size
    mixer = None if initial_weights(weights).given else weights.mixer
    return describe(
        name, mixer=mixer, mlp=weights.mlp, arguments=weights.arguments(verb), img_size=size,
        in_chans=data.in_chans, num_classes=data.num_classes,
    )  # fmt: skip


def enlargement(data: Dataset, source: DataOptions) -> Iterator[str]:
    """A line where images are enlarged to the size that the model happens to have."""
    split = data.train if isinstance(data.train, (FileSplit, ResidentSplit)) and source.img_size is None else None
    size = None if split is None else split.first_size()
    if size is not None and ENLARGED * min(size) <= min(data.img_size):
        first, seen = (f"{height} x {width}" for height, width in (size, data.img_size))
        yield f"the first image is {first} and is enlarged to the model's {seen}; --img-size N sets another size"
