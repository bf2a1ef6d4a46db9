"""Errors that a user can fix, each reported in one line, and the exit code of each kind."""

import reprlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """An error in usage, config, data, model or run directory; its one line names the option, the value and a remedy.

    ``UserError(name, value, remedy)`` composes that line; ``UserError(text)`` uses the text as it is. Names and values
    are untrusted input: characters that would break the line or control a terminal are replaced.
    """

    exit_code = 2

    def __init__(self, name: str, value: object = None, remedy: str = ""):
        text = f"{name}: {shown(value)} cannot be used: {remedy}" if remedy else name
        printable = (c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
        super().__init__("".join(printable))


class Preempted(UserError):
    """The run was told to stop and has saved its state; running the same command again resumes it."""

    exit_code = 42


class RunStopped(UserError):
    """The run stopped for a reason that a restart would not fix, such as a non-finite loss."""

    exit_code = 43


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C, ``signal_name``, asked the process to end while it had nothing to save."""

    exit_code = 42

    def __init__(self, signal_name: str):
        super().__init__(f"stopped by {signal_name}: what was saved is kept; run the same command again")


class StorageUnreachable(UserError):
    """A bucket's storage did not answer in time; it may later."""

    exit_code = 1


class StorageDenied(RunStopped):
    """A bucket's storage refused a request: credentials, a right or the bucket itself are missing."""


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise ``UserError(name, value, remedy)`` unless the condition holds."""
    if not condition:
        raise UserError(name, value, remedy)


def must_be(name: str, requirement: str, value: object, hint: str = "") -> UserError:
    """Return the error for a value of the wrong type or out of range: ``batch.pairs must be positive, got 0``."""
    return UserError(f"{name} must be {requirement}, got {shown(value)}" + (hint and f": {hint}"))


def suggestion(name: str, choices: Collection[str]) -> str:
    """Return ``did you mean X?`` with the choice closest to an unknown name, or list all choices if none is close."""
    matches = get_close_matches(name, choices, 1)
    return f"did you mean {matches[0]}?" if matches else f"choose from {', '.join(choices)}"


class _ShortRepr(reprlib.Repr):
    """A ``repr`` of bounded length and depth, because an untrusted value may be huge or contain itself."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 200, 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


shown = _ShortRepr().repr
"""Return a short ``repr`` of an untrusted value for messages, however large or deeply nested the value is."""


def reason(error: BaseException) -> str:
    """Return an error's text as one short line, with its type if the text alone is unclear (``KeyError: 'x'``)."""
    message, type_name = " ".join(str(error).split())[:200], type(error).__name__
    if not message:
        return type_name
    return message if isinstance(error, OSError | ValueError | ImportError) else f"{type_name}: {message}"


@contextmanager
def from_outside(name: str, remedy: str) -> Iterator[None]:
    """Context manager that turns any exception raised by a library into a one-line ``UserError``: name, reason, remedy.

    For single calls into libraries that parse untrusted files: tokenizers, templates, configs, archives. They may raise
    any type of exception. Never put code of this program inside: its own bugs must keep their tracebacks.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{name}: {reason(error)}: {remedy}") from error
