"""A study: rows that change cells of the mixers of a host model, one of them the baseline, and questions. Imports no
torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kernelbank.errors import SpecError
from kernelbank.model import ModelSpec, by_stage
from kernelbank.spec import MixerSpec, Window
from kernelbank.zoo import find

Grid = tuple[int, int]


@dataclass(frozen=True)
class StudyRow:
    """A row: its label, what it isolates, and the cells that it changes in the mixers of a host model.

    Two placeholders depend on the host and the stage: ``{window}`` stands for its windows, or for windows of half its
    grid if it has none, and ``{extent}`` for the number of offsets along the longer side of its grid, 2 n - 1.
    """

    label: str
    what: str
    cells: str

    def cells_at(self, mixer: MixerSpec, grid: Grid) -> str:
        """Return the cells of the row in a stage whose host mixer is `mixer`, on a `grid` of (H, W) positions."""
        side = max(grid)
        own = isinstance(mixer.support, Window)
        window = mixer.text["support"] if own else f"window({max(2, -(-side // 2))}, alternate)"
        return self.cells.format(window=window, extent=2 * side - 1)

    def mixers(self, stages: Sequence[tuple[MixerSpec, Grid]]) -> str:
        """Return the text of the mixers of this row in a host with `stages` of (mixer, grid).

        Raises:
            SpecError: If the cells cannot be combined with the other cells of the host.
        """
        return by_stage([str(self._mixer(mixer, grid)) for mixer, grid in stages])

    def _mixer(self, host: MixerSpec, grid: Grid) -> MixerSpec:
        cells = self.cells_at(host, grid)
        mixer = MixerSpec.parse(cells, host)
        if mixer.resets:
            reset = mixer.resets[0]
            raise SpecError(f"invalid {cells} in a host with {reset.field}={reset.old}; expected cells that fit it")
        return mixer


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows that are compared with one of them, the baseline, in any host model, and the questions that they answer.

    Raises:
        ValueError: If labels are not unique, or do not include the baseline.
    """

    name: str
    title: str
    questions: tuple[str, ...]
    baseline: str
    rows: tuple[StudyRow, ...]

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels) or self.baseline not in self.labels:
            raise ValueError(f"study {self.name}: labels must be unique and include the baseline")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the rows, in order."""
        return tuple(row.label for row in self.rows)

    def row(self, label: str) -> StudyRow:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)


def changed(host: ModelSpec, row: StudyRow) -> ModelSpec:
    """Return `host`, a model of ours, with the cells of `row` in its mixers.

    Raises:
        SpecError: If the cells cannot be combined in one of its stages, or for a stock model of timm.
    """
    return replace(host, mixer=row.mixers([(stage.mixer, stage.grid) for stage in host.stages])).canonical()


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
