"""Errors that a user can fix, each one line, and the exit code of each kind."""

import reprlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """Wrong usage, config, data, model or run directory: one line that names the thing, the value and the remedy.

    ``UserError(name, value, remedy)`` makes that sentence; ``UserError(text)`` takes another one. Names and values come
    from outside, so they may have any characters; those that would break the line or steer a terminal are replaced.
    """

    exit_code = 2

    def __init__(self, name: str, value: object = None, remedy: str = ""):
        text = f"{name}: {shown(value)} cannot be used: {remedy}" if remedy else name
        plain = (c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
        super().__init__("".join(plain))


class Preempted(UserError):
    """The run was asked to stop and saved its state; the same command resumes it."""

    exit_code = 42


class RunStopped(UserError):
    """The run stopped for a cause that a restart will not cure, such as a loss that is not finite."""

    exit_code = 43


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise ``UserError(name, value, remedy)`` unless the condition holds."""
    if not condition:
        raise UserError(name, value, remedy)


def must_be(name: str, wanted: str, value: object, hint: str = "") -> UserError:
    """The line for a value of the wrong type or out of its range: ``batch.pairs must be positive, got 0``."""
    return UserError(f"{name} must be {wanted}, got {shown(value)}" + (hint and f": {hint}"))


def suggestion(name: str, choices: Collection[str]) -> str:
    """``did you mean X?`` with the choice most like an unknown name; if there is none, all choices."""
    near = get_close_matches(name, choices, 1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"


class _Short(reprlib.Repr):
    """A bounded ``repr``: what a file or caller gives may be huge, or contain itself."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 200, 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


shown = _Short().repr
"""``repr`` of a value from outside, for messages: short, however large or deep the value is."""


def reason(error: BaseException) -> str:
    """The text of an error in one short line, with its type where the text alone says little (``KeyError: 'x'``)."""
    text, name = " ".join(str(error).split())[:200], type(error).__name__
    if not text:
        return name
    return text if isinstance(error, OSError | ValueError | ImportError) else f"{name}: {text}"


@contextmanager
def from_outside(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises over outside input into one line: name, reason, remedy.

    For single calls into libraries that read what others wrote: tokenizers, templates, configs, archives. They raise
    anything, so the type says nothing. Code of this program does not belong inside: its own bugs must keep their
    tracebacks.

    Raises:
        UserError: the library raised something.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{name}: {reason(error)}: {remedy}") from error
