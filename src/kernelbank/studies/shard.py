"""A part of a study's runs, for schedulers that start the study several times. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from kernelbank.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1: every `count`-th run, starting with run `index`."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``K/N``. Raises UsageError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError("study", f"invalid --shard={text}; expected K/N with 1 <= K <= N, such as 1/4")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str | None:
        """The name of the files that this shard locks, or None for the whole study."""
        return None if self.count == 1 else f"{self.index}-of-{self.count}"

    def of(self, runs: Sequence[T]) -> tuple[T, ...]:
        """The runs of this shard."""
        return tuple(runs[self.index - 1 :: self.count])

    def __str__(self) -> str:
        return "" if self.count == 1 else f", shard {self.index} of {self.count}"


WHOLE = Shard()
