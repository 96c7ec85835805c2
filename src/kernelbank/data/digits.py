"""scikit-learn's digits: 1,797 real 8 x 8 images in 17 grey levels inside a dependency; works offline.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (the test part of it).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from kernelbank.data.dataset import Dataset, TensorSplit

VAL, TEST = 360, 360


def digits() -> Dataset:
    """Train 1,077, validation 360, test 360, each with the same share of every class, normalised by the mean
    and standard deviation of the training pixels. 360 test images have a standard error near 0.9 point at 97 %."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)  # exact: the pixels are whole numbers from 0 to 16
    order = _stratified(labels)
    parts = {"test": order[:TEST], "val": order[TEST : TEST + VAL], "train": order[TEST + VAL :]}
    digest = hashlib.sha256()
    for name in ("train", "val", "test"):
        digest.update(images[parts[name]].tobytes() + labels[parts[name]].astype("<i8").tobytes())

    values = torch.from_numpy(images).float()
    train = values[torch.from_numpy(parts["train"])]
    mean, deviation = train.mean(), train.std()

    def split(rows: Any) -> TensorSplit:
        chosen = torch.from_numpy(rows)
        return TensorSplit((values[chosen] - mean) / deviation, torch.from_numpy(labels)[chosen].long())

    return Dataset(name="digits", sha256=digest.hexdigest(), train=split(parts["train"]), val=split(parts["val"]),
                   test=split(parts["test"]), num_classes=10, in_chans=1, img_size=(8, 8))  # fmt: skip


def _stratified(labels: Any) -> Any:
    """An order of all images in which every stretch holds the classes in their shares: each class is permuted,
    its k-th of n images stands at (k + 1/2) / n. NumPy guarantees RandomState's stream for ever (NEP 19)."""
    random, position = np.random.RandomState(0), np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        position[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(position, kind="stable")
