"""The model that is explained, from the words of the command line, with its input and the names of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import to_2tuple
from torch import Tensor, nn

from kernelbank.data.digits import digits
from kernelbank.errors import InputError
from kernelbank.files import regular_file
from kernelbank.model import ModelSpec
from kernelbank.nn.edit.replace import replace_mixers
from kernelbank.records import RunRecord
from kernelbank.spec.inventory import Grid
from kernelbank.train.model import InitialWeights, check_model, create, describe, expected_input
from kernelbank.train.run_weights import read_run_weights
from kernelbank.train.runs import RunFolder
from kernelbank.weights.file import SUFFIXES, read_model_file
from kernelbank.weights.load import load
from kernelbank.zoo import NAMED

IMAGENET = 1000
WHITE = 16.0
"""The largest value of a pixel of scikit-learn's digits."""


@dataclass(frozen=True, eq=False)
class ExplainedModel:
    """A model in eval mode: its `label`, a `note` on its weights, the size (H, W) and channels of its images, their
    normalisation with white at `white`, the names of its `classes`, and its description, None where its file has
    none."""

    label: str
    note: str
    model: nn.Module
    size: Grid
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float
    classes: tuple[str, ...]
    spec: ModelSpec | None

    def with_classes(self, names: Sequence[str]) -> ExplainedModel:
        """The model with other names of its classes. Raises InputError unless there is one for each."""
        if len(names) != len(self.classes):
            raise InputError(f"invalid classes of {self.label}: {len(names)} names; expected {len(self.classes)}")
        return replace(self, classes=tuple(names))


def open_model(word: str, *, pretrained: bool, mixer: str | None, img_size: Grid | None) -> ExplainedModel:
    """The model that `word` names: the folder of a run, a weights file of ours, or a model of ours or of timm.

    Raises:
        InputError: If there is no such model, or its weights cannot be read.
        SpecError: If `mixer` or the image size does not fit.
    """
    path = Path(word)
    if RunFolder(path).config.exists():
        found = _of_run(RunFolder(path), word)
    elif path.suffix in SUFFIXES or path.is_file():
        spec = read_model_file(path)[1]
        found = _described(load(path), spec, word, f"weights of {path.name}")
    elif path.is_dir():
        raise InputError(f"invalid model {word}: the folder has no run.json; expected the folder of a run, a file or "
                         "the name of a model")  # fmt: skip
    else:
        return _named(word, pretrained, mixer, img_size)
    if pretrained:
        raise InputError(f"invalid pretrained=True for {word}, which has weights; expected the name of a model")
    if mixer is not None:
        replace_mixers(found.model, mixer)
        found = replace(found, label=f"{found.label} with {mixer}")
    return found if img_size is None else _at_size(found, img_size)


def _named(name: str, pretrained: bool, mixer: str | None, img_size: Grid | None) -> ExplainedModel:
    check_model(name)
    channels, classes = _sizes(name)
    spec = describe(
        name, img_size=img_size, mixer=None if pretrained else mixer, in_chans=channels, num_classes=classes
    )
    model, _ = create(spec, InitialWeights(None, pretrained, mixer if pretrained else None), seed=0)
    note = "published weights of timm" if pretrained else "random weights (seed 0)"
    if pretrained and mixer:
        note += f", mixers changed to {mixer}"
    return _described(model.eval(), spec, name if mixer is None else f"{name} with {mixer}", note)


def _sizes(name: str) -> tuple[int, int]:
    """The channels of the images and the number of classes that the model `name` was made for."""
    if name in NAMED:
        return NAMED[name].in_chans, NAMED[name].num_classes
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (3, IMAGENET) if config is None else (config.input_size[0], config.num_classes)


def _of_run(folder: RunFolder, word: str) -> ExplainedModel:
    """The model of a run with the weights of its last checkpoint."""
    config = folder.read_config()
    try:
        spec = RunRecord.from_document(config["record"]).model
    except ValueError as error:
        raise InputError(f"run: {folder.config} is damaged: {error}") from None
    model, _ = create(spec, InitialWeights(), seed=0)
    note = read_run_weights(folder, model, ema=False)
    return _described(model.eval(), spec, f"{word}: {spec.mixer or spec.name}", note)


def _described(model: nn.Module, spec: ModelSpec | None, label: str, note: str) -> ExplainedModel:
    """A model with the normalisation that it was made for: that of its name, or of scikit-learn's digits."""
    name = spec.name if spec is not None else ""
    embed: Any = getattr(model, "patch_embed", None)
    known = name if timm.is_model(name.partition(".")[0]) else ""
    (channels, *default), mean, std = expected_input(known) if known else _DEFAULT
    size = to_2tuple(getattr(embed, "img_size", None) or tuple(default))
    channels = spec.in_chans if spec is not None else channels
    mean, std = tuple(mean), tuple(std)
    white = 1.0
    if channels == 1:
        mean, std, white = _digit_scale()
    elif channels != len(mean):
        raise InputError(f"invalid in_chans={channels} of {label}; expected 1 or 3, the channels of a picture")
    classes = _class_names(int(getattr(model, "num_classes", 0)))
    return ExplainedModel(label, note, model, (size[0], size[1]), channels, mean, std, white, classes, spec)


_DEFAULT = ((3, 224, 224), timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)


def _digit_scale() -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Mean, standard deviation and white of scikit-learn's digits, the one data set of grey images: pixels are whole
    numbers from 0 to 16, so that the two smallest normalised values tell how they were normalised."""
    split: Any = digits().train
    black, first, *_ = torch.unique(split.images).tolist()
    deviation = 1 / (first - black)
    return (-black * deviation,), (deviation,), WHITE


def _class_names(count: int) -> tuple[str, ...]:
    """The names of ImageNet, or of a larger set of its classes, if it has this number of them; else numbers."""
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return tuple(f"class {index}" for index in range(count))
    names = ImageNetInfo(subset)
    return tuple(str(names.index_to_description(index)) for index in range(count))


def read_classes(path: Path) -> tuple[str, ...]:
    """The names of classes in a text file, one per line, or the sorted names of the folders in a folder, which is the
    order of a data set of train/CLASS/IMAGE. Raises InputError if there are none or they cannot be read."""
    try:
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        else:
            names = [
                line.strip() for line in regular_file(path).read_text(encoding="utf-8").splitlines() if line.strip()
            ]
    except FileNotFoundError:
        raise InputError(f"invalid classes={path}: no such file; expected a text file or a folder") from None
    except UnicodeDecodeError:
        raise InputError(f"invalid classes={path}: not a text in UTF-8; expected one name per line") from None
    except OSError as error:
        raise InputError(
            f"invalid classes={path}: {error.strerror or error}; expected a text file or a folder"
        ) from None
    if not names:
        raise InputError(f"invalid classes={path}: no names; expected one name per line, or one folder per class")
    return tuple(names)


def _at_size(found: ExplainedModel, img_size: Grid) -> ExplainedModel:
    """The model on images of another size, where its trunk can change it."""
    resize: Any = getattr(found.model, "set_input_size", None)
    if resize is None:
        raise InputError(f"invalid img_size={img_size} for {found.label}, whose trunk cannot change it (it has no "
                         f"set_input_size); expected {found.size}")  # fmt: skip
    resize(img_size=img_size)
    return replace(found, size=img_size)


def prefix_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a ViT's tokens before the grid, in timm's order; none for other models."""
    kinds = {"cls_token": "class", "dist_token": "distillation"}
    names = [name for kind, name in kinds.items() if getattr(model, kind, None) is not None]
    registers = int(getattr(model, "num_reg_tokens", 0))
    return (*names, *(f"register {index}" for index in range(1, registers + 1)))


def top_classes(logits: Tensor, count: int = 5) -> list[tuple[int, float]]:
    """The classes of the largest probabilities and these, for the logits (K) of an image."""
    chances = logits.float().softmax(-1)
    best = chances.topk(min(count, len(chances)))
    return [(int(index), float(value)) for value, index in zip(best.values, best.indices, strict=True)]
