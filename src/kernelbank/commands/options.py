"""Options of a verb from the command line: tyro reads a typed dataclass, and its complaints become one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import tyro

from kernelbank.errors import UsageError
from kernelbank.text import suggest

T = TypeVar("T")


def read_options(kind: type[T], verb: str, argv: list[str], default: T | None = None) -> T:
    """An instance of the dataclass `kind` from `argv`, the words after `verb`; what they leave out is as in `default`,
    if there is one. ``--help`` prints and exits 0.

    Raises UsageError, one line, for anything that cannot be read.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options, unread = tyro.cli(
                kind,
                prog=f"kernelbank {verb}",
                args=argv,
                default=default,
                return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(verb, _first_paragraph(complaint.getvalue())) from None
    if unread:
        raise UsageError(verb, _unknown(kind, unread[0]))
    assert options is not None
    return options


def _unknown(kind: type[Any], word: str) -> str:
    if not word.startswith("-"):
        return f"cannot read {word!r} here; words come first, options after them"
    assert is_dataclass(kind)
    option = word.partition("=")[0]
    known = ["--help", *(f"--{name.replace('_', '-')}" for name in _names(kind))]
    return f"unknown option {option}{suggest(option, known)}; see --help"


def _names(kind: type[Any]) -> Iterator[str]:
    """The fields of a dataclass; of one that is a field, its fields."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _names(hints[field.name])
        else:
            yield field.name


def _not_legal(said: re.Match[str]) -> str:
    """tyro's sentence on an optional value, shorter: that None is legal too only says that it can be left out."""
    legal = said[1].removeprefix("{None}|").removeprefix("{[").removesuffix("]}")
    return f"{said[2].replace(', ', ' ')} is not legal; legal: {legal}"


def _first_paragraph(box: str) -> str:
    """What tyro's framed message says before its first rule, without frame and title. The title stands in the
    frame's upper edge, or above a rule of its own where the stream takes no box characters."""
    paragraphs = [""] if "╭" in box else []
    for line in box.splitlines():
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │")
        if text[:1] in ("╭", "╰"):
            continue
        if text and not text.strip("─-"):
            paragraphs.append("")
        elif paragraphs:
            paragraphs[-1] += " " + text
    said = " ".join(paragraphs[0].split()) if paragraphs else ""
    said = re.sub(r"no type matching (.*) could be instantiated from \[(.*?)\]\. .*", _not_legal, said)
    return said.removeprefix("Error parsing ") or "cannot read the options; see --help"
