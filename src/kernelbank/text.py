"""Text for people: suggestions, columns, and lines that are safe to print. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

LONGEST_LINE = 500


def suggest(word: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the option nearest to `word`, or the empty string if none is near."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines, each column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows)


def printable(text: object) -> str:
    r"""Return the text with every character that is not printable escaped, as a terminal escape (``\x1b``), a line
    break in a file name, or a byte of it that is not UTF-8. For names that come from files and from the user."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def one_line(text: object, longest: int = LONGEST_LINE) -> str:
    """Return the text as one printable line of at most `longest` characters, its white space collapsed."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= longest else line[: longest - 3] + "..."
