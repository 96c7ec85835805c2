"""The options of ``kernelbank train`` and ``evaluate``, which a run keeps in its folder. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kernelbank.data.load import NAMED_DATA, SHOWN
from kernelbank.errors import UsageError
from kernelbank.memory import check_memory
from kernelbank.train.hardware import Hardware
from kernelbank.train.recipe import Recipe
from kernelbank.train.recipes import RECIPES, published

CACHE = "~/.cache/kernelbank"
TRACKERS = ("tensorboard", "wandb", "trackio")
LARGEST_SEED = 2**63 - 1


def _at_least(verb: str, options: object, **least: float) -> None:
    """Raise UsageError for an option below its least value."""
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and not value >= minimum:
            raise UsageError(verb, f"invalid --{name.replace('_', '-')}={value}; expected at least {minimum:g}")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images of a run, and how they are read."""

    data: Annotated[str | None, tyro.conf.arg(metavar="|".join([*NAMED_DATA, "PATH", *SHOWN]))] = None
    """A data set by name, or a folder or tar archive of train/CLASS/IMAGE, val and test likewise."""
    img_size: int | None = None
    """The height and width of the images for the model. Default: the model's own."""
    cache: str = CACHE
    """The folder of unpacked archives and of data sets by name."""
    download: bool = False
    """Allow torchvision to download."""
    workers: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the cores, at most 8)")
    ] = None
    """The number of processes that read images, per training process."""
    max_broken: float = 1e-3
    """The fraction of images that may be unreadable. The run stops if there are more."""
    train_images: int | None = None
    """The number of training images to use, an equal fraction of every class, selected by the hash of the file name.
    Default: all."""
    memory_share: float = 0.1
    """The fraction of the device's memory for decoded images. Images that fit and have one size are kept there, if the
    recipe's augmentation runs in batches. With 0 all images are read from files."""

    def check(self, verb: str) -> None:
        """Raise UsageError for a value that cannot be used."""
        if self.data is None:
            raise UsageError(verb, "--data is missing; expected a data set by name, a folder or an archive")
        _at_least(verb, self, img_size=1, workers=0, max_broken=0, train_images=1, memory_share=0)
        if self.img_size is not None:
            check_memory(f"an image of --img-size {self.img_size}", 3 * self.img_size**2)
        if self.data in NAMED_DATA and self.img_size is not None:
            raise UsageError(verb, f"invalid --img-size={self.img_size} with --data {self.data}; expected none, since "
                                   "its images are in memory at their own size")  # fmt: skip
        if self.data in NAMED_DATA and self.train_images is not None:
            raise UsageError(verb, f"invalid --train-images={self.train_images} with --data {self.data}; expected "
                                   "none, since its images have no file names")  # fmt: skip

    @property
    def cache_folder(self) -> Path:
        """The folder that `cache` names."""
        return Path(self.cache).expanduser()


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model of a run, and where its initial weights come from."""

    mixer: str | None = None
    """The specs of its mixers, or cells to change. They replace the mixers of a stock model or of the initial
    weights."""
    mlp: str | None = None
    """The spec of its MLPs, for models of KernelBank."""
    model_args: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Arguments of the model's constructor, values as JSON: patch_size=4 depth=6."""
    initial_checkpoint: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Initial weights. A head for other classes is initialised, and weights of another resolution are resampled."""
    pretrained: bool = False
    """Start from timm's published weights."""

    def arguments(self, verb: str) -> dict[str, Any]:
        """Return `model_args` as a dictionary. Raises UsageError for a word that is not NAME=VALUE."""
        arguments = {}
        for word in self.model_args:
            name, equals, text = word.partition("=")
            if not equals or not name.isidentifier():
                raise UsageError(verb, f"invalid --model-args {word!r}; expected NAME=VALUE")
            try:
                arguments[name] = json.loads(text)
            except (ValueError, RecursionError):
                arguments[name] = text
        return arguments


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a model with a recipe, in one process or under torchrun. Every field of the recipe can be overridden; the
    resolved recipe is stored with the run."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    """A model of KernelBank or of timm, or plain or hierarchical for small images."""
    weights: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))] = "paper"
    """The recipe, which sets the defaults of the options below."""
    seed: int = 0
    """Seed of the weights, the order of images, augmentation and drop path."""
    out: Annotated[
        str | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: runs/MODEL-RECIPE-seedN)")
    ] = None
    """The run's folder."""
    resume: bool = False
    """Resume the run in the folder. Without a model, the options in its run.json are used."""
    show: bool = False
    """Print the resolved recipe with the origin of every value, and stop."""
    tracker: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], tyro.conf.arg(metavar="|".join(TRACKERS))
    ] = ()
    """Trackers to log to, through Accelerate."""
    json: bool = False
    """Print the run record as JSON at the end."""
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: published("paper").recipe)

    def check(self) -> None:
        """Raise UsageError for a value that cannot be used."""
        check_seed("train", self.seed)
        if self.out is not None and not self.out.strip():
            raise UsageError("train", f"invalid --out={self.out!r}; expected the name of a folder")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure loss, top-1 and top-5 of a run's weights, or of any model, over every image of a split exactly once."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|MODEL")]
    """The folder of a run, or a model with --initial-checkpoint or --pretrained."""
    weights: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    split: Literal["val", "test", "train"] = "val"
    """The split to evaluate on."""
    ema: bool = False
    """Evaluate the run's averaged weights."""
    crop_pct: float | None = None
    """The fraction of the image in the centre crop. Default: that of the run, else 0.875."""
    batch_size: int = 256
    """Images per forward pass."""
    json: bool = False
    """Print the metrics as JSON."""
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)

    def check(self) -> None:
        """Raise UsageError for a value that cannot be used."""
        _at_least("evaluate", self, batch_size=1)
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UsageError("evaluate", f"invalid --crop-pct={self.crop_pct}; expected 0 < crop_pct <= 1")


def check_seed(verb: str, seed: int, option: str = "--seed") -> None:
    """Raise UsageError unless torch's generators take the seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(verb, f"invalid {option}={seed}; expected 0 to {LARGEST_SEED}")
