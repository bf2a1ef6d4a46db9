"""End a command on SIGTERM, SIGINT or SIGHUP, whatever it is doing.

The main thread raises an exception, so that everything open is closed. If it cannot, as it is inside a compilation or
another long call of a library, a thread ends the process after a few seconds. Nothing is lost by that: all files are
written so that a process may be killed at any point, and what must be uploaded is uploaded first, see `closed_first`.

While a run takes steps, parallel/hosts.py replaces these handlers: the step is finished and saved first.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dpo_jax.errors import Terminated

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 3.0  # for the main thread to end by itself
INTERRUPTED = 130  # the shell's code for Ctrl-C
_closers: list[Callable[[], None]] = []  # of the blocks of `closed_first` that are open
_num_deferred: Counter[int] = Counter()  # by signal, how often `defer` was called


def defer(number: int) -> None:
    """Do not end the process for this signal: its handler has arranged for an end after the state is saved."""
    _num_deferred[number] += 1


def outcome(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the last line and the exit code of a command that a signal ended."""
    if isinstance(error, Terminated):
        return f"dpo-jax: {error}", error.exit_code
    return "dpo-jax: interrupted", INTERRUPTED


def _error_of(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(signal.Signals(number).name)


def _end(number: int, frame: object) -> None:
    raise _error_of(number)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Context manager in which the signals end the process: `Terminated`, or ``KeyboardInterrupt`` for SIGINT.

    Signals that are ignored, as SIGHUP is under nohup, stay ignored. Outside the main thread it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    previous_handlers = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in defaults}
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    has_ended = threading.Event()
    _num_deferred.clear()
    threading.Thread(target=_watch, args=(reader, has_ended), daemon=True, name="signals").start()
    try:
        for number in previous_handlers:
            signal.signal(number, _end)
        yield
    finally:
        has_ended.set()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_writer)
        os.close(writer)  # ends the thread


@contextmanager
def closed_first(close: Callable[[], None]) -> Iterator[None]:
    """Context manager in which ``close`` is called before the thread ends the process, however long it takes.

    The thread may call it while the main thread does the same, as it leaves the block.
    """
    _closers.append(close)
    try:
        yield
    finally:
        _closers.remove(close)


def _close() -> bool:
    """Close what is open; return whether there was anything, as the main thread may have ended meanwhile."""
    closers = list(_closers)
    for close in closers:
        with suppress(Exception):  # the process ends in any case
            close()
    return bool(closers)


def _watch(reader: int, has_ended: threading.Event) -> None:
    """Read the numbers of the signals that arrive; if one does not end the process in time, end it here."""
    num_received: Counter[int] = Counter()

    def must_end(number: int) -> bool:
        # a deferred SIGINT leaves the handler of the next one, which is not deferred
        return signal.getsignal(number) is _end and num_received[number] > _num_deferred[number]

    with open(reader, "rb", buffering=0) as numbers:
        while received := numbers.read(1):
            number = received[0]
            num_received[number] += 1
            if not must_end(number):
                continue  # a run saves its state first
            if has_ended.wait(GRACE_SECONDS) or (_close() and has_ended.wait(GRACE_SECONDS)):
                return
            if must_end(number):
                line, exit_code = outcome(_error_of(number))
                os.write(2, f"\n{line}\n".encode())
                os._exit(exit_code)
