"""The errors that the command line turns into one line. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec


class SpecError(ValueError):
    """A spec, cell or value that cannot be built. The message names the field, the value and what is expected."""


class InputError(ValueError):
    """Something the user gave that cannot be used: an option, a combination of options, a path."""


class UsageError(InputError):
    """Options that `verb` of the command line cannot read."""

    def __init__(self, verb: str, message: str) -> None:
        super().__init__(message)
        self.verb = verb


class WorkerError(RuntimeError):
    """A worker process crashed or was killed; `detail` is its traceback, or empty."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


def require(what: str, extras: str, *modules: str) -> None:
    """Raises InputError when an optional dependency of `what` is not installed; `extras` bring all of them."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise InputError(f"{what} needs {', '.join(missing)}: pip install 'kernelbank[{extras}]'")
