"""Values that are set for a with block, in one thread and one task."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch.torch_version import TorchVersion

T = TypeVar("T")

TRACEABLE = TorchVersion(torch.__version__) >= "2.14"
"""Whether torch.compile traces a ContextVar and compiles again when its value differs."""


class Scope(Generic[T]):
    """A value per thread and task. A graph compiled under one value is not used under another.

    Before torch 2.14, torch.compile cannot trace a ContextVar: while it compiles, it reads the value that was entered
    last in the process. Eager calls are per thread and task with every torch.
    """

    def __init__(self, name: str, default: T) -> None:
        self._variable = ContextVar(name, default=default)
        self._entered = [default]

    def get(self) -> T:
        """Return the value of the innermost open block of this thread and task."""
        if not TRACEABLE and torch.compiler.is_compiling():
            return self._entered[-1]
        return self._variable.get()

    @contextmanager
    def entered(self, value: T) -> Iterator[None]:
        """Set the value until the end of the block."""
        token = self._variable.set(value)
        self._entered.append(value)
        try:
            yield
        finally:
            self._entered.remove(value)
            self._variable.reset(token)


class ForkSafeLock:
    """A lock of a process-wide cache. In a forked child it is released, whichever thread of the parent held it."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
