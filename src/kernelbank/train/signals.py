"""Ctrl-C and SIGTERM as a wish to stop: training ends after the update, with a checkpoint. Imports no torch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Wish:
    """Whether a signal asked to stop, and which; calling it says whether."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells report it."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def wish_to_stop() -> Iterator[Wish]:
    """Catch the first SIGINT or SIGTERM while the context is open; the second is as if there were none."""
    wish = Wish()

    def catch(number: int, _: FrameType | None) -> None:
        wish.signal = number
        restore()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, catch)
    try:
        yield wish
    finally:
        restore()
