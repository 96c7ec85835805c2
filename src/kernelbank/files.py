"""Files that are either complete or absent: written under another name, then renamed. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

from kernelbank.errors import InputError

TEMPORARY = ".tmp"
_STALE = re.compile(rf"\.\d+{re.escape(TEMPORARY)}$")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, flush the file to the disk and rename it to `path`.

    A process that is killed leaves the old file or the new one, and at worst a ``*.tmp`` beside it.

    Raises: OSError: If a step fails; it names `path`.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        beside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 by `replace_file`."""
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def set_aside(path: Path) -> Path:
    """Rename `path` to ``<name>.broken``, or ``<name>.broken.2`` and so on if that exists, and return the new path."""
    first = path.with_name(path.name + ".broken")
    others = (first.with_name(f"{first.name}.{index}") for index in count(2))
    aside = first if not first.exists() else next(other for other in others if not other.exists())
    path.rename(aside)
    return aside


def writable_folder(path: Path) -> Path:
    """Create the folder `path` with its parents and return it. Raises: InputError: If it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"invalid out={path}: it cannot be written to ({error.strerror or error}); expected another folder"
        ) from None
    return path


@contextmanager
def sole_user(folder: Path, outputs: Iterable[str] = (), part: str | None = None) -> Iterator[None]:
    """Lock `folder` against other processes, and delete the temporary files that killed processes left in it.

    `outputs` are glob patterns, below `folder`, of the files that `replace_file` writes there; only their temporary
    files are deleted. With a `part`, the folder is shared with the users of other parts, and nothing is deleted. The
    lock ends with the process, however it ends.

    Raises: InputError: If another process has locked the folder, or the part.
    """
    with ExitStack() as stack:
        stack.enter_context(_locked(folder / ".lock", folder, shared=part is not None))
        if part is not None:
            stack.enter_context(_locked(folder / f".lock-{part}", folder, shared=False))
            yield
            return
        for pattern in outputs:
            for left in folder.glob(f"{pattern}.*{TEMPORARY}"):
                if _STALE.search(left.name) and left.is_file() and not left.is_symlink():
                    left.unlink(missing_ok=True)
        yield


@contextmanager
def _locked(path: Path, folder: Path, shared: bool) -> Iterator[None]:
    """Hold the lock at `path`. Raises InputError, naming `folder`."""
    with path.open("a") as lock:
        if sys.platform != "win32":  # Windows has no flock: two writers at once stay possible
            import fcntl  # noqa: PLC0415

            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"invalid out={folder}: it is in use by another run; expected another folder"
                ) from None
        yield


def regular_file(path: Path) -> Path:
    """Return `path`, to be opened for reading. Raises OSError if it exists and is a pipe, a socket or a device, which
    would be waited for or never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path} is a pipe or a device; expected a regular file")
    return path


def read_json(path: Path) -> object:
    """Return the JSON document at `path`.

    Raises:
        ValueError: If the file is not JSON in UTF-8, is nested too deeply or does not fit in memory.
        OSError: If it cannot be read or is not a regular file.
    """
    try:
        return json.loads(regular_file(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except MemoryError:
        raise ValueError("a document that does not fit in memory") from None
    except UnicodeDecodeError:
        raise ValueError("expected JSON in UTF-8") from None
