"""Images in files, found by timm's readers, augmented by timm's transforms and loaded by torch's workers.

The augmentation of an image depends only on its seed, and therefore not on the number of workers or processes. Images
that cannot be read are logged and counted. If they are more than a given fraction, the run stops.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import multiprocessing
import random
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from kernelbank.data.augment import Augmentation
from kernelbank.data.dataset import UNREADABLE
from kernelbank.data.order import Share
from kernelbank.errors import InputError

log = logging.getLogger(__name__)

# errors of Pillow for files that are truncated, empty, not images, or decompression bombs
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
TRIES = 10


class BrokenImagesError(InputError):
    """More images than the given fraction cannot be read. The message states their number and the first one."""


class Source(Protocol):
    """Images by row. `open` decodes an image and returns it with its label, `name` returns the name of its file."""

    labels: Sequence[int]

    def __len__(self) -> int: ...

    def open(self, row: int) -> Image.Image: ...

    def name(self, row: int) -> str: ...

    def state(self) -> str | None:
        """Return a text that changes whenever the files change, or None if changes cannot be detected."""
        ...


@dataclass(frozen=True)
class Loading:
    """The options for reading images: their size (channels, height, width), the normalisation of the weights of the
    model, the fraction of the centre crop in evaluation, the number of worker processes, and the fraction of unreadable
    images above which a run stops."""

    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    workers: int = 4
    max_broken: float = 1e-3


@dataclass
class FileSplit:
    """The images of a split, which are rows of `source`."""

    source: Source
    rows: np.ndarray[Any, np.dtype[np.int64]]
    loading: Loading
    broken: dict[int, str] = field(default_factory=dict)
    _loaders: dict[Augmentation | None, _Loader] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, shares: Iterable[Share], augment: Augmentation | None) -> Iterator[tuple[Tensor, Tensor]]:
        """See `dataset.Split`. In training an unreadable image is replaced by the next readable one, as in timm; in
        evaluation its label is `UNREADABLE`. Raises BrokenImagesError."""
        if augment not in self._loaders:
            self._loaders[augment] = _Loader(_Images(self, augment), self.loading)
        for images, labels, broken in self._loaders[augment].run(shares):
            for row in broken[broken >= 0].tolist():
                self._note(row)
            yield images, labels

    def first_size(self) -> tuple[int, int] | None:
        """Return the height and width of the first image in its file, or None if it cannot be read."""
        try:
            width, height = self.source.open(int(self.rows[0])).size
        except BROKEN:
            return None
        return height, width

    def _note(self, row: int) -> None:
        if row not in self.broken:
            note_broken(self.broken, row, self.source.name(int(self.rows[row])), len(self), self.loading.max_broken)


def note_broken(broken: dict[int, str], row: int, name: str, count: int, most: float) -> None:
    """Add an unreadable image of a split of `count` images to `broken`, and log it. Raises BrokenImagesError if the
    fraction of unreadable images exceeds `most`."""
    broken[row] = name
    log.warning("broken image %s (%d of %d)", name, len(broken), count)
    if len(broken) > most * count:
        raise BrokenImagesError(
            f"data: {len(broken)} of {count} images cannot be read, more than the share of {most:g} that max_broken "
            f"allows; the first is {next(iter(broken.values()))}"
        )


class _Images(MapDataset[tuple[Tensor, int, int]]):
    """A data set from (row, seed) to an image, its label, and the row if it could not be read, else -1."""

    def __init__(self, split: FileSplit, augment: Augmentation | None) -> None:
        self.source, self.rows, self.training = split.source, split.rows, augment is not None
        self.size, self.transform = split.loading.size, _transform(split.loading, augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[Tensor, int, int]:
        row, seed = drawn
        opened = self._open(row)
        broken = -1 if opened else row
        if opened is None and self.training:
            after = ((row + step) % len(self) for step in range(1, TRIES))
            opened = next(filter(None, map(self._open, after)), None)
        if opened is None:
            return torch.zeros(self.size), UNREADABLE, row
        with seeded(seed):
            return self.transform(opened[0]), opened[1], broken

    def _open(self, row: int) -> tuple[Image.Image, int] | None:
        at = int(self.rows[row])
        image = opened(self.source, at, self.size[0])
        return None if image is None else (image, int(self.source.labels[at]))


def opened(source: Source, row: int, channels: int) -> Image.Image | None:
    """Return an image in colour or grey, or None if it cannot be read."""
    try:
        return source.open(row).convert("RGB" if channels == 3 else "L")
    except BROKEN:
        return None


@dataclass
class _Batches:
    """The batches of one epoch as a batch sampler of torch's loader."""

    drawn: list[list[tuple[int, int]]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.drawn)

    def __len__(self) -> int:
        return len(self.drawn)


class _Loader:
    """torch's loader with workers that persist over epochs. It gets the batches of one epoch at a time."""

    def __init__(self, images: _Images, loading: Loading) -> None:
        self.batches = _Batches()
        self.loader = DataLoader(
            images,
            batch_sampler=self.batches,
            num_workers=loading.workers,
            persistent_workers=loading.workers > 0,
            worker_init_fn=_SignalsIgnored() if loading.workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its default is the generator of drop path
        )

    def run(self, shares: Iterable[Share]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self.batches.drawn = [list(zip(share.rows.tolist(), share.seeds.tolist(), strict=True)) for share in shares]
        return iter(self.loader)


class _SignalsIgnored:
    """Make a worker ignore Ctrl-C and SIGTERM, which are also sent to it, until the training process ends: training
    still needs images before it writes its checkpoint. When that process ends, SIGTERM has its usual effect again."""

    def __init__(self) -> None:
        self.ending = multiprocessing.get_context().Event()
        atexit.register(self.ending.set)  # runs before the handler of multiprocessing, which terminates workers

    def __call__(self, worker: int) -> None:
        signal.set_wakeup_fd(
            -1
        )  # the wakeup descriptor of the training process, which would get the signals of the worker
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: object) -> None:
        if self.ending.is_set():
            raise SystemExit


def _transform(loading: Loading, augment: Augmentation | None) -> Callable[[Image.Image], Tensor]:
    """Return timm's transform. Raises InputError if timm cannot build it."""
    common: dict[str, Any] = {"input_size": loading.size, "mean": loading.mean, "std": loading.std}
    if augment is None:
        return create_transform(**common, is_training=False, interpolation="bicubic", crop_pct=loading.crop_pct)
    if augment.shift:
        raise InputError(f"recipe: invalid shift={augment.shift} for images in files; expected 0, with scale and ratio")
    return create_transform(
        **common,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.flip,
        color_jitter=cast(Any, augment.color_jitter),  # timm accepts None, but its annotation does not
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        re_prob=augment.erase,
        re_mode=augment.erase_mode,
        use_prefetcher=False,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and torch with `seed`, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def held_out(names: Sequence[str], labels: Sequence[int], share: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which images are for validation: in every class the fraction `share` whose names have the lowest SHA-256,
    at least one. The choice does not depend on the other images of the data set."""
    digests = np.array([hashlib.sha256(name.encode()).hexdigest() for name in names])
    chosen, of_class = np.zeros(len(names), bool), np.asarray(labels)
    for label in np.unique(of_class):
        members = np.flatnonzero(of_class == label)
        chosen[members[np.argsort(digests[members], kind="stable")[: max(1, round(share * len(members)))]]] = True
    return chosen
