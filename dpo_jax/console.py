"""Write to the terminal; text that cannot be written (closed pipe, full disk) is dropped, and the command continues."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from typing import Any

from tqdm import tqdm


def say(enabled: bool, line: str) -> None:
    """If ``enabled``, print a line on stderr above the progress bar, in process 0 only."""
    from dpo_jax.parallel.hosts import is_writer  # imported lazily, because it imports JAX

    if enabled and is_writer():
        tqdm.write(line, file=sys.stderr)


warn = partial(say, True)  # regardless of run.progress


def progress_line(done: int, total: int, unit: str, enabled: bool) -> tqdm:
    """Return a progress bar on stderr with steps, time left and the values passed to ``set_postfix``."""
    return tqdm(total=total, initial=done, unit=unit, disable=not enabled, dynamic_ncols=True, leave=True)


class LossyStream:
    """Text stream that drops text it cannot write; ``first_error`` is None if nothing was dropped."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.first_error: Exception | None = None

    def write(self, text: str) -> int:
        """Write text, escaping characters that the stream's encoding cannot represent."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream; an error is recorded in ``first_error``."""
        self._try("flush")

    def discard(self) -> None:
        """Drop the buffer if a write failed, because flushing it at interpreter exit would fail again."""
        self.flush()
        if self.first_error is not None:
            with suppress(OSError, ValueError), open(os.devnull, "w") as devnull:  # not every stream is a file
                os.dup2(devnull.fileno(), self._stream.fileno())

    def _try(self, action: str, *text: str) -> None:
        try:
            getattr(self._stream, action)(*text)
        except Exception as error:  # noqa: BLE001 (a notebook's streams raise other types than files)
            self.first_error = self.first_error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lossy_streams() -> Iterator[tuple[LossyStream, LossyStream]]:
    """Context manager that keeps writes to stdout and stderr, by any library, from raising; yields both streams."""
    with open(os.devnull, "w") as devnull:  # in place of streams closed before the interpreter started
        out, err = LossyStream(sys.stdout or devnull), LossyStream(sys.stderr or devnull)
        with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
            try:
                yield out, err
            finally:
                out.flush()
                err.flush()


def open_descriptors() -> None:
    """Open file descriptors 0 to 2 if they are closed, so that no log file gets number 2 and receives stderr output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open() takes the lowest free number, this one
