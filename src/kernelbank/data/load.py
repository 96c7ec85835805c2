"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, cast

from kernelbank.errors import InputError
from kernelbank.text import suggest

if TYPE_CHECKING:  # torch takes seconds to import, and the command line needs the names alone
    from kernelbank.data.dataset import Dataset

# name -> module:function that makes it
DATASETS: dict[str, str] = {"digits": "kernelbank.data.digits:digits"}


def check_name(name: str) -> None:
    """Raises InputError when there is no data set of this name."""
    if name not in DATASETS:
        raise InputError(f"data: unknown data set {name!r}{suggest(name, DATASETS)}; legal: {', '.join(DATASETS)}")


def load(name: str) -> Dataset:
    """The data set `name`. Raises InputError when there is none of this name."""
    check_name(name)
    module, _, function = DATASETS[name].partition(":")
    return cast("Callable[[], Dataset]", getattr(import_module(module), function))()
