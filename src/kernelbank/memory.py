"""The memory that a request needs, checked before anything is allocated. Imports no torch."""

from __future__ import annotations

import os

from kernelbank.errors import InputError

ITEMSIZE = 4
"""The bytes of a number in float32."""
UNKNOWN = 2**40
"""The bytes that are assumed where the system does not say how many it has."""


def total_memory() -> int:
    """Return the bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return UNKNOWN


def check_memory(what: str, numbers: int) -> None:
    """Check that `numbers` float32 numbers fit in this machine's memory.

    Raises: InputError: If they do not; it names `what` with the estimate.
    """
    total = total_memory()
    if (size := ITEMSIZE * numbers) > total:
        raise InputError(f"{what} needs at least {_gib(size)} GiB; expected at most {_gib(total)} GiB, the memory of "
                         "this machine")  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}" if size < 2**1000 else "more than 1e290"
