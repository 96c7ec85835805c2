"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from kernelbank.data.dataset import Dataset
from kernelbank.data.digits import digits
from kernelbank.errors import InputError
from kernelbank.text import suggest

DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def load(name: str) -> Dataset:
    """The data set `name`. Raises InputError when there is none of this name."""
    if name not in DATASETS:
        raise InputError(f"data: unknown data set {name!r}{suggest(name, DATASETS)}; legal: {', '.join(DATASETS)}")
    return DATASETS[name]()
