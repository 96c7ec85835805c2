"""Assemble a data set of images in files from its splits, and hold out a validation split if it has none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kernelbank.data.dataset import Dataset
from kernelbank.data.images import FileSplit, Loading, held_out
from kernelbank.errors import InputError

VALIDATION = 0.1
"""The fraction of the training images that is held out if a data set has no validation split."""


def assemble(name: str, loading: Loading, split: Callable[[str], Any], digest: str | None = None) -> Dataset:
    """Return the data set whose splits `split` gives (train, val and test; None for one that does not exist). `digest`
    is the SHA-256 of its archive, by default that of the names and labels of its training images. Raises InputError if
    there is no train split."""
    train, val, test = (split(which) for which in ("train", "val", "test"))
    if train is None:
        raise InputError(f"data: {name} has no train split")
    rows = np.arange(len(train))
    names = [train.name(row) for row in rows] if val is None or digest is None else []
    train_rows, val_rows = rows, np.arange(0 if val is None else len(val))
    if val is None:
        chosen = held_out(names, train.labels, VALIDATION)
        train_rows, val_rows, val = rows[~chosen], rows[chosen], train
    if digest is None:
        lines = (f"{file}\0{label}" for file, label in zip(names, train.labels, strict=True))
        digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
    return Dataset(
        name=name,
        sha256=digest,
        train=FileSplit(train, train_rows, loading),
        val=FileSplit(val, val_rows, loading),
        test=None if test is None else FileSplit(test, np.arange(len(test)), loading),
        num_classes=len(train.classes),
        in_chans=loading.size[0],
        img_size=loading.size[1:],
        images="files",
    )


def with_fewer(data: Dataset, count: int) -> Dataset:
    """Return `data` with `count` training images. Each class keeps its share, and of each class the images whose names
    have the lowest SHA-256 are taken, so that a smaller subset is contained in a larger one. Raises InputError if there
    are fewer than `count`."""
    split = data.train
    assert isinstance(split, FileSplit)  # data sets in memory have no names; the options refuse them
    if count > len(split):
        raise InputError(f"invalid train_images={count} of {data.name}; expected at most {len(split)}")
    names = [split.source.name(int(row)) for row in split.rows]
    labels = np.asarray(split.source.labels)[split.rows]
    digests = np.array([hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest() for name in names])
    position = np.empty(len(names))  # the k-th of the n images of its class stands at (k + 1/2) / n
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        position[members[np.argsort(digests[members], kind="stable")]] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.sort(np.argsort(position, kind="stable")[:count])
    return replace(data, train=FileSplit(split.source, split.rows[chosen], split.loading))
