"""WebDataset shards on local disks, read by position: an index of where every image lies in its tar.

timm's own reader of them is a stream: a shuffle buffer in each worker, and by its own note images left out or seen
twice when several processes evaluate. A run here is bit-exact because images are drawn by row, so the shards are
indexed once and read like files. Layout: https://github.com/webdataset/webdataset and timm's ``_info.json``.
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
from kernelbank.files import read_json, replace_file

INFO = ("_info.json", "info.json")
IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
LAYOUT = "wds/FOLDER with train-0000.tar, ..., val-0000.tar, ..., or a pattern of such files: wds/x-{000..146}.tar"
_INDEX = 1
"""The version of the kept index."""


class Member(NamedTuple):
    """A file in a shard: its sample's key, its extension, and where its bytes lie."""

    key: str
    extension: str
    offset: int
    size: int


class Sample(NamedTuple):
    """An image in a shard: its name in it, where its bytes lie, and its class."""

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
        """The image. Raises what Pillow and the file raise."""
        with self.shards[self.places[row]].open("rb") as file:
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
    """WebDataset shards, ``wds/FOLDER`` or ``wds/PATTERN``. Raises InputError."""
    splits = sharded_splits(text, cache, progress)
    return assemble(f"wds/{Path(text).name}", loading, splits.get)


def sharded_splits(text: str, cache: Path, progress: Progress | None = None) -> dict[str, Sharded]:
    """The splits of ``wds/FOLDER`` or ``wds/PATTERN``, by name; the index of their shards is kept below `cache`.

    Every class is a number in ``.cls`` and named by it. Raises InputError where there are no shards or no train split,
    for a shard that cannot be read, for a sample without image or label, for a class without images, and where the
    classes of the splits differ.
    """
    by_split = _by_split(text, _shards(text))
    shards = [path for paths in by_split.values() for path in paths]
    samples = _kept_index(shards, cache, progress)
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
    """The shards of every split as ``_info.json`` says it, or all under None. Raises InputError."""
    where = Path(text.partition("/")[2]).expanduser()
    if not where.is_dir():
        _check_count(text, str(where))
        return {None: [path for part in braces(str(where)) for path in _matching(text, part)]}
    for name in INFO:
        if (where / name).is_file():
            return _by_info(where / name)
    found = sorted(where.glob("*.tar"))
    if not found:
        raise InputError(f"data: {where} holds no shard; expected {LAYOUT}")
    return {None: found}


MOST_SHARDS = 1_000_000


def _check_count(text: str, pattern: str) -> None:
    """Raise InputError for a pattern of more shards than a data set has, before it is expanded."""
    count = 1
    for inside in re.findall(r"\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
        count *= max(int(ends[2][:30]) - int(ends[1][:30]) + 1, 1) if ends else inside.count(",") + 1
    if count > MOST_SHARDS:
        raise InputError(f"data: {text} stands for {count} shards; expected at most {MOST_SHARDS}")


def _matching(text: str, pattern: str) -> list[Path]:
    found = sorted(map(Path, glob(pattern))) if has_magic(pattern) else [Path(pattern)]
    if not found or not all(path.is_file() for path in found):
        raise InputError(f"data: {text}: there is no file {pattern}; expected {LAYOUT}, on a local disk")
    return found


def braces(pattern: str) -> Iterator[str]:
    """The words that a pattern stands for: ``{000..146}`` counts, ``{a,b}`` lists, as in a shell."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    words = found[1].split(",")
    if ends:
        words = [f"{number:0{len(ends[1])}}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    for word in words:
        yield from braces(pattern[: found.start()] + word + pattern[found.end() :])


def _by_info(path: Path) -> dict[str | None, list[Path]]:
    """The splits of timm's ``_info.json``. Raises InputError."""
    try:
        stated = cast(Any, read_json(path))["splits"]
        splits = {str(name): [path.parent / file for file in split["filenames"]] for name, split in stated.items()}
        fields = {name: split["alt_label"] for name, split in stated.items() if split.get("alt_label")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"data: {path} does not say splits with filenames ({type(error).__name__}: {error})") from None
    if fields:
        raise InputError(f"data: {path}: invalid alt_label={next(iter(fields.values()))!r}; expected labels in .cls")
    for file in (file for files in splits.values() for file in files):
        if not file.is_file():
            raise InputError(f"data: {path} names {file.name}, which is not there")
    synonyms = {synonym: split for split, names in SPLITS.items() for synonym in names}
    return {synonyms[name]: files for name, files in splits.items() if name in synonyms and files}


def _by_split(text: str, shards: dict[str | None, list[Path]]) -> dict[str, list[Path]]:
    """The shards of the splits, train first. A split is a word in the name of its files; where no file names one, all
    are train. Raises InputError."""
    found = {split: paths for split, paths in shards.items() if split is not None}
    for path in shards.get(None, []):
        found.setdefault(_named_split(path) or "", []).append(path)
    if set(found) == {""}:
        return {"train": found[""]}
    if "" in found:
        words = ", ".join(word for names in SPLITS.values() for word in names)
        raise InputError(f"data: {found[''][0]} names no split, other shards do; expected one of {words} in every name")
    if "train" not in found:
        raise InputError(f"data: {text} has no train split, only {', '.join(found)}; expected {LAYOUT}")
    return {split: found[split] for split in SPLITS if split in found}


def _named_split(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((split for split, names in SPLITS.items() if set(names) & set(words)), None)


# ---- what lies in a shard ------------------------------------------------------------------------------------


def _members(path: Path) -> Iterator[Member]:
    """The files of a shard; of a name up to the first dot of its last part is the key, as WebDataset has it."""
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every one of them
            found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", info.name)
            if info.isfile() and found:
                yield Member(found[1], found[2].lower(), info.offset_data, info.size)


def _samples(path: Path) -> list[Sample]:
    """The images of a shard with their labels, in its order. Raises InputError."""
    grouped: dict[str, dict[str, Member]] = {}
    try:
        for member in _members(path):
            if member.extension in grouped.setdefault(member.key, {}):
                raise InputError(f"data: {path} holds {member.key}.{member.extension} twice")
            grouped[member.key][member.extension] = member
        with path.open("rb") as file:
            wanted = {*IMAGES, LABEL}  # a group with neither is no sample: a licence, a table
            return [_sample(path, file, key, group) for key, group in grouped.items() if wanted & set(group)]
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"data: shard {path} is not a whole tar file, uncompressed: {error}") from None
    except OSError as error:
        raise InputError(f"data: shard {path} cannot be read: {error.strerror or error}") from None


def _sample(path: Path, file: io.BufferedReader, key: str, members: dict[str, Member]) -> Sample:
    image = next((members[extension] for extension in IMAGES if extension in members), None)
    there = ", ".join(f".{extension}" for extension in members)
    if image is None:
        raise InputError(f"data: sample {key} in {path} has no image, only {there}; expected .{', .'.join(IMAGES)}")
    if LABEL not in members:
        raise InputError(f"data: sample {key} in {path} has no label, only {there}; expected .{LABEL}, a class number")
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
    """Raises InputError for a class number below the greatest that no image has."""
    greatest = max(train.labels)
    if len(train.classes) != greatest + 1:
        there = set(train.labels)
        empty = next(label for label in range(greatest) if label not in there)
        raise InputError(
            f"data: class {empty} of {text} holds no image ({greatest + 1 - len(there)} of {greatest + 1} are empty); "
            "expected class numbers from 0 on without a gap"
        )


# ---- the index, kept -----------------------------------------------------------------------------------------


def _checked(sample: Sample) -> Sample:
    """`sample`, if it has the types of one. Raises ValueError."""
    if type(sample.name) is not str or not all(type(value) is int for value in sample[1:]):
        raise ValueError("not a sample")
    return sample


def _kept_index(shards: list[Path], cache: Path, progress: Progress | None) -> dict[Path, list[Sample]]:
    """The samples of every shard: read from the index below `cache` while the shards are as they were, else found in
    the shards (some 50,000 files a second) and kept."""
    try:
        stats = [path.stat() for path in shards]
    except OSError as error:
        raise InputError(f"data: shard {error.filename} cannot be read: {error.strerror or error}") from None
    state = [_INDEX, *((str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in zip(shards, stats, strict=True))]
    kept = cache / f"shards-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}.json"
    try:
        document = cast("list[list[Any]]", read_json(kept))
        return {path: [_checked(Sample(*row)) for row in rows] for path, rows in zip(shards, document, strict=True)}
    except (OSError, ValueError, TypeError):
        pass  # there is none, or it is damaged: it is made anew
    found, done, size = {}, 0, sum(s.st_size for s in stats)
    for path, s in zip(shards, stats, strict=True):
        found[path] = _samples(path)
        done += s.st_size
        if progress is not None:
            progress(done, size)
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(kept, lambda beside: beside.write_text(json.dumps(list(found.values())), encoding="utf-8"))
    return found
