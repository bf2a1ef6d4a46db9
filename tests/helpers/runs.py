"""Whole runs in processes of their own, for tests that stop them as an operating system does.

The processes are forked from a server that has imported what is slow to import and has not started jax, so each
begins as a fresh one would, some seconds sooner.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpo_jax.runs.directory import read_json

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["dpo_jax.train", "dpo_jax.commands.evaluate", "transformers.models.auto.tokenization_auto"]
)
PATIENCE = 600  # seconds for whatever is waited for


@dataclass(frozen=True)
class Running:
    """A command in a process of its own; what it says goes to a file."""

    process: BaseProcess
    output: Path

    def said(self) -> str:
        """All that it wrote so far, to stdout or stderr."""
        return self.output.read_text()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.send(signal.SIGKILL)
        self.process.join()

    def code(self) -> int:
        """Its exit code, when it has ended by itself."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"it did not end: {self.said()}"
        return self.process.exitcode

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Until something is true; it must come before the command ends."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert self.process.is_alive(), f"it ended with {self.process.exitcode}: {self.said()}"
            assert time.monotonic() < deadline, f"it never came: {self.said()}"
            time.sleep(0.002)


@contextmanager
def called(
    function: Callable[..., int | None],
    *arguments: Any,
    output: Path,
    devices: int = 1,
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """A function that a module can name, called in a process; what it returns is the exit code."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags += [f"--xla_force_host_platform_device_count={devices}"] if devices > 1 else []
    settings = {**(env or {}), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    process = _server.Process(target=_call, args=(function, arguments, str(output), settings))
    process.start()
    try:
        yield Running(process, output)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def started(*argv: Any, **settings: Any) -> AbstractContextManager[Running]:
    """``dpo-jax`` with these arguments; it is killed at the end of the block if it still runs. The rest: ``called``."""
    return called(_command, [str(word) for word in argv], **settings)


@contextmanager
def joined(
    count: int,
    function: Callable[..., int | None],
    *arguments: Any,
    folder: Path,
    env: Callable[[int], Mapping[str, str]] = lambda process: {},
) -> Iterator[list[Running]]:
    """A function in so many processes that are joined over this machine's network, with 8 devices between them.

    What process i says goes to ``folder/said-i``; it has the variables ``env(i)``.
    """
    hosts = {"DPO_JAX_COORDINATOR": f"localhost:{free_port()}", "DPO_JAX_NUM_PROCESSES": str(count),
             "DPO_JAX_START_TIMEOUT": "300"}  # fmt: skip
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                called(function, *arguments, output=folder / f"said-{i}", devices=8 // count,
                       env={**hosts, **env(i), "DPO_JAX_PROCESS_ID": str(i)})
            )
            for i in range(count)
        ]  # fmt: skip


def started_jointly(count: int, *argv: Any, **settings: Any) -> AbstractContextManager[list[Running]]:
    """``dpo-jax`` with these arguments in so many processes."""
    return joined(count, _command, [str(word) for word in argv], **settings)


def killed(lines: Sequence[int], *argv: Any, run: Path, output: Path, chance: random.Random) -> None:
    """Start a command once for each of ``lines``, and kill it up to a second after its metrics have more than that."""
    for count in lines:
        starts = len(events(run, "data")) if run.exists() else 0
        with started(*argv, output=output) as running:
            running.wait_for(lambda: run.exists() and len(events(run, "data")) > starts)  # noqa: B023
            running.wait_for(lambda: num_lines(run / "metrics.jsonl") > count)  # noqa: B023
            time.sleep(chance.random())
            running.kill()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ended(*argv: Any, output: Path, **settings: Any) -> tuple[int, str]:
    """Exit code of a command that is left to end by itself, and all that it said."""
    with started(*argv, output=output, **settings) as running:
        return running.code(), running.said()


def _call(function: Callable[..., int | None], arguments: tuple, output: str, settings: Mapping[str, str]) -> None:
    os.environ.update(settings)
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # ignored where the tests run in a shell's background, or under nohup
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    jax.config.update("jax_platforms", "cpu")
    code = function(*arguments)
    jax.distributed.shutdown()  # as at an interpreter's end, which a forked process does not come to
    sys.stdout.flush()
    sys.exit(code)


def _command(argv: list[str]) -> int:
    from dpo_jax.cli import main

    return main(argv)


def num_lines(path: Path) -> int:
    """Whole lines of a log."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def events(run: Path, kind: str) -> list[dict]:
    """What happened to a run, of one kind."""
    return [event for event in read_json(run / "events.jsonl") if event["event"] == kind]


def saved_arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a save, weights, moments and counters, by its path."""
    path, handler = run / "checkpoints" / str(step) / "state", ocp.PyTreeCheckpointHandler()
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    return ocp.tree.to_flat_dict(tree, sep="/")


def saved_bits(run: Path, step: int) -> dict[str, bytes]:
    """The same as types and bytes, to be compared."""
    return {name: f"{x.dtype}{x.shape} ".encode() + x.tobytes() for name, x in saved_arrays(run, step).items()}


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """A config file; JSON is YAML."""
    path.write_text(json.dumps(config))
    return path
