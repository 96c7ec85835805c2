"""A wish to stop is heard at once, whatever the main thread computes."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from threading import Timer
from time import monotonic

import pytest

from kernelbank.train.signals import interrupts_kept, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_told_while_a_long_call_computes(number: int) -> None:
    told: list[tuple[str, float]] = []
    before = signal.getsignal(number), signal.set_wakeup_fd(-1)
    with stop_on_signal(lambda line: told.append((line, monotonic()))) as wish:
        Timer(0.1, os.kill, (os.getpid(), number)).start()
        hashlib.pbkdf2_hmac("sha512", b"", b"", 1_000_000)  # no handler of Python's runs before it returns
        done = monotonic()
    assert wish() and wish.exit_code == 128 + number
    ((line, when),) = told
    assert line.startswith(f"{signal.Signals(number).name} received: stopping after") and when < done
    assert (signal.getsignal(number), signal.set_wakeup_fd(-1)) == before


def test_nothing_is_told_where_nothing_comes() -> None:
    told: list[str] = []
    with stop_on_signal(told.append) as wish:
        assert not wish()
    assert not told


class Interrupted:
    """An object whose destructor is interrupted, where Python discards the exception."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10):  # the handler runs between two instructions
            pass


def test_an_interrupt_that_python_discards_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    discarded, told = list[object](), list[str]()
    monkeypatch.setattr(sys, "unraisablehook", lambda info: discarded.append(info.exc_type))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupts_kept():
        Interrupted()
        assert discarded == [KeyboardInterrupt]
        with stop_on_signal(told.append) as request:
            assert request() and request.exit_code == 130 and told[0].startswith("SIGINT received: stopping")
            with pytest.raises(KeyboardInterrupt):  # the second is not caught
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    """As in a job that a shell script started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_kept():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
