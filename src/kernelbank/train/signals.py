"""Ctrl-C and SIGTERM as a request to stop: training ends after the update, with a checkpoint. Imports no torch."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import NoReturn

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A request to stop. Calling it returns whether a signal was received."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells report it."""
        return 128 + (self.signal or signal.SIGINT)


class _Interrupt:
    """A handler that raises KeyboardInterrupt, as Python's does, and keeps that it was called."""

    received = False

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.received = True
        raise KeyboardInterrupt


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Keep Ctrl-C for `stop_on_signal`. Python discards exceptions that are raised in destructors and in callbacks of
    weak references, of which importing has many, and a KeyboardInterrupt with them."""
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    if own:
        signal.signal(signal.SIGINT, _Interrupt())
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_on_signal(notify: Callable[[str], None] | None = None) -> Iterator[StopRequest]:
    """Catch the first SIGINT or SIGTERM inside the context; the second has its usual effect. `notify` is called with a
    line about the first at once, from a thread. A Ctrl-C that came before and was discarded counts, see
    `interrupts_kept`."""
    request, notify = StopRequest(), notify or (lambda _: None)

    def catch(number: int, _: FrameType | None) -> None:
        request.signal = number
        restore()

    before = {number: signal.getsignal(number) for number in CAUGHT}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, catch)
    try:
        with _notified(notify):
            if getattr(before[signal.SIGINT], "received", False):
                catch(signal.SIGINT, None)
                notify(_answer(signal.SIGINT))
            yield request
    finally:
        restore()


def _answer(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} received: stopping after the update that is running, with a checkpoint; again: at once"


@contextmanager
def _notified(notify: Callable[[str], None]) -> Iterator[None]:
    """Call `notify` when the first signal arrives. Python runs signal handlers between two instructions of the main
    thread, that is after a backward pass, which may take minutes. The wakeup descriptor is written to at once."""
    reader, writer = socket.socketpair()

    def listen() -> None:
        while (number := reader.recv(1)[0]) and number not in CAUGHT:
            pass
        if number:
            notify(_answer(number))

    thread = Thread(target=listen, daemon=True)
    thread.start()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.send(b"\0")  # closing it is not enough, since worker processes have copies
        thread.join()
        writer.close()
        reader.close()
