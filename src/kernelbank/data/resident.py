"""Small images in the memory of the device: decoded once to uint8, and augmented there in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernelbank.data.archive import Progress
from kernelbank.data.augment import Augmentation
from kernelbank.data.by_batch import augmented, unsupported
from kernelbank.data.dataset import UNREADABLE, Dataset
from kernelbank.data.decoded import Decoded, UnequalSizes, decoded, replacements
from kernelbank.data.images import TRIES, FileSplit, note_broken
from kernelbank.data.order import Share


@dataclass
class ResidentSplit:
    """Images of one size on the device, (N, C, H, W) in uint8: training images at the size of their files, the others
    resized and cropped for evaluation.

    `stand_in` is the row that replaces each row in training (see `decoded.replacements`), `mean_std` are two tensors
    (C, 1, 1), and `size` is the image size of the model.
    """

    pixels: Tensor
    labels: Tensor
    stand_in: Tensor
    mean_std: tuple[Tensor, Tensor]
    size: tuple[int, int]
    broken: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def first_size(self) -> tuple[int, int]:
        """Return the height and width of the images in memory."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def batches(self, shares: Iterable[Share], augment: Augmentation | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `dataset.Split`. As with files, an unreadable image is replaced by the next readable one in training, and
        has the label `UNREADABLE` in evaluation."""
        device = self.pixels.device
        for share in shares:
            rows = torch.from_numpy(share.rows).to(device)
            if augment is None:
                labels = self.labels[rows].where(self.stand_in[rows] == rows, UNREADABLE)
                yield (self.pixels[rows].float() / 255 - self.mean_std[0]) / self.mean_std[1], labels
                continue
            taken = self.stand_in[rows]
            labels = self.labels[taken].where(taken >= 0, UNREADABLE)
            seeds = torch.from_numpy(share.seeds).to(device)
            yield augmented(self.pixels[taken.clamp(min=0)], seeds, augment, self.size, self.mean_std), labels


def memory(device: torch.device) -> int:
    """Return the memory of `device` in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def on_device(
    data: Dataset, augment: Augmentation | None, device: torch.device, share: float, cache: Path, progress: Progress
) -> Dataset:
    """Return `data` with its images on `device` if they take at most the fraction `share` of its memory when decoded.

    Training images must have one size, since they are cropped from the size of their files. A data set that cannot be
    moved is returned as it is, with a note that states the reason. `augment` is the augmentation of the recipe. With
    None, for evaluation, images are read from files, since most splits are read once or never. The decoded images are
    cached below `cache`.

    Raises:
        BrokenImagesError: If more images are unreadable than the data set's options allow.
    """
    splits = {name: split for name in ("train", "val", "test") if isinstance(split := getattr(data, name), FileSplit)}
    if not splits or share <= 0:
        return data
    if augment is None:
        return data
    first = splits["train"].first_size()
    if field := unsupported(augment):
        return _with_note(data, f"{field} is for single images")
    if first is None:
        return _with_note(data, "the first of them cannot be read")
    taken = _bytes(splits, first)
    if taken > share * memory(device):
        limit = f"more than {share:g} of the memory of {device}"
        return _with_note(data, f"decoded they take {taken / 1e9:.3g} GB, {limit}")
    try:
        placed = {name: _placed(split, first if name == "train" else None, device, cache, progress)
                  for name, split in splits.items()}  # fmt: skip
    except UnequalSizes as error:
        return _with_note(data, f"they differ in size: {error}")
    note = f"images are decoded, {taken / 1e6:.0f} MB on {device}, and augmented by the batch there"
    train, val, test = (placed.get(name, getattr(data, name)) for name in ("train", "val", "test"))
    return replace(data, train=train, val=val, test=test, images="device", notes=(*data.notes, note))


def _with_note(data: Dataset, reason: str) -> Dataset:
    return replace(data, notes=(*data.notes, f"images are read from files, since {reason}"))


def _bytes(splits: dict[str, FileSplit], first: tuple[int, int]) -> int:
    """Return the size of the decoded images of all splits in bytes."""
    total = 0
    for name, split in splits.items():
        channels, *seen = split.loading.size
        total += len(split) * channels * int(np.prod(first if name == "train" else seen))
    return total


def _placed(
    split: FileSplit, size: tuple[int, int] | None, device: torch.device, cache: Path, progress: Progress
) -> ResidentSplit:
    found: Decoded = decoded(split, size, cache, progress)
    broken: dict[int, str] = {}
    for row in found.broken:
        note_broken(broken, row, split.source.name(int(split.rows[row])), len(split), split.loading.max_broken)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in _statistics(split))
    labels = np.asarray(split.source.labels, np.int64)[split.rows]
    return ResidentSplit(
        pixels=torch.from_numpy(found.pixels).to(device),
        labels=torch.from_numpy(labels).to(device),
        stand_in=torch.from_numpy(replacements(len(split), found.broken, TRIES)).to(device),
        mean_std=(mean, std),
        size=split.loading.size[1:],
        broken=broken,
    )


def _statistics(split: FileSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation per channel."""
    channels = split.loading.size[0]
    return split.loading.mean[:channels], split.loading.std[:channels]
