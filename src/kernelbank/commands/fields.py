"""The options of a verb, read off its dataclass: flag, placeholder, default and documentation of each field."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

NUMBERS = {int: "INT", float: "FLOAT"}
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


@dataclass(frozen=True)
class Option:
    """A field as it is written on the command line. A switch takes no value, a tuple takes `several`."""

    name: str
    flag: str
    positional: bool
    switch: bool
    several: bool
    placeholder: str
    default: str
    """The default in words; empty if there is none to state."""
    doc: str

    @property
    def invocation(self) -> str:
        """The option as its user writes it: ``--dim INT``, ``--json``, or the placeholder of a positional argument."""
        return self.placeholder if self.positional else f"{self.flag} {self.placeholder}".rstrip()


def options_of(kind: type[Any], default: Any = None) -> Iterator[Option]:
    """The options of a dataclass, with the values of `default` if it is given; of a field that is a dataclass itself,
    its fields."""
    hints, docs = get_type_hints(kind, include_extras=True), _docs(kind)
    for field in fields(kind):
        hint = hints[field.name]
        plain, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        value = getattr(default, field.name, field.default)
        if value is MISSING and field.default_factory is not MISSING:
            value = field.default_factory()
        if is_dataclass(plain):
            yield from options_of(plain, value)  # type: ignore[arg-type]
        else:
            switch = plain is bool
            stem = field.name.replace("_", "-")
            yield Option(
                name=field.name,
                flag=f"--no-{stem}" if switch and value is True else f"--{stem}",
                positional=any(mark is _POSITIONAL for mark in marks),
                switch=switch,
                several=get_origin(plain) is tuple,
                placeholder="" if switch else _stated(marks, "metavar") or _placeholder(plain),
                default=_stated(marks, "help_behavior_hint").removeprefix("(default: ").removesuffix(")")
                or _default(value),
                doc=docs.get(field.name, ""),
            )


def _stated(marks: list[Any], name: str) -> str:
    """What an annotation by tyro.conf.arg states, or the empty string."""
    return next((text for mark in marks if (text := getattr(mark, name, None)) is not None), "")


def _placeholder(kind: Any) -> str:
    """The words that stand for a value of the type: INT, FLOAT FLOAT, a|b, INT ..."""
    options = [one for one in get_args(kind) if one is not NoneType]
    if get_origin(kind) is Literal:
        return "|".join(map(str, options))
    if get_origin(kind) is tuple:
        several = [_placeholder(one) for one in options if one is not Ellipsis]
        return " ".join([*several, "..."] if Ellipsis in options else several)
    return _placeholder(options[0]) if options else NUMBERS.get(kind, "TEXT")


def _default(value: Any) -> str:
    """A default as it is typed. Options that are off or absent unless given have none to state."""
    if value is True:
        return "on; this option switches it off"
    if value is MISSING or value is None or value is False or value in ("", ()):
        return ""
    if isinstance(value, tuple):
        return " ".join(map(_default, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _docs(kind: type[Any]) -> dict[str, str]:
    """The docstrings of the fields of a dataclass and its bases: the strings that follow them in the source."""
    found = dict[str, str]()
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
                if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                    found[field.target.id] = " ".join(after.value.value.split())
    return found
