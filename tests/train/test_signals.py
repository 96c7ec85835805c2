"""A wish to stop is heard at once, whatever the main thread computes."""

from __future__ import annotations

import hashlib
import os
import signal
from threading import Timer
from time import monotonic

import pytest

from kernelbank.train.signals import stop_on_signal


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
