"""Unpack an archive of images once, completely or not at all, and never outside its folder. Imports no torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from kernelbank.errors import InputError
from kernelbank.files import read_json, regular_file, replace_text, set_aside

MARKER = ".kernelbank.json"
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")

Progress = Callable[[int, int], None]
"""A function of the bytes of the archive that were read so far and of its size in bytes."""


def is_archive(path: Path) -> bool:
    """Whether the name is that of a tar archive."""
    return path.name.lower().endswith(SUFFIXES)


def unpacked(archive: Path, cache: Path, progress: Progress | None = None) -> tuple[Path, str]:
    """Unpack `archive` below `cache` on the first call. Return the folder with its contents and the SHA-256 of the
    archive.

    Raises:
        InputError: If the archive cannot be read, or a member is outside the target folder or neither a file nor a
            folder. Nothing is left in the cache then.
    """
    try:
        stat = archive.stat()
    except OSError as error:
        raise InputError(f"data: {archive} cannot be read: {error.strerror or error}") from None
    state = f"{archive.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    stem = archive.name.split(".")[0]
    target = cache / f"{stem}-{hashlib.sha256(state.encode()).hexdigest()[:10]}"
    if (digest := _marked(target / MARKER)) is not None:
        return target, digest
    if target.exists():
        set_aside(target)
    _clear(cache, target.name)
    beside = cache / f"{target.name}.{os.getpid()}.partial"
    try:
        beside.mkdir(parents=True)
        digest = _extract(archive, beside, stat.st_size, progress)
        replace_text(beside / MARKER, json.dumps({"archive": archive.name, "sha256": digest}) + "\n")
        beside.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target, digest


def _marked(marker: Path) -> str | None:
    """Return the SHA-256 in the marker of an unpacked archive, or None if the marker is missing or damaged."""
    try:
        document = read_json(marker)
    except (OSError, ValueError):
        return None
    digest = document.get("sha256") if isinstance(document, dict) else None
    return digest if isinstance(digest, str) else None


def _clear(cache: Path, name: str) -> None:
    """Remove the incomplete folders of killed processes."""
    for left in cache.glob(f"{name}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class _Reading(io.RawIOBase):
    """A file whose bytes are hashed and counted as they are read, in order."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self.file, self.progress, self.count, self.digest = file, progress, 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.count += len(block)
        self.progress(self.count)
        return block


def _extract(archive: Path, target: Path, size: int, progress: Progress | None) -> str:
    report = (lambda count: None) if progress is None else (lambda count: progress(count, size))
    try:
        with regular_file(archive).open("rb") as file:
            reading = _Reading(file, report)
            with tarfile.open(fileobj=reading, mode="r|*") as tar:
                for member in tar:
                    if not (member.isfile() or member.isdir()):
                        raise InputError(f"data: {archive} holds {member.name!r}, neither a file nor a folder")
                    tar.extract(member, target, filter="data")
            while reading.read(1 << 20):  # the bytes after the end mark belong to the hash
                pass
            return reading.digest.hexdigest()
    except tarfile.FilterError as error:
        raise InputError(f"data: {archive} is refused: {error}") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"data: {archive} is not a whole tar archive: {error or type(error).__name__}") from None
