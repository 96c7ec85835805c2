"""CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009) from an archive or folder of its
images: 50,000 for training, of which 5,000 are held out for validation, and 10,000 for test, in ten classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kernelbank.data.dataset import Dataset
from kernelbank.data.images import FileSplit, Loading
from kernelbank.data.sources import open_path
from kernelbank.errors import InputError

ARCHIVE = "cifar10.tar.xz"
COUNTS = {"training": 45_000, "validation": 5_000, "test": 10_000}
SIDE, CLASSES = 32, 10


def open_cifar10(text: str, loading: Loading, *, cache: Path, **options: Any) -> Dataset:
    """Open CIFAR-10. ``cifar10/PATH`` is a folder or a tar archive of train/CLASS/IMAGE and test/CLASS/IMAGE, and
    ``cifar10`` alone is the archive ``cifar10.tar.xz`` in `cache`. For validation, a tenth of every class is held out
    by the hash of the file name.

    If a file or folder of the name `text` exists, it is opened as a path.

    Raises:
        InputError: If the path does not exist, or the numbers and sizes of its images are not those of CIFAR-10.
    """
    if Path(text).exists():
        return open_path(text, loading, cache=cache, **options)
    _, _, where = text.partition("/")
    path = Path(where).expanduser() if where else cache / ARCHIVE
    if not path.exists():
        raise InputError(f"data: {text}: there is no {path}; expected cifar10/PATH, a folder or tar "
                         f"archive, or {ARCHIVE} in --cache {cache}")  # fmt: skip
    data = replace(open_path(str(path), loading, cache=cache, **options), name="cifar10")
    splits = dict(zip(COUNTS, (data.train, data.val, data.test), strict=True))
    found = {name: 0 if split is None else len(split) for name, split in splits.items()}
    if found != COUNTS or data.num_classes != CLASSES:
        raise InputError(f"data: {path} is not CIFAR-10: it has {_listed(found)} images in {data.num_classes} classes; "
                         f"expected {_listed(COUNTS)} in {CLASSES}")  # fmt: skip
    size = data.train.first_size() if isinstance(data.train, FileSplit) else None
    if size != (SIDE, SIDE):
        raise InputError(f"data: {path} is not CIFAR-10: its first image is {size}; expected {(SIDE, SIDE)}")
    return data


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
