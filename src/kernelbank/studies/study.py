"""What a study is: rows of specs in each of its models, one of them the baseline, and questions. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from kernelbank.model import ModelSpec
from kernelbank.zoo import find

WINDOW = "support=window(2, alternate)"
"""Swin's windows on the 4 x 4 grid of the hierarchical model: half of it."""


@dataclass(frozen=True)
class StudyRow:
    """One row: its label, what it isolates, and its mixer as text in each model, by the model's name."""

    label: str
    what: str
    mixers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of rows x models and the questions that it answers. `quick` are the labels of the short version.

    Raises:
        SpecError: If a mixer is not a spec.
        ValueError: If labels are not unique, or do not include the baseline and the quick rows.
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
            raise ValueError(f"study {self.name}: labels must be unique and include the baseline and the quick rows")
        for row in self.rows:
            for model in row.mixers:
                self.model(model, row)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models that the rows have mixers for."""
        return tuple(dict.fromkeys(model for row in self.rows for model in row.mixers))

    def model(self, name: str, row: StudyRow) -> ModelSpec:
        """The model `name` with the mixer of `row`, its specs as they print themselves."""
        return replace(find(name), mixer=row.mixers[name], mlp=self.mlp).canonical()

    def row(self, label: str) -> StudyRow:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)


def activation_rows(rows: Iterable[tuple[str, str, str]]) -> tuple[StudyRow, ...]:
    """Rows from (label, activation, what it isolates), in `vit_relpos` and in `swin` with `WINDOW`."""
    return tuple(
        StudyRow(label, what, both(f"vit_relpos activation={steps}", f"swin {WINDOW} activation={steps}"))
        for label, steps, what in rows
    )


def both(plain: str, hierarchical: str) -> Mapping[str, str]:
    """The mixers of a row in the two models."""
    return MappingProxyType({"plain": plain, "hierarchical": hierarchical})
