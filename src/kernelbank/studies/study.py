"""A study: rows that change cells of the mixers of a host model, one of them the baseline, and questions. Imports no
torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kernelbank.atlas import ROWS
from kernelbank.errors import SpecError
from kernelbank.model import ModelSpec, by_stage
from kernelbank.spec import MixerSpec, Window
from kernelbank.spec.text import number, words
from kernelbank.zoo import find

Grid = tuple[int, int]
PUBLISHED_SIDE = 7
"""The side of NAT's neighborhoods, as published."""


@dataclass(frozen=True)
class FineTuning:
    """Training that goes on for `epochs` from the weights at the end of the runs of another row, seed by seed."""

    row: str
    epochs: int


@dataclass(frozen=True)
class StudyRow:
    """One row: its label, what it isolates, and the cells that it changes in the mixers of a host model, or a row of
    the atlas, with cells, that replaces them. `mlp` is the spec of the MLPs, or ``none``; without one the host keeps
    its own. A row with `fine_tuning` starts from the weights of another row, whose mixers are replaced by its own.

    Words in braces stand for what depends on the host, stage by stage. In `cells`: ``{window}`` for its own windows, or
    windows of half its grid where it has none; ``{neighborhood}`` for the side of a neighborhood, 7, or the largest odd
    number below the longer side of a grid of at most 7, but at least 3; ``{extent}`` for the number of offsets along
    that side, 2 n - 1; ``{quarter}`` for a quarter of the positions; ``{scale}`` for the factor at which the outputs of
    the mixers are as large, at the start, as those of the baseline (see `post_scale`), or 1. In `mlp`: ``{mixer}`` for
    the row's own mixer.
    """

    label: str
    what: str
    cells: str
    mlp: str = ""
    fine_tuning: FineTuning | None = None

    @property
    def scaled(self) -> bool:
        """Whether the row has a factor that is measured before training."""
        return "{scale}" in self.cells

    def cells_at(self, mixer: MixerSpec, grid: Grid, scale: float = 1.0) -> str:
        """The cells in a stage whose host mixer is `mixer`, on a `grid` of (H, W) positions."""
        side = max(grid)
        own = isinstance(mixer.support, Window)
        return self.cells.format(
            window=mixer.text["support"] if own else f"window({max(2, -(-side // 2))}, alternate)",
            neighborhood=min(PUBLISHED_SIDE, max(3, side // 2 * 2 - 1)),
            extent=2 * side - 1,
            quarter=max(1, grid[0] * grid[1] // 4),
            scale=number(scale),
        )

    def mixers(self, stages: Sequence[tuple[MixerSpec, Grid]], scales: Sequence[float] = ()) -> list[MixerSpec]:
        """The mixers of this row in a host with `stages` of (mixer, grid), with one of `scales` for each stage.

        Raises:
            SpecError: If the cells cannot be combined with the other cells of the host.
        """
        factors = scales or [1.0] * len(stages)
        return [self._mixer(*stage, scale) for stage, scale in zip(stages, factors, strict=True)]

    def stated(self) -> dict[str, str]:
        """The cells that the row states, by field, with the words in braces; those of a row of the atlas included."""
        first, *rest = words(self.cells)
        cells = dict(ROWS[first].cells) if first in ROWS else {}
        return cells | dict(word.split("=", 1) for word in (rest if first in ROWS else [first, *rest]))

    def _mixer(self, host: MixerSpec, grid: Grid, scale: float) -> MixerSpec:
        cells = self.cells_at(host, grid, scale)
        mixer = MixerSpec.parse(cells, host)
        if mixer.resets:
            reset = mixer.resets[0]
            raise SpecError(f"invalid {cells} in a host with {reset.field}={reset.old}; expected cells that fit it")
        return mixer


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows that are compared with one of them, the baseline, in any host model, and the questions that they answer.

    Raises:
        ValueError: If labels are not unique, or do not include the baseline; if a row starts from the weights of no row
            of the study, or of one that is fine-tuned itself.
    """

    name: str
    title: str
    questions: tuple[str, ...]
    baseline: str
    rows: tuple[StudyRow, ...]

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels) or self.baseline not in self.labels:
            raise ValueError(f"study {self.name}: labels must be unique and include the baseline")
        trained = {row.label for row in self.rows if row.fine_tuning is None}
        if wrong := [row.label for row in self.rows if row.fine_tuning and row.fine_tuning.row not in trained]:
            raise ValueError(f"study {self.name}: row {wrong[0]} must start from a row that is trained from scratch")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the rows, in order."""
        return tuple(row.label for row in self.rows)

    def row(self, label: str) -> StudyRow:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)

    def with_starts(self, labels: Iterable[str]) -> tuple[StudyRow, ...]:
        """The rows of these labels, and those whose weights they start from, in order."""
        chosen = set(labels)
        starts = {row.fine_tuning.row for row in self.rows if row.label in chosen and row.fine_tuning}
        return tuple(row for row in self.rows if row.label in chosen | starts)


def changed(
    host: ModelSpec,
    row: StudyRow,
    stages: Sequence[tuple[MixerSpec, Grid]] | None = None,
    scales: Sequence[float] = (),
) -> ModelSpec:
    """`host` with the mixers, and the MLPs, of `row`; its specs as they print themselves. A stock model of timm needs
    its `stages` of (mixer, grid); `scales` has the factor of each stage.

    Raises:
        SpecError: If the cells cannot be built together in one of its stages, or for MLPs in a stock model of timm.
    """
    if stages is None:
        stages = [(stage.mixer, stage.grid) for stage in host.stages]
    mixers = [str(mixer) for mixer in row.mixers(stages, scales)]
    mlp = by_stage([row.mlp.format(mixer=mixer) for mixer in mixers]) if row.mlp else host.mlp
    return replace(host, mixer=by_stage(mixers), mlp=mlp).canonical()


def named_host(name: str, cells: str = "") -> ModelSpec:
    """Return the model `name` of the zoo with `cells` changed in its mixers. Raises SpecError."""
    host = find(name).canonical()
    return changed(host, StudyRow("", "", cells)) if cells else host


def activation_rows(rows: Iterable[tuple[str, str, str]], position: str = "relative") -> tuple[StudyRow, ...]:
    """Return rows from (label, activation, what it isolates), all with the same `position`."""
    return tuple(StudyRow(label, what, f"position={position} activation={steps}") for label, steps, what in rows)


def holds(host: ModelSpec, row: StudyRow) -> bool:
    """Whether `row` can be built in `host`, a model of ours."""
    try:
        changed(host, row)
    except SpecError:
        return False
    return True
