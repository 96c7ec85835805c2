"""Sources of images: folders and tars through timm's readers, and data sets of torchvision and Hugging Face by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_factory import create_reader

from kernelbank.data.archive import Progress, is_archive, unpacked
from kernelbank.data.assemble import assemble
from kernelbank.data.dataset import Dataset
from kernelbank.data.images import Loading
from kernelbank.data.load import NAMED_DATA, SHOWN
from kernelbank.errors import InputError, require
from kernelbank.files import regular_file
from kernelbank.text import suggest

# timm's synonyms for the folder or tar of a split; the first one that exists is used
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass
class ReaderSource:
    """The images of a timm reader with their labels. `classes` are the names of its labels, in order."""

    reader: Any
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, row: int) -> Image.Image:
        """Open the image. Raises the errors of Pillow and of the file, and OSError for pipes and devices, which are not
        opened."""
        if (path := self._path(row)) is not None:
            regular_file(path)
        with self.reader[row][0] as file:
            image = Image.open(file)
            image.load()
        return image

    def name(self, row: int) -> str:
        return str(self.reader.filename(row))

    def state(self) -> str | None:
        """The names, sizes and times of the files; None for images inside archives of their own."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            if (path := self._path(row)) is None:
                return None
            try:
                stat = os.stat(path)
            except OSError:
                return None
            digest.update(
                f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape")
            )
        return digest.hexdigest()

    def _path(self, row: int) -> Path | None:
        """Return the file of an image in a folder, or None for an image in an archive."""
        samples = getattr(self.reader, "samples", None)
        return Path(samples[row][0]) if samples is not None and isinstance(samples[row][0], str) else None


@dataclass
class MapSource:
    """The images of a map-style data set of Pillow images, such as those of torchvision."""

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

    def state(self) -> None:
        """Return None: where a library stores its files is not known here."""


# ---- the sources -------------------------------------------------------------------------------------------


def open_path(text: str, loading: Loading, *, cache: Path, progress: Progress | None = None, **_: object) -> Dataset:
    """Open a folder, or an archive that is unpacked below `cache`. Raises InputError."""
    path = Path(text).expanduser()
    if not path.exists():
        raise InputError(
            f"data: {text!r} is not a data set and not a path{suggest(text, NAMED_DATA)}; expected one of "
            f"{', '.join(NAMED_DATA)}, a folder, a tar archive, {', '.join(SHOWN)}"
        )
    digest = None
    if is_archive(path):
        path, digest = unpacked(path, cache, progress)
    elif not path.is_dir():
        raise InputError(f"data: {path} is neither a folder nor a tar archive")
    paths = find_splits(path)
    train = read_files(paths["train"])

    def split(which: str) -> ReaderSource | None:
        if which == "train":
            return train
        return read_files(paths[which], train.classes) if which in paths else None

    return assemble(Path(text).name, loading, split, digest)


def open_torchvision(text: str, loading: Loading, *, cache: Path, download: bool, **_: object) -> Dataset:
    """Open a data set of torchvision, ``torch/NAME``. Raises InputError."""
    return assemble(text, loading, lambda split: torchvision_split(text, split, cache, download))


def open_hugging_face(text: str, loading: Loading, *, cache: Path, **_: object) -> Dataset:
    """Open a data set of Hugging Face, ``hfds/NAME``. Raises InputError."""
    return assemble(text, loading, lambda split: hugging_face_split(text, split, cache))


# ---- their splits ------------------------------------------------------------------------------------------


def find_splits(root: Path) -> dict[str, Path]:
    """Return the folder or tar of each split below `root`. Raises InputError if there is no train split."""
    try:
        names = {entry.name: entry for entry in sorted(root.iterdir())}
    except OSError as error:
        raise InputError(f"data: {root} cannot be read: {error.strerror or error}") from None
    splits = {}
    for split, synonyms in SPLITS.items():
        paths = [names[name] for synonym in synonyms for name in (synonym, f"{synonym}.tar") if name in names]
        if paths:
            splits[split] = paths[0]
    if "train" not in splits:
        raise InputError(f"data: {root} has no train split; expected a folder with train/CLASS/IMAGE or train.tar, "
                         "and val and test likewise where there are such splits")  # fmt: skip
    return splits


def read_files(path: Path, classes: tuple[str, ...] | None = None) -> ReaderSource:
    """Return the images of a folder or tar. The names of the folders inside are the classes, numbered as in `classes`
    if it is given.

    Raises:
        InputError: If the folder cannot be read or contains no images, a class is empty, or the classes are not
            `classes`.
    """
    folders = _class_folders(path) if path.is_dir() else None
    try:
        reader = create_reader("", root=str(regular_file(path)))
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        kinds = ", ".join(get_img_extensions())
        raise InputError(f"data: {path} holds no images that can be read ({kinds}): {error}") from None
    by_name: dict[str, int] = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    names = tuple(sorted(by_name, key=by_name.__getitem__))
    if folders is not None and (empty := sorted(folders - set(names))):
        raise InputError(
            f"data: class folder {path / empty[0]} holds no image ({len(empty)} of {len(folders)} are empty)"
        )
    labels = [
        int(label)
        for label in (reader.targets if hasattr(reader, "targets") else [label for _, label in reader.samples])
    ]
    if classes is not None:
        check_classes(path, names, classes)
    # the same names in the same natural order: the labels agree
    return ReaderSource(reader, labels, names)


def check_classes(place: Path | str, names: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Raise InputError unless the classes `names` at `place` are those of the train split."""
    lacking, more = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
    which = [f"{len(some)} {word} ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''})"
             for word, some in (("missing", lacking), ("unknown", more)) if some]  # fmt: skip
    if which:
        raise InputError(
            f"data: {place} has {len(names)} classes, the train split {len(classes)}: {' and '.join(which)}"
        )


def _class_folders(path: Path) -> set[str]:
    """Return the names of the folders in `path`. Raises InputError if one cannot be read."""
    try:
        folders = [entry for entry in os.scandir(path) if entry.is_dir()]
        for folder in folders:
            with os.scandir(folder.path):
                pass
    except OSError as error:
        raise InputError(f"data: {error.filename or path} cannot be read: {error.strerror or error}") from None
    return {folder.name for folder in folders}


def torchvision_split(name: str, split: str, cache: Path, download: bool) -> MapSource | None:
    """Return a split of torchvision's data set ``torch/NAME``, or None if it does not exist. Raises InputError."""
    synonyms = {"val": "validation"}
    if split == "val" and name not in ("torch/imagenet", "torch/places365", "torch/inat"):
        return None  # MNIST, CIFAR and others have train and test
    theirs = "validation" if split == "test" else synonyms.get(split, split)
    if split == "test" and name in ("torch/imagenet", "torch/places365", "torch/inat"):
        return None
    images = _opened(name, lambda: create_dataset(name, root=str(cache), split=theirs, download=download),
                   f"{cache} does not hold it: add --download, or --cache with the folder that does")  # fmt: skip
    labels = [int(label) for label in images.targets]
    classes = tuple(map(str, getattr(images, "classes", range(max(labels) + 1))))
    return MapSource(images, labels, classes)


def hugging_face_split(name: str, split: str, cache: Path) -> ReaderSource | None:
    """Return a split of the Hugging Face data set ``hfds/NAME``, or None if it does not exist. Raises InputError."""
    require("a data set of Hugging Face", "hfds", "datasets")
    datasets = import_module("datasets")  # 268 MB, an extra

    splits = _opened(name, lambda: datasets.get_dataset_split_names(name.removeprefix("hfds/")), "see the message")
    named = [synonym for synonym in SPLITS[split] if synonym in splits]
    if not named:
        return None
    reader = _opened(name, lambda: create_reader(name, root=str(cache), split=named[0]), "see the message")
    labels = [int(label) for label in reader.iter_targets()]
    classes = tuple(reader.class_to_idx) or tuple(map(str, range(max(labels) + 1)))
    return ReaderSource(reader, labels, classes)


def _opened(name: str, make: Callable[[], Any], hint: str) -> Any:
    """Return the result of `make`. Raises InputError with its error in one line."""
    try:
        return make()
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError) as error:
        raise InputError(f"data: {name} cannot be opened: {' '.join(str(error).split())} ({hint})") from None
