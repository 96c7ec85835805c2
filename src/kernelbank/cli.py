"""The command line: one dictionary of verbs, each imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import cast

from kernelbank import __version__
from kernelbank.errors import InputError, UsageError
from kernelbank.text import SpecError, suggest

# verb -> (module:function that takes the words after the verb and returns the exit code, help in one line)
VERBS: dict[str, tuple[str, str]] = {
    "atlas": (
        "kernelbank.analysis.command:main",
        "print every known mixer as a record, or one in full; draw it; prove the identities",
    ),
    "study": (
        "kernelbank.studies.command:main",
        "run a study of the paper: a grid of records, trained and compared",
    ),
}
BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 2, 130, 141
"""Exit codes; the last two are 128 + the signal, as shells report it."""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code. Expected errors are one line on stderr, and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except (InputError, SpecError) as error:
        if debug:
            raise
        verb = f" {error.verb}" if isinstance(error, UsageError) else ""
        print(f"kernelbank{verb}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if debug:
            raise
        print("kernelbank: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout at exit and would complain once more: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else BAD_INPUT
    verb, *rest = words
    if verb in ("-V", "--version"):
        print(f"kernelbank {__version__}")
        return 0
    if verb not in VERBS:
        raise InputError(f"unknown verb {verb!r}{suggest(verb, VERBS)}; legal: {', '.join(VERBS)}")
    module, _, function = VERBS[verb][0].partition(":")
    return cast(Callable[[list[str]], int], getattr(import_module(module), function))(rest)


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join([
        "usage: kernelbank VERB [options]",
        "",
        "Vision backbones seen as dynamic convolutions: every token mixer is one record on a few axes.",
        "",
        *(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items()),
        "",
        "kernelbank VERB --help shows a verb's options; --version the version; --debug, anywhere, full tracebacks.",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
