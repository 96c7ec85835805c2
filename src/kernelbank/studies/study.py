"""What a study is: rows of records in each skeleton, one of them the baseline, and questions. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kernelbank.atlas import SKELETONS
from kernelbank.spec import MixerSpec, read_stages

WINDOW = "support=window(2, alternate)"
"""Swin's windows on the 4 x 4 grid of the hierarchical skeleton: half of it."""


@dataclass(frozen=True)
class StudyRow:
    """One row: its label, what it isolates, and its mixer as text in each skeleton."""

    label: str
    what: str
    mixers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of rows x skeletons and the questions it answers. `quick` are the labels of the short version.

    Raises SpecError for a mixer that is no record, ValueError for labels that do not fit together.
    """

    name: str
    title: str
    questions: tuple[str, ...]
    baseline: str
    rows: tuple[StudyRow, ...]
    quick: tuple[str, ...]
    mlp: str = "ffn"

    def __post_init__(self) -> None:
        labels = [row.label for row in self.rows]
        if len(set(labels)) < len(labels) or not {self.baseline, *self.quick} <= set(labels):
            raise ValueError(f"study {self.name}: labels must be unique and hold the baseline and the quick rows")
        for row in self.rows:
            for skeleton, mixer in row.mixers.items():
                stages(skeleton, mixer)

    @property
    def skeletons(self) -> tuple[str, ...]:
        """The skeletons that the rows have mixers for."""
        return tuple(dict.fromkeys(skeleton for row in self.rows for skeleton in row.mixers))

    def row(self, label: str) -> StudyRow:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)


def stages(skeleton: str, mixer: str) -> tuple[MixerSpec, ...]:
    """The record of every stage of `skeleton`."""
    return read_stages(mixer, len(SKELETONS[skeleton].dims))


def canonical(skeleton: str, mixer: str) -> str:
    """`mixer` as the records print themselves, once if all stages share it."""
    texts = [str(spec) for spec in stages(skeleton, mixer)]
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)


def activation_rows(rows: Iterable[tuple[str, str, str]]) -> tuple[StudyRow, ...]:
    """Rows from (label, activation, what it isolates), in `vit_relpos` and in `swin` with `WINDOW`."""
    return tuple(
        StudyRow(label, what, both(f"vit_relpos activation={steps}", f"swin {WINDOW} activation={steps}"))
        for label, steps, what in rows
    )


def both(plain: str, hierarchical: str) -> Mapping[str, str]:
    """The mixers of a row in the two skeletons."""
    return MappingProxyType({"plain": plain, "hierarchical": hierarchical})
