"""Words for people: suggestions and columns. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def suggest(word: str, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the option nearest to `word`, else the empty string."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, each column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows)
