"""Terminal output. Text that a closed pipe or a full disk refuses is dropped, and the command continues."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from typing import Any

from tqdm import tqdm


def say(shown: bool, line: str) -> None:
    """A line for the user on stderr, from the first process, above the progress line."""
    from dpo_jax.parallel.hosts import is_writer  # here, because it imports JAX

    if shown and is_writer():
        tqdm.write(line, file=sys.stderr)


warn = partial(say, True)  # whatever run.progress says


def progress_line(done: int, total: int, unit: str, shown: bool) -> tqdm:
    """A live line on stderr: steps, time left, and the values of ``set_postfix``."""
    return tqdm(total=total, initial=done, unit=unit, disable=not shown, dynamic_ncols=True, leave=True)


class LossyStream:
    """A text stream that drops what it cannot write; ``lost`` is the first error, None while nothing was lost."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """Write, escaping characters that the encoding lacks."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush."""
        self._try("flush")

    def discard(self) -> None:
        """After a loss, drop the buffer: flushing it would fail when the interpreter exits."""
        self.flush()
        if self.lost is not None:
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # not every stream is a file
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def _try(self, action: str, *text: str) -> None:
        try:
            getattr(self._stream, action)(*text)
        except Exception as error:  # noqa: BLE001 (a notebook's streams raise other types than files)
            self.lost = self.lost or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lossy_streams() -> Iterator[tuple[LossyStream, LossyStream]]:
    """Make writes to stdout and stderr, by any library, never raise; yields both streams."""
    with open(os.devnull, "w") as nowhere:  # in place of streams closed before the interpreter started
        out, err = LossyStream(sys.stdout or nowhere), LossyStream(sys.stderr or nowhere)
        with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
            try:
                yield out, err
            finally:
                out.flush()
                err.flush()


def open_descriptors() -> None:
    """Open descriptors 0 to 2 if closed: else a log would get such a number, and what libraries write to stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, so this one
