"""Processes of one run: agreeing between them, and stopping them at the same step.

In one process everything here is immediate: nothing is started, agreed or waited for.
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
from jax._src import distributed  # the only ways to what jax finds out, and to its coordination service
from jax.experimental import multihost_utils

from dpo_jax import errors
from dpo_jax.errors import UserError

TIMEOUT = 600  # seconds that processes wait for each other, if nothing else is said
PATIENCE = 7 * 24 * 3600  # seconds for work of one process that has no bound; jax ends all if that process dies
SEEN_WITHIN = 10.0  # seconds in which a shared file system shows one host's file to the others

Made = TypeVar("Made")

_turns = itertools.count()  # every process makes the same gathers in the same order, so this numbers them alike


class HostsMissing(UserError):
    """Some processes of the run did not come in time; starting all of them again may cure it."""

    exit_code = 1


def keep_compilations() -> None:
    """Keep compiled programs on disk, where the user has not chosen a place, so that a second start is quick."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "dpo_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def listed(processes: list[int]) -> str:
    """Process ids for a message, at most 16 of them."""
    shown = ", ".join(map(str, processes[:16]))
    return shown if len(processes) <= 16 else f"{shown} and {len(processes) - 16} more"


def is_writer() -> bool:
    """Whether this process writes what is written once: logs, config, exports."""
    return jax.process_index() == 0


def gather(value: Any, what: str, timeout: int = TIMEOUT) -> list[Any]:
    """Every process's JSON value, by process id. All processes call it, in the same order.

    Args:
        what: names the step in errors.
        timeout: seconds to wait for the others.

    Raises:
        HostsMissing: naming the processes that sent nothing in time.
    """
    if jax.process_count() == 1:
        return [value]
    client = distributed.global_state.client
    assert client is not None, "several processes are joined by start_hosts only"
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
            came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(room)}
            absent = sorted(set(range(jax.process_count())) - came)
            raise HostsMissing(
                f"{what}: timed out after {timeout:g} s waiting for process {listed(absent)} of "
                f"{jax.process_count()}: read its log, then start all processes again"
            ) from error
    return values


def barrier(what: str, timeout: int = TIMEOUT) -> None:
    """Wait until every process is here; raises ``HostsMissing`` naming those that are not."""
    gather(None, what, timeout)


def make_shared(directory, what: str) -> None:
    """Make a directory (an ``epath.Path`` or ``pathlib.Path``), and make sure that all processes mean the same one.

    Raises:
        UserError: it cannot be made, or what process 0 writes there does not appear to another process.
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
        raise UserError(f"{what}: {directory} is not shared: process {listed(blind)} does not see what process 0 "
                        "wrote there: use a run.dir on a file system that all hosts mount")  # fmt: skip


def writer_first(make: Callable[[], Made], what: str) -> Made:
    """``make()`` of process 0, then of all others at once, who find on a common disk what it has left there.

    Waits for it as long as it takes. What one of them raises as a ``UserError`` is raised on all.
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
    """Raise on every process the error of the lowest process that has one, so that all of them stop alike."""
    report = None if error is None else [type(error).__name__, str(error)]
    for kind, text in filter(None, gather(report, what, timeout)):
        raise getattr(errors, kind, UserError)(text) from error


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Inside, a request to stop waits for the end of a step; gives ``stop_requested(step) -> bool``.

    ``stop_requested`` is called by every process after every step. It becomes true at the same step in all of them,
    whichever was asked. The request is SIGTERM. With several processes jax's own handler, set when they were
    started, takes it and agrees on a step that none has passed. In one process Ctrl-C asks too; the second
    Ctrl-C interrupts at once.
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
