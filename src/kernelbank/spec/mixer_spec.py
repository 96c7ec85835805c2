"""MixerSpec: a token mixer as nine cells, with its text, its JSON and the difference to another. Imports no torch.

A mixer is ``static conv -> dynamic conv(s) -> static conv``. The text of a spec is the name of a row of the atlas
followed by the cells that differ from it: ``"vit kernel=depthwise mix=mean"``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal

from kernelbank.atlas import ROWS
from kernelbank.errors import SpecError
from kernelbank.spec.arguments import ALTERNATE
from kernelbank.spec.axes import (
    AXES,
    All,
    Box,
    Depthwise,
    Dilated,
    Dynamic,
    Full,
    Grouped,
    Mean,
    Neighborhood,
    NoPosition,
    Own,
    Pool,
    Predict,
    Project,
    Relative,
    Rope,
    Stack,
    Static,
    TwoStep,
    Value,
    Window,
)
from kernelbank.spec.legality import RESETTABLE, invalid, is_valid, with_resets
from kernelbank.spec.pipeline import Pipeline, roles
from kernelbank.spec.text import words
from kernelbank.text import suggest

SPEC_VERSION = 1
LONGEST_VALUE = 500
CELLS = tuple(AXES)

Bank = Dynamic | Static | Box
Support = All | Window | Dilated | Neighborhood | Own
Mix = Stack | Mean | Pool | Project | Predict
Position = NoPosition | Relative | Rope
Kernel = TwoStep | Full | Depthwise | Grouped


@dataclass(frozen=True)
class Reset:
    """An inherited cell that no longer applied and was reset: its field, and its text before and after."""

    field: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new}"


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """The specification of a token mixer: one value per axis, of the types in `axes`.

    `resets` lists the inherited cells that `parse` reset; it takes no part in comparisons.

    Raises: SpecError: If a value is invalid, or the cells cannot be built together.
    """

    bank: Bank
    support: Support
    mix: Mix
    kernel: Kernel
    size: int
    activation: Pipeline
    position: Position
    frame: Literal["linear", "bn_relu", "bare"]
    bias: bool = True
    resets: tuple[Reset, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, axis in AXES.items():
            if not axis.accepts(getattr(self, name)):
                raise SpecError(f"invalid {name}={getattr(self, name)!r}; expected {axis.expected}")
        if not is_valid(self.cells):
            raise invalid(self.cells)

    @property
    def cells(self) -> dict[str, Any]:
        """The nine cells by field, as values."""
        return {name: getattr(self, name) for name in CELLS}

    @property
    def text(self) -> dict[str, str]:
        """The nine cells by field, as text."""
        return _show(self.cells)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the activation: normalisation, communication, non-linearity (paper, section 5.2)."""
        return roles(self.activation)

    # ---- text and JSON ----

    @classmethod
    def parse(cls, text: str, base: MixerSpec | None = None) -> MixerSpec:
        """Read a row name and overridden cells, or cells alone where a `base` is given.

        Inherited cells that no longer apply are reset (the smallest set of them, see `resets`), typed cells never are.

        Raises: SpecError: If a row, field or value is unknown, or the cells cannot be built together.
        """
        if not isinstance(text, str) or not (typed := words(text)):
            raise SpecError(f"invalid spec {text!r}; expected a row of the atlas and cells, such as 'vit size=3'")
        first, *rest = typed
        if "=" in first:
            if base is None:
                raise SpecError(f"invalid spec {text!r}: it has cells only; expected a row of the atlas before them, "
                                f"such as 'vit {text.strip()}'")  # fmt: skip
            return _override(base.cells, _read_words(typed))
        if first not in ROWS:
            raise SpecError(f"unknown row {first!r}{suggest(first, ROWS)}; expected one of {', '.join(ROWS)}")
        return _override(_row_cells(first), _read_words(rest))

    def override(self, **cells: str) -> MixerSpec:
        """Return this spec with cells replaced, as `parse` does: ``spec.override(kernel="depthwise")``."""
        return _override(self.cells, _read_cells(cells.items()))

    def __str__(self) -> str:
        row = min(ROWS, key=lambda name: _distance(self.cells, _row_cells(name)))
        cells = _row_cells(row)
        return " ".join([row, *(f"{n}={AXES[n].show(v)}" for n, v in self.cells.items() if v != cells[n])])

    def to_json(self) -> str:
        """Return a JSON object of cell texts, with a ``spec_version``."""
        return json.dumps({"spec_version": SPEC_VERSION, **self.text})

    @classmethod
    def from_json(cls, document: str | Mapping[str, object]) -> MixerSpec:
        """Read what `to_json` wrote, as text or as the object that it stands for.

        Raises: SpecError: If it is no JSON object, of another version, or has unknown, missing or invalid cells.
        """
        try:
            data = json.loads(document) if isinstance(document, str) else document
        except (ValueError, RecursionError) as error:
            raise SpecError(f"invalid spec: {error}; expected a JSON object") from None
        if not isinstance(data, Mapping):
            raise SpecError(f"invalid spec: expected a JSON object, got {type(data).__name__}")
        version = data.get("spec_version")
        if type(version) is not int or version != SPEC_VERSION:
            got = version if type(version) is int else type(version).__name__
            raise SpecError(f"invalid spec_version; expected {SPEC_VERSION}, got {got}")
        if missing := [name for name in CELLS if name not in data]:
            raise SpecError(f"invalid spec: {missing[0]} is missing; expected {', '.join(CELLS)}")
        texts = [(name, value) for name, value in data.items() if name != "spec_version"]
        return cls(**_read_cells(texts))

    # ---- reading ----

    def diff(self, other: MixerSpec) -> dict[str, tuple[str, str]]:
        """Return exactly the cells that differ: field -> (text here, text there)."""
        mine, theirs = self.text, other.text
        return {n: (mine[n], theirs[n]) for n in CELLS if getattr(self, n) != getattr(other, n)}

    def at_block(self, index: int) -> MixerSpec:
        """Return the spec of block `index`, counted inside its stage: an alternating shift is 0 in even blocks and
        M//2 in odd ones."""
        if isinstance(self.support, Window) and self.support.shift == ALTERNATE:
            return replace(self, support=replace(self.support, shift=self.support.M // 2 * (index % 2)))
        return self

    def check_resolved(self) -> None:
        """Raises: SpecError: If the shift of the windows depends on the block."""
        if isinstance(self.support, Window):
            _ = self.support.resolved_shift

    def explain(self) -> str:
        """Return the spec in words: its text, each cell, the roles of its activation, and what was reset."""
        lines = [str(self), *(f"  {name:<11}{value}" for name, value in self.text.items())]
        lines.append(f"  roles      {', '.join(self.roles) or 'none'}")
        lines += [f"  reset      {reset}" for reset in self.resets]
        return "\n".join(lines)


# ---- stages ----------------------------------------------------------------------------------------------


def read_stages(text: str, count: int, bases: Sequence[MixerSpec | None] = ()) -> tuple[MixerSpec, ...]:
    """Read one spec for all of `count` stages, or one per stage separated by ``|``: ``"dwnet | dwnet | swin | swin"``.
    Where `bases` are given, cells alone change the base of their stage.

    Raises: SpecError: If a spec is invalid, or the number of specs is neither 1 nor `count`.
    """
    pairs = zip(stage_texts(text, count), bases or (None,) * count, strict=True)
    return tuple(MixerSpec.parse(part, base) for part, base in pairs)


def read_mlps(text: str, count: int) -> tuple[MixerSpec | None, ...]:
    """Read the specs of the MLPs as `read_stages`; ``none`` stands for no MLP: ``"ffn"``, ``"none | ffn"``."""
    return tuple(None if part.strip() == "none" else MixerSpec.parse(part) for part in stage_texts(text, count))


def stage_texts(text: str, count: int) -> list[str]:
    """Return the text for each of `count` stages. Raises SpecError unless there is one text, or one per stage."""
    if not isinstance(text, str):
        raise SpecError(f"invalid spec {text!r}; expected text, such as 'vit activation=relu,count'")
    parts = text.split("|")
    if len(parts) not in (1, count):
        expected = "1 spec" if count == 1 else f"1 or {count} specs"
        raise SpecError(f"invalid specs {text!r}; expected {expected} for {count} stages, got {len(parts)}")
    return parts * (count if len(parts) == 1 else 1)


# ---- cells -----------------------------------------------------------------------------------------------


@cache
def _row_cells(row: str) -> Mapping[str, Any]:
    return _read_cells(ROWS[row].cells.items())


def _show(cells: Mapping[str, Any]) -> dict[str, str]:
    return {name: AXES[name].show(value) for name, value in cells.items()}


def _read_words(typed: Sequence[str]) -> dict[str, Any]:
    """Read ``field=value`` words. Raises: SpecError: If a word is no cell, or as `_read_cells`."""
    for cell in typed:
        if "=" not in cell:
            raise SpecError(f"invalid cell {cell!r}; expected FIELD=VALUE, with a field of {', '.join(CELLS)}")
    return _read_cells((name, value) for name, _, value in (cell.partition("=") for cell in typed))


def _read_cells(texts: Iterable[tuple[str, object]]) -> dict[str, Any]:
    """Read the texts of cells by field. Raises: SpecError: If one is unknown, repeated, empty, too long, no text or
    invalid."""
    cells: dict[str, Any] = {}
    for name, text in texts:
        if name not in AXES:
            raise SpecError(f"unknown field {name!r}{suggest(str(name), CELLS)}; expected one of {', '.join(CELLS)}")
        if name in cells:
            raise SpecError(f"invalid {name}={text}: {name} is typed twice; expected each field once")
        if not isinstance(text, str):
            raise SpecError(f"invalid {name}; expected text, got {type(text).__name__}")
        value = "".join(text.split())
        if not value:
            raise SpecError(f"invalid {name}: empty value; expected {AXES[name].expected}")
        if len(value) > LONGEST_VALUE:
            raise SpecError(f"invalid {name}: a value of {len(value)} characters; expected {AXES[name].expected}")
        cells[name] = AXES[name].read(value)
    return cells


def _override(inherited: Mapping[str, Any], typed: Mapping[str, Any]) -> MixerSpec:
    """`inherited` cells with `typed` cells on top, and those inherited ones reset that no longer apply."""
    before = {**inherited, **typed}
    cells = with_resets(before, typed)
    old, new = _show(before), _show(cells)
    resets = tuple(Reset(name, old[name], new[name]) for name in RESETTABLE if old[name] != new[name])
    return MixerSpec(**cells, resets=resets)


def _distance(cells: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[int, int, int]:
    """How far cells are from a row: the number of cells that differ, of those that differ in their word, and of
    arguments that differ in the others. So ``support=window(4, alternate)`` is nearer to ``swin`` than to ``vit``."""
    pairs = [(value, row[name]) for name, value in cells.items() if value != row[name]]
    arguments = sum(_differing_arguments(a, b) for a, b in pairs)
    return len(pairs), sum(_word(a) != _word(b) for a, b in pairs), arguments


def _word(value: object) -> object:
    """What a cell is, apart from its arguments: a value's word, the names of activation steps, a plain word. All
    sizes, and both values of bias, are of one word."""
    match value:
        case Value(word=word):
            return word
        case tuple():
            return tuple(step.name for step in value)
        case str():
            return value
        case _:
            return type(value)


def _differing_arguments(a: object, b: object) -> int:
    """The arguments that differ between values of one word; those that only one leaves at the default count twice."""
    if not isinstance(a, Value) or type(a) is not type(b):
        return 0
    pairs = [(getattr(a, f.name), getattr(b, f.name), f.default) for f in fields(a)]
    return sum(1 + (default in (x, y)) for x, y, default in pairs if x != y)
