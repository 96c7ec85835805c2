"""Invertible key maps: a list of rules that is declared for one direction and inverted for the other.

A rule pairs patterns of keys. The placeholders ``{i}`` and ``{j}`` are numbers, also as ``{i+1}`` or ``{2i+1}``, and
``{p}`` is weight or bias. A rule with several keys on one side joins or splits tensors. Every key of a state dict is
translated, dropped for a stated reason, or left over, which is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kernelbank.errors import InputError

State = dict[str, Tensor]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = tuple[Tensor, ...]
Wanted = Sequence[Shape | None]
"""The shape that each tensor must get, None where it is not known."""
NAMED = 3
"""The number of keys that an error lists before it counts the rest."""


@dataclass(frozen=True)
class Change:
    """A bijection between the tensors of one side of a rule and those of the other; `back` is its inverse.

    Both are told the shapes that are wanted: a reshape needs them.
    """

    into: Callable[[Tensors, Wanted], Tensors]
    back: Callable[[Tensors, Wanted], Tensors]

    @property
    def inverse(self) -> Change:
        """The other direction."""
        return Change(self.back, self.into)


class Misfit(InputError):
    """A tensor that a rule cannot convert."""


def _as_they_are(tensors: Tensors, shapes: Wanted) -> Tensors:
    return tensors


def _join(tensors: Tensors, shapes: Wanted) -> Tensors:
    if len({tensor.shape for tensor in tensors}) != 1:
        raise Misfit(f"shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors)} do not join")
    return (torch.cat(tensors),)


def _split(tensors: Tensors, shapes: Wanted) -> Tensors:
    (joined,) = tensors
    if not joined.ndim or joined.shape[0] % 3:
        raise Misfit(f"shape {tuple(joined.shape)} does not split into q, k and v")
    return tuple(part.clone() for part in joined.chunk(3))


SAME = Change(_as_they_are, _as_they_are)
JOIN = Change(_join, _split)
"""q, k and v concatenated along their outputs."""


def of_one(into: Callable[[Tensor, Shape | None], Tensor], back: Callable[[Tensor, Shape | None], Tensor]) -> Change:
    """A change of one tensor."""
    return Change(
        lambda tensors, shapes: (into(tensors[0], shapes[0]).contiguous(),),
        lambda tensors, shapes: (back(tensors[0], shapes[0]).contiguous(),),
    )


# ---- patterns --------------------------------------------------------------------------------------------

_PLACE = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")
_LEAF = "p"
Bound = tuple[tuple[str, int | str], ...]
"""The values of the placeholders."""


@dataclass(frozen=True)
class Pattern:
    """A key with placeholders, such as ``layers.{i+1}.downsample.norm.{p}``."""

    text: str

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts, end = [], 0
        for place in _PLACE.finditer(self.text):
            parts.append(re.escape(self.text[end : place.start()]))
            parts.append(f"(?P<{place[2]}>{'weight|bias' if place[2] == _LEAF else '0|[1-9][0-9]*'})")
            end = place.end()
        return re.compile("".join(parts) + re.escape(self.text[end:]))

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Each placeholder with its factor and offset: ``{2i+1}`` is i: (2, 1)."""
        return {place[2]: (int(place[1] or 1), int(place[3] or 0)) for place in _PLACE.finditer(self.text)}

    def match(self, key: str) -> Bound | None:
        """What the placeholders stand for in `key`, or None where it does not match."""
        found = self._regex.fullmatch(key)
        if found is None:
            return None
        bound: dict[str, int | str] = {}
        for name, (factor, offset) in self.places.items():
            if name == _LEAF:
                bound[name] = found[name]
                continue
            value, rest = divmod(int(found[name]) - offset, factor)
            if rest or value < 0:
                return None
            bound[name] = value
        return tuple(sorted(bound.items()))

    def key(self, bound: Bound) -> str:
        """The key for these values."""
        values = dict(bound)

        def fill(place: re.Match[str]) -> str:
            value, (factor, offset) = values[place[2]], self.places[place[2]]
            return value if isinstance(value, str) else str(factor * value + offset)

        return _PLACE.sub(fill, self.text)


@dataclass(frozen=True)
class Rule:
    """The keys `theirs` of a dialect and `ours` of the pivot. `change` converts tensors of theirs to ours."""

    theirs: tuple[Pattern, ...]
    ours: tuple[Pattern, ...]
    change: Change

    @property
    def inverse(self) -> Rule:
        """The rule in the other direction."""
        return Rule(self.ours, self.theirs, self.change.inverse)


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], change: Change = SAME) -> Rule:
    """Return the rule of texts. Raises ValueError unless every key has the same placeholders."""
    sides = [tuple(Pattern(text) for text in ((side,) if isinstance(side, str) else side)) for side in (theirs, ours)]
    if len({frozenset(pattern.places) for side in sides for pattern in side}) != 1:
        raise ValueError(f"invalid rule {theirs} -> {ours}; expected the same placeholders in every key")
    return Rule(sides[0], sides[1], change)


Names = dict[str, str | tuple[str, ...]]
"""From a pattern of timm's keys to that of a library; to three patterns where timm has q, k and v in one tensor."""
Changes = dict[str, Change]
"""From a pattern of timm's keys to the conversion of its tensor."""


# ---- maps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dropped:
    """Keys without a counterpart in the pivot, and the reason why they can be dropped."""

    pattern: Pattern
    reason: str


@dataclass(frozen=True)
class KeyMap:
    """The rules between the keys of a dialect and those of timm, the pivot.

    `dropped` are patterns of the dialect's keys that have no counterpart.
    """

    rules: tuple[Rule, ...]
    dropped: tuple[Dropped, ...] = field(default=())

    def into(self, state: Mapping[str, Tensor], shapes: Shapes | None = None) -> tuple[State, dict[str, str]]:
        """Return the state of a dialect under the keys of the pivot, and the dropped keys with the reasons.

        Raises InputError listing the keys that no rule matches.
        """
        gone = {key: drop.reason for key in state for drop in self.dropped if drop.pattern.match(key) is not None}
        kept = {key: tensor for key, tensor in state.items() if key not in gone}
        return _translate(kept, self.rules, shapes or {}), gone

    def back(self, state: Mapping[str, Tensor], shapes: Shapes | None = None) -> State:
        """Return the state of the pivot under the keys of the dialect. Raises InputError as `into`."""
        return _translate(state, [rule.inverse for rule in self.rules], shapes or {})


def key_map(names: Names, changes: Changes | None = None, dropped: Mapping[str, str] | None = None) -> KeyMap:
    """Return the key map of a table of names. Three names for one are joined, unless `changes` has another conversion.
    `dropped` maps patterns without a counterpart to the reason."""
    changes = changes or {}
    rules = (
        rule(theirs, timm, changes.get(timm, JOIN if isinstance(theirs, tuple) else SAME))
        for timm, theirs in names.items()
    )
    return KeyMap(tuple(rules), tuple(Dropped(Pattern(key), reason) for key, reason in (dropped or {}).items()))


def _translate(state: Mapping[str, Tensor], rules: Iterable[Rule], shapes: Shapes) -> State:
    """`state` with every key translated by the one rule that takes it; the order of keys is kept."""
    left, out = dict.fromkeys(state), State()
    table = [(rule, pattern) for rule in rules for pattern in rule.theirs]
    for key in state:
        if key not in left:
            continue
        taken = next(((rule, bound) for rule, pattern in table if (bound := pattern.match(key)) is not None), None)
        if taken is None:
            continue
        rule, bound = taken
        sources, targets = ([p.key(bound) for p in side] for side in (rule.theirs, rule.ours))
        if missing := [source for source in sources if source not in state]:
            raise InputError(f"{key} is there without {listed(missing)}: nothing can be made of it")
        if twice := [target for target in targets if target in out]:
            raise InputError(f"{key} and another tensor both become {twice[0]}")
        try:
            made = rule.change.into(tuple(state[s] for s in sources), [shapes.get(t) for t in targets])
        except Misfit as error:
            raise InputError(f"{key}: {error}") from None
        out |= zip(targets, made, strict=True)
        for source in sources:
            left.pop(source, None)
    if left:
        raise InputError(f"no place for {listed(left)}")
    return out


def cover(state: Mapping[str, Tensor], expected: Shapes, what: str) -> None:
    """Raise InputError, naming tensors, unless `state` has exactly the keys of `expected` with their shapes."""
    problems = []
    if missing := [key for key in expected if key not in state]:
        problems.append(f"missing {listed(missing)}")
    if extra := [key for key in state if key not in expected]:
        problems.append(f"no place for {listed(extra)}")
    if wrong := [key for key in state if key in expected and state[key].shape != expected[key]]:
        shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key])}" for key in wrong]
        problems.append(f"wrong shape: {listed(shapes)}")
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}")


def listed(names: Iterable[str]) -> str:
    """Return the first few names and the number of the others."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
