"""Agreement between the processes of a run, and a coordinated stop at the same step.

With a single process, all functions return immediately.
"""

import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import distributed  # no public API gives access to the coordination service
from jax.experimental import multihost_utils

from dpo_jax import errors, signals
from dpo_jax.errors import UserError

TIMEOUT = 600  # seconds that processes wait for each other by default
LONG_TIMEOUT = 7 * 24 * 3600  # seconds to wait for work of unknown length; if a process dies, jax ends all of them
VISIBILITY_TIMEOUT = 10.0  # seconds within which a file written by one host must be visible to the others

Result = TypeVar("Result")

_gather_numbers = itertools.count()  # every process gathers in the same order, so these numbers match
_own_keys: list[str] = []  # of values that this process sent and other processes may still read


class HostsMissing(UserError):
    """Some processes did not connect or answer in time; restarting all processes may help."""

    exit_code = 1


def cache_compilations() -> None:
    """Cache compiled programs in the user's home, unless a cache folder is set, so that a restart is fast."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "dpo_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def list_processes(processes: list[int]) -> str:
    """Join process ids for a message, at most 16 of them, and count the others."""
    return ", ".join(map(str, processes[:16])) + (f" and {len(processes) - 16} more" if len(processes) > 16 else "")


def timeout_message(timeout: int, missing_ids: list[int], num_processes: int) -> str:
    """Return the message about processes that did not arrive within ``timeout`` seconds."""
    return f"timed out after {timeout:g} s waiting for process {list_processes(missing_ids)} of {num_processes}"


def is_writer() -> bool:
    """Return whether this is process 0, which writes the files of the run: logs, config, exports."""
    return jax.process_index() == 0


def connected_process() -> tuple[int, int] | None:
    """Return this process's id and the number of processes, or None if it was not connected to others."""
    state = distributed.global_state
    return None if state.client is None else (state.process_id, state.num_processes)


def gather(value: Any, what: str, timeout: int = TIMEOUT) -> list[Any]:
    """Return one JSON value per process, in process order. All processes must make the same calls in the same order.

    Args:
        what: name of the operation, for error messages.
        timeout: seconds to wait for the other processes.

    Raises:
        HostsMissing: some processes sent no value in time; the message names them.
    """
    if jax.process_count() == 1:
        return [value]
    client = distributed.global_state.client
    assert client is not None, "several processes must be started by start_hosts"
    prefix = f"dpo_jax/{next(_gather_numbers)}/{what.replace('/', '_')}/"
    client.key_value_set(f"{prefix}{jax.process_index()}", json.dumps(value))
    deadline = time.monotonic() + timeout
    values = []
    for process in range(jax.process_count()):
        remaining_ms = max(int(1000 * (deadline - time.monotonic())), 1)
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{prefix}{process}", remaining_ms)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            arrived_ids = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(prefix)}
            missing_ids = sorted(set(range(jax.process_count())) - arrived_ids)
            problem = timeout_message(timeout, missing_ids, jax.process_count())
            raise HostsMissing(f"{what}: {problem}: read the logs of missing processes, then restart all") from error
    _forget_gathered(client, f"{prefix}{jax.process_index()}")
    return values


def _forget_gathered(client: Any, key: str) -> None:
    """Delete this process's value of the previous `gather`; every process has read it, as each sent its next value."""
    _own_keys.append(key)
    if len(_own_keys) > 1:
        client.key_value_delete(_own_keys.pop(0))


def barrier(what: str, timeout: int = TIMEOUT) -> None:
    """Wait until every process calls this; raise ``HostsMissing`` with the ids of the processes that time out."""
    gather(None, what, timeout)


def make_shared(directory, what: str) -> None:
    """Create a directory (an ``epath.Path`` or ``pathlib.Path``) and verify that all processes share it.

    Raises:
        UserError: the directory cannot be created, or a process does not see a file that process 0 wrote there.
    """
    error = None
    probe = directory / f".seen-by-all-{time.time_ns()}"
    is_multiprocess = jax.process_count() > 1
    if is_writer():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if is_multiprocess:
                probe.touch()
        except OSError as cause:
            error = UserError(f"{what}: {directory} cannot be written ({cause.strerror}): choose another run.dir")
    agree(error, what)
    if not is_multiprocess:
        return
    probe = directory / gather(probe.name, what)[0]
    deadline = time.monotonic() + VISIBILITY_TIMEOUT
    while not (is_visible := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    unsynced_processes = [process for process, sees in enumerate(gather(is_visible, what)) if not sees]
    if is_writer():
        probe.unlink()
    if unsynced_processes:
        problem = f"process {list_processes(unsynced_processes)} does not see what process 0 wrote there"
        raise UserError(f"{what}: {directory} is not shared: {problem}: use a run.dir that all hosts mount")


def writer_first(make: Callable[[], Result], what: str) -> Result:
    """Call ``make()`` on process 0, then on all others, which find the files that process 0 wrote to the shared disk.

    The others wait up to ``LONG_TIMEOUT``. A ``UserError`` on any process is raised on all of them.
    """
    results, error = [], None
    for is_own_turn in (is_writer(), not is_writer()):
        try:
            results += [make()] if is_own_turn else []
        except UserError as user_error:
            error = user_error
        agree(error, what, timeout=LONG_TIMEOUT)
    return results[0]


def on_writer(act: Callable[[], Result], what: str) -> Result:
    """Call ``act()`` on process 0, and return its JSON result, or raise its ``UserError``, on all processes."""
    result, error = None, None
    if is_writer():
        try:
            result = act()
        except UserError as refusal:
            error = refusal
    agree(error, what, timeout=LONG_TIMEOUT)
    return gather(result, what)[0]


def agree(error: UserError | None, what: str, timeout: int = TIMEOUT) -> None:
    """Raise, on every process, the error of the first process that has one, so that all stop together."""
    report = None if error is None else [type(error).__name__, str(error)]
    for kind, text in filter(None, gather(report, what, timeout)):
        raise getattr(errors, kind, UserError)(text) from error


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Context manager that defers a stop signal to the end of a step and yields ``stop_requested(step) -> bool``.

    Every process must call ``stop_requested`` after every step. It returns True at the same step in all processes,
    whichever of them received SIGTERM: jax's own handler, installed at startup, agrees on a step that no process has
    passed. In a single-process run, Ctrl-C and SIGHUP request a stop too; a second Ctrl-C interrupts immediately.

    Signals are deferred from the first call on: before the first step there is nothing to save. One that came too late
    for a step is raised again at the end.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    requested: int | None = None  # number of the signal
    previous_handlers: dict[int, Any] = {}

    def request(number, frame):
        nonlocal requested
        requested = number
        signals.defer(number)
        signal.signal(signal.SIGINT, previous_handlers[signal.SIGINT])
        name = signal.Signals(number).name
        print(f"\n{name} received: stopping after this step; press Ctrl-C to stop immediately", file=sys.stderr)

    is_answered = False

    def stop_requested(step: int) -> bool:
        nonlocal is_answered
        if not previous_handlers:
            for number in signals.SIGNALS:
                previous_handlers[number] = signal.getsignal(number)
            for number, handler in previous_handlers.items():
                if (number, handler) != (signal.SIGHUP, signal.SIG_IGN):  # nohup
                    signal.signal(number, request)
        is_answered = requested is not None
        return is_answered

    try:
        yield stop_requested
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if requested is not None and not is_answered:
        signal.raise_signal(requested)
