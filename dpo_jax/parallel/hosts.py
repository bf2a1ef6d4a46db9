"""Agreement between the processes of a run, and stopping all of them at the same step.

With a single process, everything here returns at once.
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
from jax._src import distributed  # the only access to its coordination service
from jax.experimental import multihost_utils

from dpo_jax import errors
from dpo_jax.errors import UserError

TIMEOUT = 600  # seconds that processes wait for each other by default
PATIENCE = 7 * 24 * 3600  # seconds to wait for work of unknown length; if the working process dies, jax ends all
SEEN_WITHIN = 10.0  # seconds until a shared file system must show one host's file to the others

Made = TypeVar("Made")

_turns = itertools.count()  # every process gathers in the same order, so these numbers agree


class HostsMissing(UserError):
    """Some processes did not arrive in time; restarting all of them may help."""

    exit_code = 1


def keep_compilations() -> None:
    """Cache compiled programs on disk, unless the user has chosen a folder, so that a restart is fast."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "dpo_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def listed(processes: list[int]) -> str:
    """Process ids in a message, at most 16."""
    shown = ", ".join(map(str, processes[:16]))
    return shown if len(processes) <= 16 else f"{shown} and {len(processes) - 16} more"


def timed_out(timeout: int, absent: list[int], num_processes: int) -> str:
    """The message about the processes that did not arrive within ``timeout`` seconds."""
    return f"timed out after {timeout:g} s waiting for process {listed(absent)} of {num_processes}"


def is_writer() -> bool:
    """Whether this process writes the files of the run: logs, config, exports."""
    return jax.process_index() == 0


def gather(value: Any, what: str, timeout: int = TIMEOUT) -> list[Any]:
    """The JSON values of all processes, by process id. Every process must call it, in the same order.

    Args:
        what: named in errors.
        timeout: seconds to wait for the others.

    Raises:
        HostsMissing: names the processes that sent nothing in time.
    """
    if jax.process_count() == 1:
        return [value]
    client = distributed.global_state.client
    assert client is not None, "several processes must be started by start_hosts"
    room = f"dpo_jax/{next(_turns)}/{what.replace('/', '_')}/"
    client.key_value_set(f"{room}{jax.process_index()}", json.dumps(value))
    deadline = time.monotonic() + timeout
    values = []
    for process in range(jax.process_count()):
        left = max(int(1000 * (deadline - time.monotonic())), 1)
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{room}{process}", left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            present = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(room)}
            absent = sorted(set(range(jax.process_count())) - present)
            who = timed_out(timeout, absent, jax.process_count())
            raise HostsMissing(f"{what}: {who}: read its log, then restart all processes") from error
    return values


def barrier(what: str, timeout: int = TIMEOUT) -> None:
    """Wait for every process; raises ``HostsMissing`` with the names of those that do not arrive."""
    gather(None, what, timeout)


def make_shared(directory, what: str) -> None:
    """Create a directory (an ``epath.Path`` or ``pathlib.Path``) and check that all processes see the same one.

    Raises:
        UserError: it cannot be created, or another process does not see what process 0 writes there.
    """
    error, probe = None, directory / f".seen-by-all-{time.time_ns()}"
    several = jax.process_count() > 1
    if is_writer():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if several:
                probe.touch()
        except OSError as cause:
            error = UserError(f"{what}: {directory} cannot be written ({cause.strerror}): choose another run.dir")
    agree(error, what)
    if not several:
        return
    probe = directory / gather(probe.name, what)[0]
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [process for process, sees in enumerate(gather(seen, what)) if not sees]
    if is_writer():
        probe.unlink()
    if blind:
        blind_to = f"process {listed(blind)} does not see what process 0 wrote there"
        raise UserError(f"{what}: {directory} is not shared: {blind_to}: use a run.dir that all hosts mount")


def writer_first(make: Callable[[], Made], what: str) -> Made:
    """``make()`` on process 0, then on all others at once, which find its files on the shared disk.

    Waits as long as it takes. A ``UserError`` of one process is raised on all.
    """
    made, error = [], None
    for turn in (is_writer(), not is_writer()):
        try:
            made += [make()] if turn else []
        except UserError as refused:
            error = refused
        agree(error, what, timeout=PATIENCE)
    return made[0]


def agree(error: UserError | None, what: str, timeout: int = TIMEOUT) -> None:
    """Raise the error of the first process that has one on every process, so that all stop alike."""
    report = None if error is None else [type(error).__name__, str(error)]
    for kind, text in filter(None, gather(report, what, timeout)):
        raise getattr(errors, kind, UserError)(text) from error


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Delay a request to stop until the end of a step; yields ``stop_requested(step) -> bool``.

    Every process must call ``stop_requested`` after every step. It becomes true at the same step in all of them,
    whichever received the request, SIGTERM. With several processes jax's own handler, installed when they started,
    agrees on a step that none has passed. With one process Ctrl-C is a request too; a second Ctrl-C interrupts at once.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    requested = False

    def request(number, frame):
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        print(f"\n{signal.Signals(number).name}: stopping after this step; Ctrl-C stops at once", file=sys.stderr)

    previous = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
