"""The arguments of an axis value: how their text is read and which values are valid. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from kernelbank.errors import SpecError
from kernelbank.spec.text import finite, number, read_number


@dataclass(frozen=True)
class Channels:
    """A number tied to the width C: ``times * C / per`` (``C``, ``4C``, ``C/16``)."""

    times: int = 1
    per: int = 1

    def of(self, dim: int) -> int:
        """Return the number at width `dim`. Raises: SpecError: If `per` does not divide it."""
        if dim % self.per:
            raise SpecError(f"invalid dim={dim}: {self} is not a whole number; expected a multiple of {self.per}")
        return self.times * dim // self.per

    def __str__(self) -> str:
        return ("" if self.times == 1 else str(self.times)) + "C" + ("" if self.per == 1 else f"/{self.per}")


HOST: Literal["host"] = "host"
ALTERNATE: Literal["alternate"] = "alternate"


@dataclass(frozen=True)
class Argument:
    """What an argument accepts: `expected` in words, `read` parses its text (raises ValueError), `accepts` checks a
    value."""

    expected: str
    read: Callable[[str], object]
    accepts: Callable[[object], bool]


def is_whole(value: object, minimum: int) -> TypeGuard[int]:
    """Whether a value is an integer of at least `minimum`, booleans excluded."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def read_whole(text: str) -> int:
    """Read an integer of at most nine ASCII digits. Raises: ValueError: If the text is anything else."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise ValueError(text)
    return int(text)


def whole(minimum: int) -> Argument:
    """Accept whole numbers of at least `minimum`."""
    return Argument(f"a whole number >= {minimum}", read_whole, lambda value: is_whole(value, minimum))


def one_of(*words: str) -> Argument:
    """Accept one of `words`."""
    return Argument(" or ".join(words), str, lambda value: value in words)


def either(first: Argument, second: Argument) -> Argument:
    """Accept what `first` or `second` accepts."""

    def read(text: str) -> object:
        for argument in (first, second):
            try:
                value = argument.read(text)
            except ValueError:
                continue
            if argument.accepts(value):
                return value
        raise ValueError(text)

    return Argument(f"{first.expected}, or {second.expected}", read,
                    lambda value: first.accepts(value) or second.accepts(value))  # fmt: skip


def read_switch(text: str) -> bool:
    """Read ``True`` or ``False``. Raises: ValueError: If the text is anything else."""
    try:
        return {"True": True, "False": False}[text]
    except KeyError:
        raise ValueError(text) from None


def _read_multiple(text: str) -> Channels:
    if not text.endswith("C"):
        raise ValueError(text)
    return Channels(times=read_whole(text[:-1]) if text != "C" else 1)


def _read_fraction(text: str) -> Channels:
    width, slash, per = text.partition("/")
    if width != "C" or not slash:
        raise ValueError(text)
    return Channels(per=read_whole(per))


def _read_linear(text: str) -> None:
    if text != "linear":
        raise ValueError(text)


COUNT = whole(1)
MULTIPLE = Argument(
    "a multiple of the width such as 4C",
    _read_multiple,
    lambda v: isinstance(v, Channels) and v.per == 1 and v.times >= 1,
)
FRACTION = Argument(
    "a fraction of the width such as C/16",
    _read_fraction,
    lambda v: isinstance(v, Channels) and v.times == 1 and v.per >= 2,
)
WIDTH = Argument("C", _read_multiple, lambda v: v == Channels())
KERNELS = either(COUNT, MULTIPLE)
GROUPS = either(either(COUNT, FRACTION), one_of(HOST))
HEADS = either(GROUPS, WIDTH)
CHANNEL_GROUPS = replace(GROUPS, expected=f"{GROUPS.expected} (one group per channel is written depthwise)")
REDUCTION = either(Argument("linear", _read_linear, lambda v: v is None), COUNT)
SHIFT = either(whole(0), one_of(ALTERNATE))
SWITCH = Argument("True or False", read_switch, lambda v: isinstance(v, bool))
NEIGHBORS = Argument(
    "an odd number >= 3 (for M = 1 write self)", read_whole, lambda v: is_whole(v, 3) and v % 2 == 1,
)  # fmt: skip
POSITIVE = Argument("a finite number > 0", read_number, lambda v: finite(v) and v > 0)


def show_argument(value: object) -> str:
    """The shortest text that reads back to the argument; None is ``linear``."""
    if value is None:
        return "linear"
    return number(value) if isinstance(value, float) else str(value)
