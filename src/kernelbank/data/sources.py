"""Where images come from: folders and tars by timm's readers, torchvision's and Hugging Face's data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_factory import create_reader

from kernelbank.errors import InputError, require

# timm's synonyms of a split's folder or tar, the first found is taken
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass
class Read:
    """A timm reader of files with their labels; `classes` are the names of its labels, in order."""

    reader: Any
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, row: int) -> Image.Image:
        """The image. Raises what Pillow and the file raise."""
        with self.reader[row][0] as file:
            image = Image.open(file)
            image.load()
        return image

    def name(self, row: int) -> str:
        return str(self.reader.filename(row))


@dataclass
class Held:
    """A map-style data set that gives Pillow images: torchvision's."""

    images: Any
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, row: int) -> Image.Image:
        image: Image.Image = self.images[row][0]
        return image

    def name(self, row: int) -> str:
        return f"{type(self.images).__name__}/{row}"


def find_splits(root: Path) -> dict[str, Path]:
    """The folders or tars of the splits below `root`, by split. Raises InputError where there is no train split."""
    try:
        names = {entry.name: entry for entry in sorted(root.iterdir())}
    except OSError as error:
        raise InputError(f"data: {root} cannot be read: {error.strerror or error}") from None
    found = {}
    for split, synonyms in SPLITS.items():
        paths = [names[name] for synonym in synonyms for name in (synonym, f"{synonym}.tar") if name in names]
        if paths:
            found[split] = paths[0]
    if "train" not in found:
        raise InputError(f"data: {root} holds no train split; legal: a folder with train/CLASS/IMAGE or train.tar, and "
                         "val and test likewise where there are such splits")  # fmt: skip
    return found


def read_files(path: Path, classes: tuple[str, ...] | None = None) -> Read:
    """The images of a folder or tar, classes by the names of the folders inside; labelled as `classes` if given.

    Raises InputError for a folder that cannot be read or holds no images, for an empty class, and where the classes
    are not `classes`.
    """
    there = _class_folders(path) if path.is_dir() else None
    try:
        reader = create_reader("", root=str(path))
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        kinds = ", ".join(get_img_extensions())
        raise InputError(f"data: {path} holds no images that can be read ({kinds}): {error}") from None
    by_name: dict[str, int] = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    found = tuple(sorted(by_name, key=by_name.__getitem__))
    if there is not None and (empty := sorted(there - set(found))):
        raise InputError(
            f"data: class folder {path / empty[0]} holds no image ({len(empty)} of {len(there)} are empty)"
        )
    labels = [
        int(label)
        for label in (reader.targets if hasattr(reader, "targets") else [label for _, label in reader.samples])
    ]
    if classes is not None:
        check_classes(path, found, classes)
    # the same names in the same natural order: the labels agree
    return Read(reader, labels, found)


def check_classes(place: Path | str, found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Raises InputError where the classes `found` at `place` are not those of the train split."""
    lacking, more = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    which = [f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
             for word, names in (("missing", lacking), ("unknown", more)) if names]  # fmt: skip
    if which:
        raise InputError(
            f"data: {place} has {len(found)} classes, the train split {len(classes)}: {' and '.join(which)}"
        )


def _class_folders(path: Path) -> set[str]:
    """The names of the folders right below `path`. Raises InputError for one that cannot be read."""
    try:
        folders = [entry for entry in os.scandir(path) if entry.is_dir()]
        for folder in folders:
            with os.scandir(folder.path):
                pass
    except OSError as error:
        raise InputError(f"data: {error.filename or path} cannot be read: {error.strerror or error}") from None
    return {folder.name for folder in folders}


def torchvision_split(name: str, split: str, cache: Path, download: bool) -> Held | None:
    """A split of torchvision's data set ``torch/NAME``; None where it has none of this name. Raises InputError."""
    synonyms = {"val": "validation"}
    if split == "val" and name not in ("torch/imagenet", "torch/places365", "torch/inat"):
        return None  # MNIST, CIFAR and their like have train and test
    wanted = "validation" if split == "test" else synonyms.get(split, split)
    if split == "test" and name in ("torch/imagenet", "torch/places365", "torch/inat"):
        return None
    images = _made(name, lambda: create_dataset(name, root=str(cache), split=wanted, download=download),
                   f"{cache} does not hold it: add --download, or --cache with the folder that does")  # fmt: skip
    labels = [int(label) for label in images.targets]
    classes = tuple(map(str, getattr(images, "classes", range(max(labels) + 1))))
    return Held(images, labels, classes)


def hugging_face_split(name: str, split: str, cache: Path) -> Read | None:
    """A split of the Hugging Face data set ``hfds/NAME``; None where it has none of this name. Raises InputError."""
    require("a data set of Hugging Face", "hfds", "datasets")
    import datasets  # noqa: PLC0415  (268 MB, an extra)

    there = _made(name, lambda: datasets.get_dataset_split_names(name.removeprefix("hfds/")), "see the message")
    named = [synonym for synonym in SPLITS[split] if synonym in there]
    if not named:
        return None
    reader = _made(name, lambda: create_reader(name, root=str(cache), split=named[0]), "see the message")
    labels = [int(label) for label in reader.iter_targets()]
    classes = tuple(reader.class_to_idx) or tuple(map(str, range(max(labels) + 1)))
    return Read(reader, labels, classes)


def _made(name: str, make: Callable[[], Any], hint: str) -> Any:
    """What `make` returns; its complaint, whatever it is, in one line. Raises InputError."""
    try:
        return make()
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError) as error:
        raise InputError(f"data: {name} cannot be opened: {' '.join(str(error).split())} ({hint})") from None
