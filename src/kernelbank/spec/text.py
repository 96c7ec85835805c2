"""The grammar of a spec's text: words, calls with arguments, numbers. Imports no torch."""

from __future__ import annotations

import math
from typing import TypeGuard

from kernelbank.errors import SpecError


def number(value: float) -> str:
    """Return the shortest text that reads back to the same float: ``1`` for 1.0, else its repr."""
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(float(value))


def finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold, booleans excluded."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def read_number(text: str) -> float:
    """Read a number in plain ASCII without underscores. Raises: ValueError: If it is anything else."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return float(text)


def split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside parentheses. Raises: SpecError: If parentheses are unbalanced."""
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
        raise SpecError(f"invalid text {text!r}; expected balanced parentheses")
    return parts


def words(text: str) -> list[str]:
    """Return the words of a spec's text; white space separates them outside parentheses and is dropped inside."""
    cleaned = "".join(" " if c.isspace() else c for c in text)
    return ["".join(part.split()) for part in split(cleaned, " ") if part.strip()]


def split_call(axis: str, text: str) -> tuple[str, str | None]:
    """Return ``word(inside)`` as (word, inside); inside is None without parentheses. Raises: SpecError: If text follows
    the closing parenthesis."""
    word, opened, rest = text.partition("(")
    if not opened:
        return word, None
    if not rest.endswith(")"):
        raise SpecError(f"invalid {axis}={text}; expected nothing after the closing parenthesis")
    return word, rest[:-1]
