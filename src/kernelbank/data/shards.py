"""WebDataset shards on local disks, read by position with an index of the images in each tar.

timm reads shards as a stream, with a shuffle buffer in each worker, and a note in its code states that several
processes may skip or repeat images in evaluation. Runs of this library are bit-exact because images are sampled by row.
Therefore the shards are indexed once and read like files. The layout is that of
https://github.com/webdataset/webdataset, and of timm's ``_info.json``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

from kernelbank.data.archive import Progress
from kernelbank.data.assemble import assemble
from kernelbank.data.dataset import Dataset
from kernelbank.data.images import Loading
from kernelbank.data.sources import SPLITS, check_classes
from kernelbank.errors import InputError
from kernelbank.files import read_json, regular_file, replace_text
from kernelbank.text import one_line

INFO = ("_info.json", "info.json")
IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
LAYOUT = "wds/FOLDER with train-0000.tar, ..., val-0000.tar, ..., or a pattern of such files: wds/x-{000..146}.tar"
_INDEX = 2
"""The version of the cached index."""


class Member(NamedTuple):
    """A file in a shard: the key of its sample, its extension, and the offset and size of its bytes."""

    key: str
    extension: str
    offset: int
    size: int


class Sample(NamedTuple):
    """An image in a shard: its name, the offset and size of its bytes, and its class."""

    name: str
    offset: int
    size: int
    label: int


@dataclass(frozen=True)
class Sharded:
    """The images of a split's shards: image `row` is `sizes[row]` bytes at `offsets[row]` of shard `places[row]`."""

    shards: tuple[Path, ...]
    names: tuple[str, ...]
    places: np.ndarray[Any, np.dtype[np.int64]]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, row: int) -> Image.Image:
        """Open the image. Raises the errors of Pillow and of the file."""
        with regular_file(self.shards[self.places[row]]).open("rb") as file:
            file.seek(int(self.offsets[row]))
            image = Image.open(io.BytesIO(file.read(int(self.sizes[row]))))
        image.load()
        return image

    def state(self) -> str | None:
        """The names, sizes and times of the shards."""
        try:
            stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.shards]
        except OSError:
            return None
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    def name(self, row: int) -> str:
        return f"{self.shards[self.places[row]].name}/{self.names[row]}"


def open_shards(text: str, loading: Loading, *, cache: Path, progress: Progress | None = None, **_: object) -> Dataset:
    """Open WebDataset shards, ``wds/FOLDER`` or ``wds/PATTERN``. Raises InputError."""
    splits = sharded_splits(text, cache, progress)
    return assemble(f"wds/{Path(text).name}", loading, splits.get)


def sharded_splits(text: str, cache: Path, progress: Progress | None = None) -> dict[str, Sharded]:
    """Return the splits of ``wds/FOLDER`` or ``wds/PATTERN`` by name. The index of the shards is cached below `cache`.

    The name of a class is its number in ``.cls``.

    Raises:
        InputError: If there are no shards or no train split, a shard cannot be read, a sample has no image or no label,
            a class has no images, or the classes of the splits differ.
    """
    by_split = _by_split(text, _shards(text))
    shards = [path for paths in by_split.values() for path in paths]
    samples = _cached_index(shards, cache, progress)
    splits: dict[str, Sharded] = {}
    for split, paths in by_split.items():
        sharded = _sharded(split, paths, [samples[path] for path in paths])
        if split == "train":
            _check_filled(text, sharded)
        else:
            check_classes(f"{text} {split}", sharded.classes, splits["train"].classes)
        splits[split] = sharded
    return splits


# ---- which shards --------------------------------------------------------------------------------------------


def _shards(text: str) -> dict[str | None, list[Path]]:
    """Return the shards of every split as ``_info.json`` states them, or all under None. Raises InputError."""
    where = Path(text.partition("/")[2]).expanduser()
    if not where.is_dir():
        _check_count(text, str(where))
        return {None: [path for part in braces(str(where)) for path in _matching(text, part)]}
    for name in INFO:
        if (where / name).is_file():
            return _by_info(where / name)
    shards = sorted(where.glob("*.tar"))
    if not shards:
        raise InputError(f"data: {where} holds no shard; expected {LAYOUT}")
    return {None: shards}


MOST_SHARDS, MOST_DIGITS = 1_000_000, 18


def _check_count(text: str, pattern: str) -> None:
    """Raise InputError for a pattern of too many shards, before it is expanded."""
    count = 1
    for inside in re.findall(r"\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
        if ends and max(map(len, ends.groups())) > MOST_DIGITS:
            raise InputError(f"data: {text}: invalid range {{{one_line(inside, 40)}}}; expected numbers of at most "
                             f"{MOST_DIGITS} digits")  # fmt: skip
        count *= max(int(ends[2]) - int(ends[1]) + 1, 0) if ends else inside.count(",") + 1
    if not 0 < count <= MOST_SHARDS:
        raise InputError(f"data: {text} stands for {count} shards; expected 1 to {MOST_SHARDS}")


def _matching(text: str, pattern: str) -> list[Path]:
    paths = sorted(map(Path, glob(pattern))) if has_magic(pattern) else [Path(pattern)]
    if not paths or not all(path.is_file() for path in paths):
        raise InputError(f"data: {text}: there is no file {pattern}; expected {LAYOUT}, on a local disk")
    return paths


def braces(pattern: str) -> Iterator[str]:
    """Expand a pattern as a shell does: ``{000..146}`` is a range and ``{a,b}`` a list."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    words = match[1].split(",")
    if ends:
        words = [f"{number:0{len(ends[1])}}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    for word in words:
        yield from braces(pattern[: match.start()] + word + pattern[match.end() :])


def _by_info(path: Path) -> dict[str | None, list[Path]]:
    """Return the splits of timm's ``_info.json``. Raises InputError."""
    try:
        stated = cast(Any, read_json(path))["splits"]
        splits = {str(name): [path.parent / file for file in split["filenames"]] for name, split in stated.items()}
        fields = {name: split["alt_label"] for name, split in stated.items() if split.get("alt_label")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"data: {path} states no splits with filenames ({type(error).__name__}: {error})") from None
    if fields:
        raise InputError(f"data: {path}: invalid alt_label={next(iter(fields.values()))!r}; expected labels in .cls")
    for file in (file for files in splits.values() for file in files):
        if not file.is_file():
            raise InputError(f"data: {path} names {file.name}, which does not exist")
    synonyms = {synonym: split for split, names in SPLITS.items() for synonym in names}
    return {synonyms[name]: files for name, files in splits.items() if name in synonyms and files}


def _by_split(text: str, shards: dict[str | None, list[Path]]) -> dict[str, list[Path]]:
    """Return the shards of the splits, train first. The name of a split is a word in the names of its files. If no file
    names a split, all are train. Raises InputError."""
    splits = {split: paths for split, paths in shards.items() if split is not None}
    for path in shards.get(None, []):
        splits.setdefault(_named_split(path) or "", []).append(path)
    if set(splits) == {""}:
        return {"train": splits[""]}
    if "" in splits:
        words = ", ".join(word for names in SPLITS.values() for word in names)
        raise InputError(f"data: {splits[''][0]} names no split, others do; expected one of {words} in every name")
    if "train" not in splits:
        raise InputError(f"data: {text} has no train split, only {', '.join(splits)}; expected {LAYOUT}")
    return {split: splits[split] for split in SPLITS if split in splits}


def _named_split(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((split for split, names in SPLITS.items() if set(names) & set(words)), None)


# ---- the contents of a shard ------------------------------------------------------------------------------------


def _members(path: Path) -> Iterator[Member]:
    """Yield the files of a shard. The key is the name up to the first dot in its last part, as in WebDataset."""
    with tarfile.open(regular_file(path), "r:") as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every one of them
            match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", info.name)
            if info.isfile() and match:
                yield Member(match[1], match[2].lower(), info.offset_data, info.size)


def _samples(path: Path) -> list[Sample]:
    """Return the images of a shard with their labels, in order. Raises InputError."""
    grouped: dict[str, dict[str, Member]] = {}
    try:
        for member in _members(path):
            if member.extension in grouped.setdefault(member.key, {}):
                raise InputError(f"data: {path} holds {member.key}.{member.extension} twice")
            grouped[member.key][member.extension] = member
        with path.open("rb") as file:
            extensions = {*IMAGES, LABEL}  # files without image and label are not samples, for instance a licence
            return [_sample(path, file, key, group) for key, group in grouped.items() if extensions & set(group)]
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"data: shard {path} is not a whole tar file, uncompressed: {error}") from None
    except OSError as error:
        raise InputError(f"data: shard {path} cannot be read: {error.strerror or error}") from None


def _sample(path: Path, file: io.BufferedReader, key: str, members: dict[str, Member]) -> Sample:
    image = next((members[extension] for extension in IMAGES if extension in members), None)
    names = ", ".join(f".{extension}" for extension in members)
    if image is None:
        raise InputError(f"data: sample {key} in {path} has no image, only {names}; expected .{', .'.join(IMAGES)}")
    if LABEL not in members:
        raise InputError(f"data: sample {key} in {path} has no label, only {names}; expected .{LABEL}, a class number")
    label = members[LABEL]
    file.seek(label.offset)
    text = file.read(label.size)
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise InputError(f"data: {key}.{LABEL} in {path} is {text[:20]!r}; expected a class number from 0 on")
    return Sample(f"{key}.{image.extension}", image.offset, image.size, int(text))


def _sharded(split: str, shards: list[Path], samples: list[list[Sample]]) -> Sharded:
    rows = [(place, *sample) for place, of_shard in enumerate(samples) for sample in of_shard]
    if not rows:
        raise InputError(f"data: the {len(shards)} shards of {split} hold no sample ({shards[0]} first)")
    places, names, offsets, sizes, labels = zip(*rows, strict=True)
    classes = tuple(map(str, sorted(set(labels))))
    where = [np.array(column, np.int64) for column in (places, offsets, sizes)]
    return Sharded(tuple(shards), names, where[0], where[1], where[2], labels, classes)


def _check_filled(text: str, train: Sharded) -> None:
    """Raise InputError if there is a class number without images below the largest."""
    greatest = max(train.labels)
    if len(train.classes) != greatest + 1:
        labels = set(train.labels)
        empty = next(label for label in range(greatest) if label not in labels)
        raise InputError(
            f"data: class {empty} of {text} holds no image ({greatest + 1 - len(labels)} of {greatest + 1} are empty); "
            "expected class numbers from 0 on without a gap"
        )


# ---- the cached index -----------------------------------------------------------------------------------------


def _read_index(index: Path, shards: list[Path]) -> dict[Path, list[Sample]] | None:
    """Return the samples of every shard in a cached index, or None if it is missing or damaged."""
    try:
        document = cast(Any, read_json(index))
        if document["sha256"] != _digest(document["samples"]):
            return None
        return {path: [Sample(*row) for row in rows] for path, rows in zip(shards, document["samples"], strict=True)}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _digest(samples: list[Any]) -> str:
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def _cached_index(shards: list[Path], cache: Path, progress: Progress | None) -> dict[Path, list[Sample]]:
    """Return the samples of every shard, from the index below `cache` if the shards are unchanged. Otherwise the shards
    are indexed, at about 50,000 files per second, and the index is cached."""
    try:
        stats = [path.stat() for path in shards]
    except OSError as error:
        raise InputError(f"data: shard {error.filename} cannot be read: {error.strerror or error}") from None
    state = [_INDEX, *((str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in zip(shards, stats, strict=True))]
    index = cache / f"shards-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}.json"
    if (known := _read_index(index, shards)) is not None:
        return known
    samples, done, size = {}, 0, sum(s.st_size for s in stats)
    for path, s in zip(shards, stats, strict=True):
        samples[path] = _samples(path)
        done += s.st_size
        if progress is not None:
            progress(done, size)
    cache.mkdir(parents=True, exist_ok=True)
    rows = list(samples.values())
    replace_text(index, json.dumps({"sha256": _digest(rows), "samples": rows}))
    return samples
