"""Lines, tables and warnings on a terminal. Text from files and users is printed with control characters escaped."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from kernelbank.text import printable

WIDTH = 200
"""The columns of a table that is written to a file or a pipe."""


def table_console() -> Console:
    """Return a console for tables on standard output, in which nothing is markup."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=WIDTH)


def print_line(console: Console, *parts: str) -> None:
    """Print the parts that are not empty, separated by semicolons, as one line that is not wrapped."""
    line = "; ".join(filter(None, parts))
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


class _Warnings(logging.Handler):
    """Passes the text of every warning to a function."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show(record.getMessage())


@contextmanager
def warnings_to(show: Callable[[str], None]) -> Iterator[None]:
    """Pass the text of every warning that the package logs to `show` while the context is open."""
    logger, handler = logging.getLogger("kernelbank"), _Warnings(show)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def warn(text: str) -> None:
    """Print a line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)
