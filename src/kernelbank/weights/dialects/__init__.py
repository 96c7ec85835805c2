"""The dialects, one file per library, in the order in which state dicts are matched."""

from __future__ import annotations

from collections.abc import Collection

from kernelbank.errors import InputError
from kernelbank.text import suggest
from kernelbank.weights.dialects import (
    facebook,
    huggingface,
    huggingface_towers,
    kernelbank,
    microsoft,
    mmpretrain,
    timm,
    torchvision,
)
from kernelbank.weights.dialects.dialect import Dialect, MissingLibraryError
from kernelbank.weights.infer import Family
from kernelbank.weights.keymap import listed

__all__ = ["DIALECTS", "NAMES", "Dialect", "MissingLibraryError", "detect", "known", "named"]

DIALECTS: tuple[Dialect, ...] = (
    *timm.DIALECTS, *kernelbank.DIALECTS, *facebook.DIALECTS, *microsoft.DIALECTS, *torchvision.DIALECTS,
    *huggingface.DIALECTS, *huggingface_towers.DIALECTS, *mmpretrain.DIALECTS,
)  # fmt: skip
NAMES = tuple(dict.fromkeys(dialect.name for dialect in DIALECTS))


def detect(keys: Collection[str]) -> Dialect:
    """Return the dialect of a state dict with `keys`. Raises InputError if none or several match."""
    matching = [dialect for dialect in DIALECTS if dialect.matches(keys)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(f"the keys are of several dialects: {', '.join(dialect.name for dialect in matching)}")
    looked_for = ", ".join(dict.fromkeys(f"{d.marks[0]} ({d.owner})" for d in DIALECTS))
    raise InputError(f"unknown dialect with the keys {listed(keys) or '(none)'}; expected one with {looked_for}")


def known(name: str) -> str:
    """Return `name`. Raises InputError if it is not the name of a dialect."""
    if name not in NAMES:
        raise InputError(f"unknown dialect {name!r}{suggest(name, NAMES)}; expected one of {', '.join(NAMES)}")
    return name


def named(name: str, family: Family) -> Dialect:
    """Return the dialect of this name for a family. Raises InputError if there is none."""
    for dialect in DIALECTS:
        if (dialect.name, dialect.family) == (known(name), family):
            return dialect
    names = ", ".join(dialect.name for dialect in DIALECTS if dialect.family == family)
    raise InputError(f"{name} has no {family} models; expected one of {names}")
