"""The small grammar under every record's text: words, calls with arguments, numbers, suggestions. No torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import TypeGuard


class SpecError(ValueError):
    """A record, cell or value that is not legal. The message names the field, the value and what is legal."""


def suggest(word: str, options: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the option nearest to `word`, else the empty string."""
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def number(value: float) -> str:
    """The shortest text that reads back to the same float: ``1`` for 1.0, else its repr."""
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(float(value))


def finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold, booleans excluded."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def read_number(text: str) -> float:
    """A number in plain ASCII without underscores. Raises ValueError."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return float(text)


def split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside parentheses. Raises SpecError on unbalanced parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise SpecError(f"unbalanced parentheses in {text!r}")
    return parts


def words(text: str) -> list[str]:
    """The words of a record's text: white space separates them outside parentheses and is dropped inside."""
    cleaned = "".join(" " if c.isspace() else c for c in text)
    return ["".join(part.split()) for part in split(cleaned, " ") if part.strip()]


def split_call(axis: str, text: str) -> tuple[str, str | None]:
    """``word(inside)`` as (word, inside); inside is None without parentheses."""
    word, opened, rest = text.partition("(")
    if not opened:
        return word, None
    if not rest.endswith(")"):
        raise SpecError(f"{axis}: {text} is not legal; nothing may follow the closing parenthesis")
    return word, rest[:-1]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, each column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows)
