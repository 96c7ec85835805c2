"""Files that are whole or absent: written beside and renamed, set aside instead of deleted. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

from kernelbank.errors import InputError

TEMPORARY = ".tmp"
_STALE = re.compile(rf"\.\d+{re.escape(TEMPORARY)}$")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then rename it over `path`.

    A process killed at any moment leaves the old file or the new one, and at worst a ``*.tmp`` beside it. An
    OSError names `path`, whatever step it comes from.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        write(beside)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        beside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with a text in UTF-8."""
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def set_aside(path: Path) -> Path:
    """Rename `path` to ``<name>.broken`` (``<name>.broken.2`` if taken, and so on), and return the new path."""
    first = path.with_name(path.name + ".broken")
    others = (first.with_name(f"{first.name}.{index}") for index in count(2))
    aside = first if not first.exists() else next(other for other in others if not other.exists())
    path.rename(aside)
    return aside


def writable_folder(path: Path) -> Path:
    """Create `path` with its parents. Raises InputError when it is not a folder that can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"out: {path} cannot be written to: {error.strerror or error}") from None
    return path


@contextmanager
def sole_user(folder: Path, outputs: Iterable[str] = ()) -> Iterator[None]:
    """Hold `folder` against other processes, and clear what killed ones left half-written of `outputs`, glob
    patterns below `folder` of the files that `replace_file` writes there: nothing else is ever deleted.

    The hold ends with the process, however it ends. Raises InputError when another process holds the folder.
    """
    with (folder / ".lock").open("a") as lock:
        if sys.platform != "win32":  # there is no flock there: two writers at once stay possible
            import fcntl  # noqa: PLC0415

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"out: {folder} is in use by another run") from None
        for pattern in outputs:
            for left in folder.glob(f"{pattern}.*{TEMPORARY}"):
                if _STALE.search(left.name) and left.is_file() and not left.is_symlink():
                    left.unlink(missing_ok=True)
        yield


def read_json(path: Path) -> object:
    """The JSON document at `path`.

    Raises:
        ValueError: If the file is not JSON in UTF-8, or is nested too deeply. OSError if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("expected JSON in UTF-8") from None
