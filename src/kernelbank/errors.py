"""Errors that the command line prints as one line. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec


class SpecError(ValueError):
    """A spec, cell or value is invalid. The message names the field, the value and what is expected."""


class InputError(ValueError):
    """Input of the user cannot be used: an option, a combination of options, a path."""


class UsageError(InputError):
    """Options of the command `verb` cannot be read."""

    def __init__(self, verb: str, message: str) -> None:
        super().__init__(message)
        self.verb = verb


class WorkerError(RuntimeError):
    """A worker process crashed or was killed; `detail` is its traceback, or empty."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


def require(what: str, extras: str, *modules: str) -> None:
    """Check the optional dependencies of `what`, which the extras `extras` install.

    Raises: InputError: If one of `modules` is not installed.
    """
    if missing := [name for name in modules if find_spec(name) is None]:
        raise InputError(f"{what} needs {', '.join(missing)}: pip install 'kernelbank[{extras}]'")
