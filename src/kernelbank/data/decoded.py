"""Images that are decoded once into one array of uint8, which is cached in a file and shared between processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform

from kernelbank.data.archive import Progress
from kernelbank.data.images import FileSplit, Loading, opened
from kernelbank.files import read_json, replace_file, replace_text

Pixels = NDArray[np.uint8]
_VERSION = 1


class UnequalSizes(ValueError):
    """The images of a split differ in size."""


@dataclass(frozen=True)
class Decoded:
    """The decoded images of a split, (N, C, H, W), and the rows that could not be read, whose pixels are zero."""

    pixels: Pixels
    broken: tuple[int, ...]


def decoded(split: FileSplit, size: tuple[int, int] | None, cache: Path, progress: Progress | None) -> Decoded:
    """Return the decoded images of `split`: at the size of their files, which must be `size` = (H, W), or, if `size` is
    None, resized and cropped as in evaluation.

    The array is cached below `cache`, under a name that changes with the files, and is memory-mapped from there.

    Raises:
        UnequalSizes: If an image has another size.
    """
    state = split.source.state()
    if state is None:
        return _decode(split, size, progress)
    loading = split.loading
    shape = (len(split), loading.size[0], *(loading.size[1:] if size is None else size))
    how = [_VERSION, state, split.rows.tolist(), size, loading.size, loading.crop_pct]
    name = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]
    pixels, marker = cache / f"decoded-{name}.npy", cache / f"decoded-{name}.json"
    if (kept := _kept(pixels, marker, shape)) is not None:
        return kept
    found = _decode(split, size, progress)
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(pixels, lambda beside: _write(beside, found.pixels))
    replace_text(marker, json.dumps({"broken": found.broken}) + "\n")
    return _kept(pixels, marker, shape) or found


def _write(path: Path, pixels: Pixels) -> None:
    with path.open("wb") as file:
        np.save(file, pixels)


def _kept(pixels: Path, marker: Path, shape: tuple[int, ...]) -> Decoded | None:
    """Return the images of `shape` in the cache, or None if there are none or they are damaged."""
    try:
        document = read_json(marker)
        broken = document.get("broken") if isinstance(document, dict) else None
        array = np.load(pixels, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    rows = range(shape[0])
    if not isinstance(broken, list) or not all(type(row) is int and row in rows for row in broken):
        return None
    if array.dtype != np.uint8 or array.shape != shape or len(set(broken)) < len(broken):
        return None
    return Decoded(array, tuple(broken))


def _decode(split: FileSplit, size: tuple[int, int] | None, progress: Progress | None) -> Decoded:
    channels = split.loading.size[0]
    height, width = split.loading.size[1:] if size is None else size
    see = _seen(split.loading) if size is None else np.asarray
    pixels = np.zeros((len(split), channels, height, width), np.uint8)
    broken = []
    for row, at in enumerate(split.rows.tolist()):
        image = opened(split.source, at, channels)
        if image is None:
            broken.append(row)
        elif size is not None and image.size != (width, height):
            raise UnequalSizes(f"{split.source.name(at)} is {image.height} x {image.width}, not {height} x {width}")
        else:
            pixels[row] = _channels_first(see(image))
        if progress is not None and (row % 500 == 0 or row + 1 == len(split)):
            progress(row + 1, len(split))
    return Decoded(pixels, tuple(broken))


def _channels_first(pixels: Any) -> Pixels:
    array = np.asarray(pixels)
    if array.ndim == 2:
        return array[None]
    return array.transpose(2, 0, 1) if array.shape[-1] in (1, 3) and array.shape[0] not in (1, 3) else array


def _seen(loading: Loading) -> Callable[[Image.Image], Any]:
    """Return timm's transform for evaluation, without normalisation."""
    return create_transform(loading.size, is_training=False, interpolation="bicubic", crop_pct=loading.crop_pct,
                            use_prefetcher=True)  # fmt: skip


def replacements(count: int, broken: Sequence[int], tries: int) -> NDArray[np.int64]:
    """Return the row that replaces each row in training: the row itself, or for an unreadable image the first readable
    one among the next `tries - 1`, or -1 if there is none."""
    rows, unreadable = np.arange(count), set(broken)
    for row in broken:
        after = ((row + step) % count for step in range(1, tries))
        rows[row] = next((other for other in after if other not in unreadable), -1)
    return rows
