"""The command line: the verbs, each imported when it is called, and the one place where errors become one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import cast

from kernelbank import __version__
from kernelbank.errors import InputError, SpecError, UsageError, WorkerError
from kernelbank.text import one_line, suggest
from kernelbank.train.signals import interrupts_kept

# verb -> (module:function, help in one line); the function takes the words after the verb, returns the exit code.
VERBS: dict[str, tuple[str, str]] = {
    "atlas": (
        "kernelbank.commands.atlas:main",
        "print the table of all known mixers, or one of them in full; draw it; prove the identities",
    ),
    "convert": (
        "kernelbank.commands.convert:main",
        "convert a checkpoint between kernelbank and other libraries, and prove that it is the same model",
    ),
    "benchmark": (
        "kernelbank.commands.benchmark:main",
        "time models and mixers side by side, or explain which implementation a mixer runs on",
    ),
    "study": (
        "kernelbank.commands.study:main",
        "run a study of the paper: train a grid of mixers and compare them",
    ),
    "train": (
        "kernelbank.commands.train:main",
        "train a model with a recipe, on one processor or on many machines; can be stopped and resumed",
    ),
    "evaluate": (
        "kernelbank.commands.evaluate:main",
        "measure loss, top-1 and top-5 accuracy of a run or of any weights",
    ),
    "compare": (
        "kernelbank.commands.compare:main",
        "compare runs: convergence curves, and differences with confidence intervals over seeds",
    ),
    "report": (
        "kernelbank.commands.report:main",
        "write one HTML page from run records: the verdicts on the paper's claims, tables and curves",
    ),
    "explain": (
        "kernelbank.commands.explain:main",
        "show which kernels a model selects on your own pictures: a page that works offline, and a table",
    ),
    "export": (
        "kernelbank.commands.export:main",
        "write a model to an ONNX or torch.export file, and compare the file with the model",
    ),
}
SECTIONS = {
    "mixers": ("atlas", "explain", "benchmark"),
    "models": ("convert", "export"),
    "training": ("train", "evaluate", "study", "compare", "report"),
}
EXAMPLES = ("kernelbank atlas vit", "kernelbank study softmax --quick")
"""The sections and the examples of ``kernelbank --help``."""
FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
"""Exit codes; the last two are 128 + the signal, as shells report it."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code. An expected error is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        with interrupts_kept():
            code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # how rich exits when its reader has closed the pipe
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
    """Print `message` as one line on stderr, escaped and cut to a sensible length, and return `code`."""
    print(one_line(f"kernelbank{message}"), file=sys.stderr)
    return code


def _open_streams() -> None:
    """Replace streams that the caller closed (``>&-``), which are None in Python, by the null device."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _discard_output() -> None:
    """Point stdout to the null device if it cannot be flushed, since Python flushes it again at exit."""
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
        raise InputError(f"unknown verb {verb!r}{suggest(verb, VERBS)}; expected one of {', '.join(VERBS)}")
    module, _, function = VERBS[verb][0].partition(":")
    return cast(Callable[[list[str]], int], getattr(import_module(module), function))(rest)


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join([
        "usage: kernelbank VERB [options]",
        "",
        "Vision backbones seen as dynamic convolutions: every token mixer is one spec on nine axes.",
        "",
        *(line for title, verbs in SECTIONS.items() for line in [
            f"{title}:", *(f"  {verb:<{width}}  {VERBS[verb][1]}" for verb in verbs), "",
        ]),
        "kernelbank VERB --help shows the options of a verb, --version the version.",
        "With --debug anywhere on the line, errors are shown with their full traceback.",
        "",
        "examples:",
        *(f"  {example}" for example in EXAMPLES),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
