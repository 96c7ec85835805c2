"""The command line: one dictionary of verbs, each imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import cast

from kernelbank import __version__
from kernelbank.errors import InputError, SpecError, UsageError, WorkerError
from kernelbank.text import suggest

# verb -> (module:function that takes the words after the verb and returns the exit code, help in one line)
VERBS: dict[str, tuple[str, str]] = {
    "atlas": (
        "kernelbank.commands.atlas:main",
        "print every known mixer as a record, or one in full; draw it; prove the identities",
    ),
    "convert": (
        "kernelbank.commands.convert:main",
        "turn a checkpoint of another library into ours, or ours into theirs, and prove it",
    ),
    "benchmark": (
        "kernelbank.commands.benchmark:main",
        "time models and records side by side; explain the path that a record takes",
    ),
    "study": (
        "kernelbank.commands.study:main",
        "run a study of the paper: a grid of records, trained and compared",
    ),
    "train": (
        "kernelbank.commands.train:main",
        "train a model by a recipe, on one processor or many machines; stop it and go on",
    ),
    "evaluate": (
        "kernelbank.commands.evaluate:main",
        "loss, top-1 and top-5 of a run or of any weights, over every image exactly once",
    ),
    "compare": (
        "kernelbank.commands.compare:main",
        "runs beside each other: curves, and differences with intervals over seeds",
    ),
}
FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
"""Exit codes; the last two are 128 + the signal, as shells report it."""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code. Expected errors are one line on stderr, and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich leaves so when its reader is gone
            return CLOSED_PIPE
        raise
    except (InputError, SpecError) as error:
        if debug:
            raise
        verb = f" {error.verb}" if isinstance(error, UsageError) else ""
        return _complain(f"{verb}: error: {error}", BAD_INPUT)
    except WorkerError as error:
        print(error.detail * debug, end="", file=sys.stderr)
        return _complain(f": error: {error}", FAILED)
    except KeyboardInterrupt:
        if debug:
            raise
        return _complain(": interrupted", INTERRUPTED)
    except BrokenPipeError:
        _discard_output()
        return CLOSED_PIPE
    except OSError as error:
        if debug:
            raise
        _discard_output()
        place = f"{error.filename}: " if error.filename is not None else ""
        return _complain(f": error: {place}{error.strerror or error}", BAD_INPUT)


def _complain(message: str, code: int) -> int:
    """Print `message` as one line; returns `code`."""
    print(" ".join(f"kernelbank{message}".split()), file=sys.stderr)
    return code


def _open_streams() -> None:
    """A stream that the caller closed (``>&-``) is None in Python: what is written to it goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _discard_output() -> None:
    """Python flushes stdout at exit and would complain once more where that failed: give it somewhere to write."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
