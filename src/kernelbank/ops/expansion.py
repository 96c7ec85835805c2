"""What is made of parameters alone, kept between calls that want no gradient: a table as a matrix or a spectrum.

A kept value belongs to the tensors it was made of: it goes when they go, and is made anew when their values differ
from those it was made of, however they were changed. Nothing is added to a module or its state dict.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kernelbank.ops.transforms import recorded, transformed

LARGEST = 64 * 2**20
"""Bytes of the largest value that is kept."""
MOST = 16
"""How many values are kept for one table."""


@dataclass
class _Kept:
    """The tensors' values when the expansions were made, and the expansions by what they are."""

    sources: tuple[Tensor, ...]
    made: dict[Hashable, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, what: Hashable, made: Tensor) -> None:
        """Keep one more; the oldest goes if they are MOST."""
        with self.lock:
            if len(self.made) >= MOST:
                self.made.pop(next(iter(self.made)))
            self.made[what] = made


_KEPT = WeakIdKeyDictionary()
_LOCK = threading.Lock()


def expanded(tables: tuple[Tensor, ...], what: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, which depends on `tables` and `what` alone; kept for the next call where no gradient is wanted."""
    if not _may_keep(tables):
        return make()
    home = tables[0].untyped_storage()  # a weak reference to the tensor would stop torch from swapping parameters
    with _LOCK:
        entry = _KEPT.get(home)
    if entry is None or not _same(entry.sources, tables):
        entry = _Kept(tuple(table.detach().clone() for table in tables))
        with _LOCK:
            _KEPT[home] = entry
    made = entry.made.get(what)
    if made is None:
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        if made.numel() * made.element_size() <= LARGEST:
            entry.keep(what, made)
    return made


def _may_keep(tables: tuple[Tensor, ...]) -> bool:
    """Not for compilers, tracing and transforms, which would leave their own tensors behind; nor off the CPU, where
    comparing values waits."""
    if recorded() or transformed():
        return False
    if any(table.device.type != "cpu" for table in tables):
        return False
    return not (torch.is_grad_enabled() and any(table.requires_grad for table in tables))


def _same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
