"""Data sets by name or path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kernelbank.data.archive import Progress, is_archive, unpacked
from kernelbank.errors import InputError
from kernelbank.text import suggest

if TYPE_CHECKING:  # torch takes seconds to import, and the command line needs the names alone
    from kernelbank.data.dataset import Dataset
    from kernelbank.data.images import Loading

# name -> module:function that makes it
NAMED_DATA: dict[str, str] = {"digits": "kernelbank.data.digits:digits"}
PREFIXES = ("torch", "hfds", "wds")
"""The prefixes of data sets by library: torchvision, Hugging Face, WebDataset."""
VALIDATION = 0.1
"""The share of the training images that is held out where a data set has no validation split."""


def check_name(name: str) -> None:
    """Raises InputError when there is no data set of this name."""
    if name not in NAMED_DATA:
        raise InputError(f"data: unknown data set {name!r}{suggest(name, NAMED_DATA)}; legal: {', '.join(NAMED_DATA)}")


def load(name: str) -> Dataset:
    """The data set in memory `name`. Raises InputError when there is none of this name."""
    check_name(name)
    module, _, function = NAMED_DATA[name].partition(":")
    return cast("Callable[[], Dataset]", getattr(import_module(module), function))()


def open_data(
    text: str, loading: Loading, *, cache: Path, download: bool = False, progress: Progress | None = None
) -> Dataset:
    """The data set that `text` says: a name in memory (digits), a folder or an archive of train/CLASS/IMAGE, val and
    test likewise, ``torch/NAME`` (torchvision), ``hfds/NAME`` (Hugging Face) or ``wds/PATH`` (WebDataset's shards).

    An archive is unpacked once below `cache`. A tenth of every training class, by hash of the file name, becomes the
    validation split where there is none. Raises InputError.
    """
    if text in NAMED_DATA:
        return load(text)
    from kernelbank.data.shards import sharded_splits  # noqa: PLC0415
    from kernelbank.data.sources import hugging_face_split, torchvision_split  # noqa: PLC0415

    match text.partition("/")[0]:
        case "torch":
            return _assemble(text, loading, lambda split: torchvision_split(text, split, cache, download), None)
        case "hfds":
            return _assemble(text, loading, lambda split: hugging_face_split(text, split, cache), None)
        case "wds":
            splits = sharded_splits(text, cache, progress)
            return _assemble(f"wds/{Path(text).name}", loading, splits.get, None)
    path = Path(text).expanduser()
    if not path.exists():
        raise InputError(
            f"data: {text!r} is no data set and no path{suggest(text, NAMED_DATA)}; legal: {', '.join(NAMED_DATA)}, "
            "a folder, a tar archive, torch/NAME, hfds/NAME, wds/PATH"
        )
    digest = None
    if is_archive(path):
        path, digest = unpacked(path, cache, progress)
    elif not path.is_dir():
        raise InputError(f"data: {path} is neither a folder nor a tar archive")
    return _from_folder(Path(text).name, path, digest, loading)


def _from_folder(name: str, path: Path, digest: str | None, loading: Loading) -> Dataset:
    from kernelbank.data.sources import find_splits, read_files  # noqa: PLC0415

    paths = find_splits(path)
    train = read_files(paths["train"])

    def split(which: str) -> Any:
        if which == "train":
            return train
        return read_files(paths[which], train.classes) if which in paths else None

    return _assemble(name, loading, split, digest)


def _assemble(name: str, loading: Loading, split: Callable[[str], Any], digest: str | None) -> Dataset:
    import numpy as np  # noqa: PLC0415

    from kernelbank.data.dataset import Dataset  # noqa: PLC0415
    from kernelbank.data.images import FileSplit, held_out  # noqa: PLC0415

    train, val, test = (split(which) for which in ("train", "val", "test"))
    if train is None:
        raise InputError(f"data: {name} has no train split")
    every = np.arange(len(train))
    names = [train.name(row) for row in every] if val is None or digest is None else []
    kept, held = every, np.arange(0 if val is None else len(val))
    if val is None:
        chosen = held_out(names, train.labels, VALIDATION)
        kept, held, val = every[~chosen], every[chosen], train
    if digest is None:
        lines = (f"{file}\0{label}" for file, label in zip(names, train.labels, strict=True))
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Dataset(
        name=name,
        sha256=digest,
        train=FileSplit(train, kept, loading),
        val=FileSplit(val, held, loading),
        test=None if test is None else FileSplit(test, np.arange(len(test)), loading),
        num_classes=len(train.classes),
        in_chans=loading.size[0],
        img_size=loading.size[1:],
    )
