"""The options of ``kernelbank train`` and ``evaluate``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kernelbank.commands.options import read_options
from kernelbank.data.load import DATASETS
from kernelbank.errors import UsageError
from kernelbank.train.hardware import Hardware
from kernelbank.train.recipe import Recipe
from kernelbank.train.recipes import RECIPES, published

CACHE = "~/.cache/kernelbank"
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where images come from and how they are read."""

    data: Annotated[str | None, tyro.conf.arg(metavar=f"{'|'.join(DATASETS)}|PATH|torch/NAME|hfds/NAME|wds/PATH")] = (
        None
    )
    """A data set by name, or a folder or tar archive of train/CLASS/IMAGE, val and test likewise."""
    img_size: int | None = None
    """Height and width of the images the model sees. Default: the data's if they are in memory, else the model's."""
    cache: str = CACHE
    """Where archives are unpacked, once, and where data sets by name are kept."""
    download: bool = False
    """Allow torchvision to download."""
    workers: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the cores, at most 8)")
    ] = None
    """Processes that read images, for each training process."""
    max_broken: float = 1e-3
    """The share of images that may be unreadable before the run stops."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where its weights come from."""

    mixer: str | None = None
    """The record of its mixers; replaces those of a stock model, or of the initial weights."""
    mlp: str | None = None
    """The record of its MLPs, in our models."""
    model_args: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Arguments of the model's constructor, values as JSON: patch_size=4 depth=6."""
    initial_checkpoint: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights to start from; a head of other classes starts anew, another resolution is resampled."""
    pretrained: bool = False
    """Start from timm's published weights."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a model by a recipe, in one process or under torchrun. Every field of the recipe can be overridden; the
    resolved recipe is kept with the run."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    """A model of ours, of timm's, or plain / hierarchical for small images."""
    weights: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))] = "paper"
    """The recipe that the options below start from."""
    seed: int = 0
    """Of the weights, the order of images, augmentation and drop path."""
    out: Annotated[
        str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: runs/MODEL-RECIPE-seedN)")
    ] = None
    """The run's folder."""
    resume: bool = False
    """Go on with the run in the folder; without a model, everything is as its run.json says."""
    show: bool = False
    """Print the resolved recipe, beside the paper's statements for recipe paper, and stop."""
    tracker: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], tyro.conf.arg(metavar="|".join(TRACKERS))
    ] = ()
    """Also log to these, through Accelerate."""
    json: bool = False
    """Print the record as JSON at the end."""
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: published("paper").recipe)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Loss, top-1 and top-5 of a run's weights, or of any model, over every image of a split exactly once."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|MODEL")]
    """The folder of a run, or a model with --initial-checkpoint or --pretrained."""
    weights: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    split: Literal["val", "test", "train"] = "val"
    """Which images."""
    ema: bool = False
    """The run's averaged weights."""
    crop_pct: float | None = None
    """The centre share of an image that is looked at. Default: the run's, else 0.875."""
    batch_size: int = 256
    """Images of a forward pass."""
    json: bool = False
    """Print the numbers as JSON."""
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)


def read_train_options(argv: list[str]) -> TrainOptions:
    """The options, those of the recipe by its name. Raises UsageError and InputError."""
    name = _given(argv, "--recipe")
    if name is None:
        return read_options(TrainOptions, "train", argv)
    return read_options(TrainOptions, "train", argv, TrainOptions(recipe=name, settings=published(name).recipe))


def _given(argv: list[str], option: str) -> str | None:
    """The value of `option` in `argv`; None without one."""
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def model_arguments(words: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE words as a dictionary. Raises UsageError."""
    import json  # noqa: PLC0415

    arguments = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError("train", f"--model-args: {word!r} is not legal; legal: NAME=VALUE")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def cache_folder(options: DataOptions) -> Path:
    """Where data are kept."""
    return Path(options.cache).expanduser()
