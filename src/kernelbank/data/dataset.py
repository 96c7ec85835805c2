"""The interface between data sets and the training loop: splits that yield batches, and an identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelbank.data.augment import Augmentation
from kernelbank.data.order import Share
from kernelbank.records import DataIdentity

UNREADABLE = -1
"""The label of an image that could not be read, in evaluation. It is not counted."""


class Split(Protocol):
    """Images and labels in a fixed order. `broken` holds the names of the images that could not be read so far."""

    broken: dict[int, str]

    def __len__(self) -> int: ...

    def batches(self, shares: Iterable[Share], augment: Augmentation | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `shares`: images (B, C, H, W) and labels (B), augmented unless `augment` is None. The
        augmentation of an image depends only on its seed in the share."""


class TensorSplit:
    """Images (N, C, H, W) in float32, normalised, and their labels (N) in int64, in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, shares: Iterable[Share], augment: Augmentation | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split`. Images in memory support `shift` only."""
        for share in shares:
            rows = torch.from_numpy(share.rows)
            images = self.images[rows]
            if augment is not None and augment.shift:
                images = shifted(images, augment.shift, torch.from_numpy(share.seeds))
            yield images, self.labels[rows]


@dataclass(frozen=True)
class Dataset:
    """A data set with fixed splits.

    `sha256` identifies them. It is computed from the raw arrays of each split, from the archive that the images were
    unpacked from, or from the names and labels of the files. `images` is where training images are augmented: ``files``
    if they are read and augmented one by one, ``device`` if they are augmented in batches on the device, and None for a
    data set in memory. `notes` are messages for the user.
    """

    name: str
    sha256: str
    train: Split
    val: Split
    test: Split | None
    num_classes: int
    in_chans: int
    img_size: tuple[int, int]
    images: Literal["files", "device"] | None = None
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> DataIdentity:
        """The identity of the data in a run record."""
        test = 0 if self.test is None else len(self.test)
        return DataIdentity(self.name, self.sha256, len(self.train), len(self.val), test)


def shifted(images_NCHW: Tensor, most: int, seeds: Tensor) -> Tensor:
    """Shift every image by -most to most pixels per axis, according to its seed. The edge is repeated."""
    count, _, height, width = images_NCHW.shape
    padded = F.pad(images_NCHW, (most,) * 4, mode="replicate")
    ways = 2 * most + 1
    dy, dx = seeds % ways, seeds // ways % ways
    device = images_NCHW.device
    rows = dy[:, None] + torch.arange(height, device=device)  # (N, H): of the padded image
    columns = dx[:, None] + torch.arange(width, device=device)
    picked = padded.permute(0, 2, 3, 1)[
        torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2).contiguous()
