"""The errors that the command line turns into one line. Imports no torch."""


class InputError(ValueError):
    """Something the user gave that cannot be used: an option, a combination of options, a path."""


class UsageError(InputError):
    """Options that `verb` of the command line cannot read."""

    def __init__(self, verb: str, message: str) -> None:
        super().__init__(message)
        self.verb = verb
