"""Tensors that are computed from parameters alone, such as the matrix or the spectrum of a relative table. They are
cached between calls without gradients.

An expansion belongs to the memory of the tensors it was computed from. It is dropped with that memory, and computed
again when their values have changed in any way. Nothing is added to a module or its state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kernelbank.ops.scope import ForkSafeLock
from kernelbank.ops.transforms import recorded, transformed

LARGEST = 64 * 2**20
"""The most bytes of an expansion that is cached."""
MOST = 16
"""The most expansions of one table."""


@dataclass
class _Entry:
    """The values of the tables that the expansions were computed from, and the expansions by key."""

    values: tuple[Tensor, ...]
    expansions: dict[Hashable, Tensor] = field(default_factory=dict)


# By storage and place in it: a weak reference to the tensor would stop torch from swapping parameters.
_CACHE = WeakIdKeyDictionary()
_LOCK = ForkSafeLock()


def expanded(tables: tuple[Tensor, ...], key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """Return `compute()`, which depends on `tables` and `key` alone, from the cache where no gradient is needed."""
    if not _is_cacheable(tables):
        return compute()
    entry = _entry(tables)
    with _LOCK:
        expansion = entry.expansions.get(key)
    if expansion is not None:
        return expansion
    with torch.inference_mode(False), torch.no_grad():
        expansion = compute()
    if expansion.numel() * expansion.element_size() <= LARGEST:
        with _LOCK:
            if len(entry.expansions) >= MOST:
                entry.expansions.pop(next(iter(entry.expansions)))
            entry.expansions[key] = expansion
    return expansion


def _entry(tables: tuple[Tensor, ...]) -> _Entry:
    """The entry of the tables, a new one if their values have changed."""
    storage, place = tables[0].untyped_storage(), (tables[0].storage_offset(), tables[0].shape)
    with _LOCK:
        entry = _CACHE.get(storage, {}).get(place)
    if entry is None or not _equal(entry.values, tables):
        entry = _Entry(tuple(table.detach().clone() for table in tables))
        with _LOCK:
            _CACHE.setdefault(storage, {})[place] = entry
    return entry


def _is_cacheable(tables: tuple[Tensor, ...]) -> bool:
    """Whether no gradient is needed and the values can be compared: not in graphs and under transforms, whose tensors
    end with them, and not off the CPU, where a comparison waits for the device."""
    if recorded() or transformed():
        return False
    if any(table.device.type != "cpu" for table in tables):
        return False
    return not (torch.is_grad_enabled() and any(table.requires_grad for table in tables))


def _equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )
