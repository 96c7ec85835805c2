"""The options of a verb: tyro reads them into a typed dataclass, and its errors become one line."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any, TypeVar

import tyro

from kernelbank.commands.fields import Option, options_of
from kernelbank.commands.help import help_text
from kernelbank.errors import UsageError
from kernelbank.text import suggest

T = TypeVar("T")


def read_options(kind: type[T], verb: str, argv: list[str], default: T | None = None) -> T:
    """Read `argv`, the words after `verb`, into an instance of the dataclass `kind`; ``--help`` prints and exits.

    What the words leave out is as in `default`, if it is given. Positional arguments may also be given by name:
    ``train --model vit_kb_tiny_patch16_224`` is ``train vit_kb_tiny_patch16_224``.

    Raises: UsageError: If the words cannot be read.
    """
    known = list(options_of(kind, default))
    if {"-h", "--help"} & set(argv):
        print(help_text(kind, verb, default))
        raise SystemExit(0)
    _check_switches(verb, argv, known)
    argv = _positionals_first(verb, argv, known)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
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
        raise UsageError(verb, _error_line(stderr.getvalue())) from None
    if unread:
        raise UsageError(verb, _unread(unread[0], known))
    assert options is not None
    return options


def default_text(metavar: str, default: str) -> Any:
    """Return the annotation of an option that is None unless given: its placeholder and its default in words."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def _check_switches(verb: str, argv: list[str], known: list[Option]) -> None:
    """Raises: UsageError: If a switch has a value, which would be read as a positional argument."""
    switches = {option.flag for option in known if option.switch}
    for word in argv:
        flag, equals, _ = word.partition("=")
        if equals and flag in switches:
            raise UsageError(verb, f"invalid {word}; expected {flag} without a value")


# ---- positional arguments by name ------------------------------------------------------------------------


def _positionals_first(verb: str, argv: list[str], known: list[Option]) -> list[str]:
    """`argv` with the positional arguments that are given by name put in their places in front.

    Raises: UsageError: If one is given without a value, or twice, or if one before it is missing.
    """
    by_flag = {option.flag: option for option in known if option.positional}
    named, rest = dict[str, list[str]](), list[str]()
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        option = by_flag.get(flag)
        if option is None:
            rest.append(word)
            continue
        values = [value] if equals else []
        while not equals and queue and not queue[0].startswith("-") and (option.several or not values):
            values.append(queue.pop(0))
        if not values:
            raise UsageError(verb, f"{flag}: expected a value")
        if flag in named:
            raise UsageError(verb, f"{flag} is given twice")
        named[flag] = values
    if not named:
        return argv
    count = next((index for index, word in enumerate(rest) if word.startswith("-")), len(rest))
    unnamed, others = rest[:count], rest[count:]
    placed = list[str]()
    for flag, option in by_flag.items():
        if flag in named:
            placed += named[flag]
        elif unnamed:
            placed += unnamed if option.several else unnamed[:1]
            unnamed = [] if option.several else unnamed[1:]
        elif flag != list(by_flag)[-1]:
            raise UsageError(verb, f"{flag.removeprefix('--').upper()} is missing; see --help")
    if unnamed:
        raise UsageError(verb, f"{list(named)[-1]} is given twice, by name and as {unnamed[0]!r}")
    return placed + others


# ---- errors ----------------------------------------------------------------------------------------------


def _unread(word: str, known: list[Option]) -> str:
    """Why tyro did not read a word."""
    if not word.startswith("-"):
        return f"cannot read {word!r} here; expected words first, then options"
    flag = word.partition("=")[0]
    flags = ["--help", *(option.flag for option in known)]
    if flag in flags:
        return f"invalid {word}; expected {flag} as --help shows it"
    return f"unknown option {flag}{suggest(flag, flags)}; see --help"


def _error_line(frame: str) -> str:
    """tyro's message up to its first rule, without frame and title, in our words.

    The title is part of the upper edge of the frame, or has a rule of its own if the stream has no box characters.
    """
    paragraphs = [""] if "╭" in frame else []
    for line in frame.splitlines():
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │")
        if text[:1] in ("╭", "╰"):
            continue
        if text and not text.strip("─-"):
            paragraphs.append("")
        elif paragraphs:
            paragraphs[-1] += " " + text
    message = " ".join(paragraphs[0].split()) if paragraphs else ""
    message = re.sub(r"no type matching (.*) could be instantiated from \[(.*?)\]\. .*", _invalid, message)
    message = re.sub(r"(--\S+): invalid literal for int\(\) with base 10: (.*)",
                     r"invalid \1 \2; expected a whole number", message)  # fmt: skip
    message = re.sub(r"(--\S+): could not convert string to float: (.*)", r"invalid \1 \2; expected a number", message)
    return message.removeprefix("Error parsing ") or "cannot read the options; see --help"


def _invalid(sentence: re.Match[str]) -> str:
    """tyro's sentence on an optional value, without None, which only means that the option may be left out."""
    expected = sentence[1].removeprefix("{None}|").removeprefix("{[").removesuffix("]}")
    return f"invalid value {sentence[2].replace(', ', ' ')}; expected {expected}"
