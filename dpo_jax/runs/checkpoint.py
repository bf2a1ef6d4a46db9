"""Saving steps of a run: in the background, each whole or absent, the newest and the best kept.

A step is a directory with two items that Orbax commits together: ``state``, the arrays, and ``manifest``, JSON (see
manifest.py) with the shape, type and checksum of every array. No file but this and restore.py knows Orbax.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_jax.config import CheckpointConfig
from dpo_jax.console import warn
from dpo_jax.errors import RunStopped, UserError, reason
from dpo_jax.parallel import hosts
from dpo_jax.runs.checksums import describe_leaves, leaf_checksums
from dpo_jax.runs.restore import (
    MANIFEST,
    STATE,
    Damaged,
    rank_steps,
    read_manifest,
    read_metrics,
    read_step,
    saved_steps,
)
from dpo_jax.storage import seal

DAMAGED = ".damaged"
Json = Mapping[str, Any]


class Checkpoints:
    """The saved steps under one directory, for the run that writes them. Every process makes one and calls it alike.

    Use it as a context manager: leaving waits for the last save.
    """

    def __init__(self, directory, config: CheckpointConfig, notice: Callable[[str], None] = warn):
        """Open a directory, or make it.

        Args:
            directory: a path that every process sees.
            config: what is kept.
            notice: takes the one line that is said about each damaged step.

        Raises:
            UserError: it cannot be written, or some process sees another directory.
        """
        self.directory = epath.Path(directory)
        self.config = config
        self._notice = notice
        self._pending: int | None = None
        self._manager: ocp.CheckpointManager | None = None  # made by the first save, after damaged steps are set aside
        hosts.make_shared(self.directory, "checkpoints")
        self._metrics = read_metrics(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that are on the disk as process 0 sees it, oldest first; a save in progress is not among them."""
        return hosts.gather(saved_steps(self.directory), "saved steps")[0]

    def manifest(self) -> dict | None:
        """Manifest of the newest step that has one, to be compared before any array is read; None: there is none."""
        for step in reversed(self.steps()):
            try:
                return read_manifest(self.directory, step)
            except Damaged:
                continue  # restore() says so, and sets it aside
        return None

    def refuse_unmeasured(self, metrics: Json) -> None:
        """Raise one line if these metrics of an evaluation do not say which step is best."""
        name = self.config.best_metric
        if name is not None and name not in metrics:
            names = ", ".join(sorted(metrics))
            remedy = f"available: {names}" if metrics else "there is no evaluation set: give data.eval"
            raise UserError(f"checkpoint.best_metric: {name!r} is not an evaluation metric; {remedy}")

    def save(self, step: int, state: Any, manifest: Json, metrics: Json | None = None, wait: bool = False) -> bool:
        """Begin to save a step; the arrays may be donated to the next step as soon as this returns.

        Args:
            step: its number.
            state: pytree of jax arrays on one set of devices.
            manifest: of ``make_manifest``, with ``offsets`` and ``extras`` of this step.
            metrics: the evaluation at this step, if there was one; must hold ``best_metric``.
            wait: return only when the step is on the disk.

        Returns:
            False: this step was saved before (a step's state is a function of the run), and nothing was done.

        Raises:
            RunStopped: this save or the one before could not be written.
            UserError: ``best_metric`` is not among the metrics.
        """
        self.wait()
        if step in self.steps():
            return False
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            self.refuse_unmeasured(metrics)
            self._metrics[step] = metrics
        leaves = describe_leaves(state)
        for name, checksum in leaf_checksums(state).items():
            leaves[name]["checksum"] = checksum
        written = seal(json.loads(json.dumps({**manifest, "step": step, "leaves": leaves, "metrics": metrics})))
        items = {STATE: ocp.args.PyTreeSave(state), MANIFEST: ocp.args.JsonSave(written)}
        self._manager = self._manager or _make_manager(self.directory, self._preserve)
        self._pending = step
        with _surfaced(self.directory, step):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Wait until the save in progress is on the disk; ``RunStopped`` on every process if it was not written."""
        if self._manager is None or self._pending is None:
            return
        step, error = self._pending, None
        try:
            with _surfaced(self.directory, step):
                self._manager.wait_until_finished()
                if hosts.is_writer() and step not in saved_steps(self.directory):
                    raise FileNotFoundError("it was given up in the background")
        except RunStopped as stopped:
            error = stopped
            self._metrics.pop(step, None)
            self._manager = None  # it would say the same again when it is closed
        self._pending = None
        hosts.agree(error, f"save of step {step}", 2 * hosts.TIMEOUT)

    def close(self) -> None:
        """Wait, and end the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, abstract_state: Any) -> tuple[Any, dict] | None:
        """The newest step that proves good; a damaged one is renamed to ``STEP.damaged``, and one line says why.

        Args:
            abstract_state: the state's pytree of ``jax.ShapeDtypeStruct``, with the shardings wanted: any number of
                devices and processes.

        Returns:
            State and manifest; None: nothing was ever saved here.

        Raises:
            RunStopped: there were saves and none is good. The run never starts over by itself.
            UserError: the state has other arrays than this run.
        """
        assert self._pending is None, "restore before the first save"
        reasons = {}
        for candidate in reversed(self.steps()):
            try:
                return read_step(self.directory, candidate, abstract_state)
            except Damaged as damage:
                reasons[candidate] = str(damage)
                self._set_aside(candidate, str(damage))
        names = sorted(path.name for path in self.directory.iterdir() if DAMAGED in path.name)
        if names:
            why = "".join(f"; {number}: {reason}" for number, reason in reasons.items())
            remedy = "restore a good copy of a step, or choose a new run.dir"
            raise RunStopped(f"checkpoints: no save in {self.directory} is good ({', '.join(names)}{why}): {remedy}")
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        path = self.directory / str(step)
        if hosts.is_writer():
            aside, copies = self.directory / f"{step}{DAMAGED}", 1
            while aside.exists():
                copies += 1
                aside = self.directory / f"{step}{DAMAGED}-{copies}"
            path.rename(aside)
            self._notice(f"checkpoint of step {step} is damaged ({reason}): set aside as {aside}")
        self._metrics.pop(step, None)
        hosts.barrier(f"setting aside step {step}")

    def _preserve(self, steps: list[int]) -> set[int]:
        saved = {step: self._metrics[step] for step in steps if step in self._metrics}
        return {*sorted(steps)[-self.config.keep :], *rank_steps(saved, self.config)[: self.config.keep_best]}


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: stopping belongs to hosts.py.

        Orbax asks from its background thread about steps long past, which sets jax's count of this process back, so
        that the processes agree on a step that one of them has left: it then never stops, and the others wait for it.
        """
        return False


class _Retention:
    """Orbax's policy protocol over a function from steps to those that stay."""

    def __init__(self, preserve: Callable[[list[int]], set[int]]):
        self._preserve = preserve

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self._preserve([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _make_manager(directory: epath.Path, preserve: Callable[[list[int]], set[int]]) -> ocp.CheckpointManager:
    # Naming the processes makes Orbax wait at the coordination service, with timeouts, and not in a device collective.
    several = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # metrics are read from our manifests
        preservation_policy=_Retention(preserve),
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=several),
        async_options=ocp.options.AsyncOptions(timeout_secs=int(hosts.TIMEOUT)),
    )
    return _Manager(directory, options=options)


@contextmanager
def _surfaced(directory: epath.Path, step: int) -> Iterator[None]:
    """Whatever Orbax raises about a save becomes one line for the user."""
    try:
        yield
    except Exception as error:
        failed = f"checkpoint of step {step}: could not be written to {directory} ({reason(error)})"
        raise RunStopped(f"{failed}: free space or correct the path, then run the same command again") from error
