"""What can go wrong for a user, and the exit code each kind carries."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Wrong usage, config, data, model or run directory: one line that names the thing, the value and the remedy.

    Names and values come from outside, so the text may be given with any characters; those that would break the line
    or steer a terminal are replaced.
    """

    exit_code = 2

    def __init__(self, text: str):
        plain = (c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
        super().__init__("".join(plain))


class Preempted(UserError):
    """The run was asked to stop and saved its state; running the same command again continues it."""

    exit_code = 42


class RunStopped(UserError):
    """The run met something that a restart will not cure, such as a loss that is not finite."""

    exit_code = 43


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise one line that names the thing, its value and the remedy, unless the condition holds."""
    if not condition:
        raise unusable(name, value, remedy)


def unusable(name: str, value: object, remedy: str) -> UserError:
    """The line that names a thing, its value and the remedy."""
    return UserError(f"{name}: {shown(value)} cannot be used: {remedy}")


class _Short(reprlib.Repr):
    """A bounded ``repr``: what a file or caller gives may be endless, by its size or by references to itself."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 200, 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


shown = _Short().repr
"""``repr`` of a value from outside, for messages: short, however large or deep the value is."""


def reason(error: BaseException) -> str:
    """What an error says, in one short line; its type too, where the text alone says little (``KeyError: 'x'``)."""
    text, name = " ".join(str(error).split())[:200], type(error).__name__
    if not text:
        return name
    return text if isinstance(error, OSError | ValueError | ImportError) else f"{name}: {text}"


@contextmanager
def from_outside(name: str, remedy: str) -> Iterator[None]:
    """Inside, whatever a library raises over something from outside becomes one line: name, reason, remedy.

    For single calls into libraries that read what others wrote: tokenizers, templates, configs, archives. They raise
    anything, so the type says nothing. Code of this program does not belong inside: its own faults must keep their
    tracebacks.

    Raises:
        UserError: the library raised something.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{name}: {reason(error)}: {remedy}") from error
