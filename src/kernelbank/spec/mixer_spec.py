"""MixerSpec: a token mixer as one record on nine axes, its legality, its text and JSON. Imports no torch.

A mixer is ``static conv -> dynamic conv(s) -> static conv``. The text of a record is the name of a row of the
atlas followed by the cells that differ: ``"vit kernel=depthwise mix=mean"``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import Any, Literal

from kernelbank.atlas import ROWS
from kernelbank.errors import SpecError
from kernelbank.spec.axes import (
    ALTERNATE,
    AXES,
    All,
    Box,
    Depthwise,
    Dynamic,
    Full,
    Grouped,
    Mean,
    Neighborhood,
    Own,
    Pool,
    Predict,
    Project,
    Stack,
    Static,
    TwoStep,
    Window,
)
from kernelbank.spec.pipeline import Pipeline, read_pipeline, roles
from kernelbank.spec.text import words
from kernelbank.text import suggest

SPEC_VERSION = 1
LONGEST_VALUE = 500
CELLS = tuple(AXES)
RESETTABLE = ("position", "activation", "mix", "support")

Bank = Dynamic | Static | Box
Support = All | Window | Neighborhood | Own
Mix = Stack | Mean | Pool | Project | Predict
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
    """One token mixer as a record. Values are the types of `axes`; illegal combinations raise SpecError.

    `resets` lists the inherited cells that `parse` had to reset; it is not part of the record's identity.
    """

    bank: Bank
    support: Support
    mix: Mix
    kernel: Kernel
    size: int
    activation: Pipeline
    position: Literal["none", "relative"]
    frame: Literal["linear", "bn_relu", "bare"]
    bias: bool = True
    resets: tuple[Reset, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, axis in AXES.items():
            if not axis.accepts(getattr(self, name)):
                raise SpecError(f"{name}: {getattr(self, name)!r} is not legal; legal: {axis.legal}")
        cells = self.cells
        for violation in _violations(cells):
            raise SpecError(_explain_violation(cells, violation))

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
        """The roles the activation plays: normalisation, communication, non-linearity (paper 5.2)."""
        return roles(self.activation)

    # ---- text and JSON ----

    @classmethod
    def parse(cls, text: str, base: MixerSpec | None = None) -> MixerSpec:
        """The record of `text`: a row name and overridden cells, or cells only where a `base` is given.

        Inherited cells that no longer apply are reset (the smallest set, see `resets`), typed cells never.
        Raises SpecError for unknown rows, fields or values and for records that cannot exist.
        """
        if not (typed := words(text)):
            raise SpecError("empty record; a record starts with a row of the atlas, such as 'vit'")
        first, *rest = typed
        if "=" in first:
            if base is None:
                raise SpecError(f"{text!r} has cells only; start with a row of the atlas, such as 'vit {text.strip()}'")
            inherited, rest = base.cells, [first, *rest]
        elif first in ROWS:
            inherited = dict(_row_cells(first))
        else:
            raise SpecError(f"unknown row {first!r}{suggest(first, ROWS)}; legal: {', '.join(ROWS)}")
        return _override(inherited, _read_cells(rest))

    def override(self, **cells: str) -> MixerSpec:
        """This record with cells replaced, as ``parse`` does: ``spec.override(kernel="depthwise")``."""
        return _override(self.cells, _read_cells([f"{name}={value}" for name, value in cells.items()]))

    def __str__(self) -> str:
        differing = {row: {n: v for n, v in self.cells.items() if v != _row_cells(row)[n]} for row in ROWS}
        row = min(differing, key=lambda name: len(differing[name]))
        return " ".join([row, *(f"{name}={AXES[name].show(value)}" for name, value in differing[row].items())])

    def to_json(self) -> str:
        """The record as a JSON object of cell texts, with a ``spec_version``."""
        return json.dumps({"spec_version": SPEC_VERSION, **self.text})

    @classmethod
    def from_json(cls, document: str | Mapping[str, object]) -> MixerSpec:
        """The record of `to_json`. Raises SpecError for another version, missing or unknown fields, bad values."""
        try:
            data = json.loads(document) if isinstance(document, str) else document
        except (json.JSONDecodeError, RecursionError) as error:
            raise SpecError(f"a record must be a JSON object: {error}") from None
        if not isinstance(data, Mapping):
            raise SpecError(f"a record must be a JSON object, got {type(data).__name__}")
        if data.get("spec_version") != SPEC_VERSION:
            raise SpecError(f"spec_version: {data.get('spec_version')} is not legal; legal: {SPEC_VERSION}")
        if missing := [name for name in CELLS if name not in data]:
            raise SpecError(f"{missing[0]}: missing; a record has {', '.join(CELLS)}")
        texts = {name: value for name, value in data.items() if name != "spec_version"}
        return cls(**_read_cells([f"{name}={value}" for name, value in texts.items()]))

    # ---- reading ----

    def diff(self, other: MixerSpec) -> dict[str, tuple[str, str]]:
        """Exactly the cells that differ: field -> (text here, text there)."""
        mine, theirs = self.text, other.text
        return {n: (mine[n], theirs[n]) for n in CELLS if getattr(self, n) != getattr(other, n)}

    def at_block(self, index: int) -> MixerSpec:
        """The record of block `index`, counted inside its stage: an alternating shift is 0 for even blocks and
        M//2 for odd ones."""
        if isinstance(self.support, Window) and self.support.shift == ALTERNATE:
            return replace(self, support=replace(self.support, shift=self.support.M // 2 * (index % 2)))
        return self

    def check_resolved(self) -> None:
        """Raises SpecError while the shift of the record's windows alternates with the block."""
        if isinstance(self.support, Window):
            _ = self.support.resolved_shift

    def explain(self) -> str:
        """The record in words: its text, each cell, the roles its activation plays, and what was reset."""
        lines = [str(self), *(f"  {name:<11}{value}" for name, value in self.text.items())]
        lines.append(f"  roles      {', '.join(self.roles) or 'none'}")
        lines += [f"  reset      {reset}" for reset in self.resets]
        return "\n".join(lines)


def read_stages(text: str, count: int, bases: Sequence[MixerSpec | None] = ()) -> tuple[MixerSpec, ...]:
    """One record for all of `count` stages, or one each separated by ``|``: ``"dwnet | dwnet | swin | swin"``.
    Cells alone change the stage's own base, where `bases` are given.

    Raises SpecError when the number of records is neither 1 nor `count`.
    """
    pairs = zip(_stage_texts(text, count), bases or (None,) * count, strict=True)
    return tuple(MixerSpec.parse(part, base) for part, base in pairs)


def read_mlps(text: str, count: int) -> tuple[MixerSpec | None, ...]:
    """The same for the MLPs, where ``none`` stands for no MLP: ``"ffn"``, ``"none"``, ``"none | ffn"``."""
    return tuple(None if part.strip() == "none" else MixerSpec.parse(part) for part in _stage_texts(text, count))


def _stage_texts(text: str, count: int) -> list[str]:
    if not isinstance(text, str):
        raise SpecError(f"{text!r} is not a record's text; legal: text, such as 'vit activation=relu,count'")
    parts = text.split("|")
    if len(parts) not in (1, count):
        legal = "1" if count == 1 else f"1 or {count}"
        raise SpecError(f"{text!r} has {len(parts)} records for {count} stages; legal: {legal}")
    return parts * (count if len(parts) == 1 else 1)


# ---- reading cells ---------------------------------------------------------------------------------------


@cache
def _row_cells(row: str) -> Mapping[str, Any]:
    return _read_cells([f"{name}={text}" for name, text in ROWS[row].cells.items()])


def _show(cells: Mapping[str, Any]) -> dict[str, str]:
    return {name: AXES[name].show(value) for name, value in cells.items()}


def _read_cells(typed: list[str]) -> dict[str, Any]:
    """``field=value`` words as values. Raises SpecError for unknown, repeated, empty or misspelt cells."""
    cells: dict[str, Any] = {}
    for cell in typed:
        name, equals, value = cell.partition("=")
        if not equals:
            raise SpecError(f"{cell!r} is not a cell; cells are written field=value, fields: {', '.join(CELLS)}")
        if name not in AXES:
            raise SpecError(f"unknown field {name!r}{suggest(name, CELLS)}; legal: {', '.join(CELLS)}")
        if name in cells:
            raise SpecError(f"{name}: typed twice; a cell may be typed once")
        if not value:
            raise SpecError(f"{name}: empty value; legal: {AXES[name].legal}")
        if len(value) > LONGEST_VALUE:
            raise SpecError(f"{name}: a value of {len(value)} characters is not legal; legal: {AXES[name].legal}")
        cells[name] = AXES[name].read("".join(value.split()))
    return cells


def _override(inherited: Mapping[str, Any], typed: Mapping[str, Any]) -> MixerSpec:
    """`inherited` with `typed` cells on top; the smallest set of inherited cells that makes it legal is reset."""
    cells = {**inherited, **typed}
    open_cells = [name for name in RESETTABLE if name not in typed]
    candidates = list(_candidates(cells, open_cells))
    for subset, candidate in candidates:
        if not any(_violations(candidate)):
            old, new = _show(cells), _show(candidate)
            return MixerSpec(**candidate, resets=tuple(Reset(n, old[n], new[n]) for n in subset if old[n] != new[n]))
    best = min((candidate for _, candidate in candidates), key=lambda c: len(list(_violations(c))))
    raise SpecError(_explain_violation(best, next(_violations(best)), open_cells))


def _candidates(cells: Mapping[str, Any], names: list[str]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The cells with every subset of `names` reset, smallest subsets first."""
    for size in range(len(names) + 1):
        for subset in combinations(names, size):
            yield subset, _reset(cells, subset)


def _reset(cells: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    two_step = isinstance(cells["kernel"], TwoStep)
    neutral = {
        "position": "none",
        "activation": read_pipeline("identity,count") if two_step else (),
        "mix": Stack() if two_step else Mean(),
        "support": All(),
    }
    return {**cells, **{name: neutral[name] for name in names}}


# ---- legality --------------------------------------------------------------------------------------------

Violation = tuple[str, str]
"""The dependent field, and the reason why its value cannot stand beside the others."""


def _violations(cells: Mapping[str, Any]) -> Iterator[Violation]:
    """Every rule of legality that the cells break, as (dependent field, reason)."""
    bank, support, mix, kernel = cells["bank"], cells["support"], cells["mix"], cells["kernel"]
    size, activation, position = cells["size"], cells["activation"], cells["position"]
    dynamic, two_step = isinstance(bank, Dynamic), isinstance(kernel, TwoStep)

    if isinstance(kernel, Full) and not isinstance(bank, Static):
        yield "kernel", f"full needs bank static, not {bank}: generating full kernels would take C*C*C weights"
    if isinstance(bank, Box) and kernel != Grouped(1):
        yield "kernel", "bank box is one weight shared by all channels: grouped(1)"
    if two_step and isinstance(bank, Static) and bank.single:
        yield "bank", "kernel two_step makes one channel per kernel: K must be > 1"
    if isinstance(bank, Box) and size < 3:
        yield "size", "bank box is the mean of the taps minus the centre: at size 1 it is zero"

    if two_step and not isinstance(mix, (Stack, Project)):
        yield "mix", f"kernel two_step stacks kernels as channels between its steps, {mix} leaves a single kernel"
    if not two_step and isinstance(mix, (Stack, Project)):
        yield "mix", f"kernel {kernel} applies one kernel at a position, {mix} leaves several"
    if not dynamic and isinstance(mix, (Pool, Project)):
        yield "mix", f"{mix} works on kernels generated at positions: it needs bank dynamic, not {bank}"
    if isinstance(mix, Predict) and not isinstance(bank, Static):
        yield "mix", f"predict mixes a bank of learned kernels: it needs bank static, not {bank}"
    if isinstance(bank, Static) and not two_step and not isinstance(mix, Mean if bank.single else Predict):
        yield "mix", f"bank {bank} with kernel {kernel}: one kernel is used as it is (mean), several need predict"

    if two_step != bool(activation):
        reason = "acts between the two steps of kernel two_step"
        yield "activation", f"an activation {reason}" + ("; write identity for none" if two_step else f", not {kernel}")
    if sum(step.name == "batchnorm" for step in activation) > 1:
        yield "activation", "at most one batchnorm step: it owns activation_norm"

    if not isinstance(support, All):
        if not dynamic:
            yield "support", f"the kernels of bank {bank} belong to no position: every position sees all"
        elif bank.stride > 1:
            yield "support", f"stride={bank.stride} generates on the pooled grid, which only support all reads"
        if isinstance(mix, Project):
            yield "support", f"{mix} mixes the kernels of all positions"
        if isinstance(support, Own) and two_step:
            yield "support", "self needs a one-step kernel: two steps over one kernel have nothing to select"
        if isinstance(support, Window) and support.pad != "masked" and (size > 1 or cells["frame"] == "bn_relu"):
            yield "support", f"pad={support.pad} is the padding of published size-1 checkpoints without BatchNorm"

    if position == "relative":
        if not dynamic:
            yield "position", f"the kernels of bank {bank} have no position"
        elif not (two_step and isinstance(mix, Stack)) and not (
            isinstance(kernel, Depthwise) and isinstance(mix, Mean)
        ):
            yield "position", "relative needs two_step with stack, or depthwise with mean"
        elif bank.stride > 1:
            yield "position", f"stride={bank.stride} generates on the pooled grid, which has no offsets to positions"


def _explain_violation(cells: Mapping[str, Any], violation: Violation, open_cells: list[str] | None = None) -> str:
    """One line: the dependent field, its value, why it cannot stand, and the values that can (after resets)."""
    name, reason = violation
    others = [field for field in open_cells or [] if field != name]
    legal = [
        AXES[name].show(value)
        for value in AXES[name].examples
        if any(not any(_violations(c)) for _, c in _candidates({**cells, name: value}, others))
    ]
    if name == "activation" and legal != ["none"]:
        legal = ["identity,count", "softmax and other steps"]
    listed = ", ".join(legal) or f"no {name} beside the other cells"
    return f"{name}={AXES[name].show(cells[name])} is not legal here: {reason}; legal: {listed}"
