"""What a data set is to the training loop: three splits of tensors in memory and an identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernelbank.records import DataIdentity


@dataclass(frozen=True)
class Split:
    """Normalised images (N, C, H, W) in float32 and their labels (N) in int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set whose splits never change; `sha256` is over its raw arrays, split by split."""

    name: str
    sha256: str
    train: Split
    val: Split
    test: Split
    num_classes: int

    @property
    def in_chans(self) -> int:
        """The channels of an image."""
        return self.train.images.shape[1]

    @property
    def img_size(self) -> tuple[int, int]:
        """The height and width of an image."""
        height, width = self.train.images.shape[2:]
        return height, width

    @property
    def identity(self) -> DataIdentity:
        """What a run record keeps of the data."""
        return DataIdentity(self.name, self.sha256, len(self.train), len(self.val), len(self.test))
