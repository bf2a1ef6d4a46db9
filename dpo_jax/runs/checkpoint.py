"""Save checkpoints atomically in the background, and keep the newest and the best.

A step is a directory with two items that Orbax commits together: ``state``, the arrays, and ``manifest``, JSON (see
manifest.py) with the shape, dtype and checksum of every array. Only this file and restore.py use Orbax.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_jax.bucket import RETRY
from dpo_jax.config import CheckpointConfig
from dpo_jax.console import warn
from dpo_jax.errors import RunStopped, StorageDenied, StorageUnreachable, UserError, reason
from dpo_jax.parallel import hosts
from dpo_jax.runs.bucket_steps import bucket_of, in_bucket, move_step, remove_leftovers, storage_faults
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
READ_ATTEMPTS, READ_RETRY_SECONDS = 10, 10.0  # of a step in a bucket; each attempt has the patience of its clients
Json = Mapping[str, Any]


class Checkpoints:
    """The checkpoints of a run that is training. Every process creates one instance and makes the same calls.

    Use it as a context manager: on exit it waits for the last save.
    """

    def __init__(self, directory, config: CheckpointConfig, report: Callable[[str], None] = warn):
        """Open or create the directory, which all processes share; ``report`` is called with a line per damaged step.

        Raises:
            UserError: the directory cannot be written, or some process sees a different directory.
        """
        self.directory = epath.Path(directory)
        self.config = config
        self._report = report
        self._pending: int | None = None
        self._manager: ocp.CheckpointManager | None = None  # created by the first save, after damaged steps are renamed
        if not in_bucket(self.directory):
            hosts.make_shared(self.directory, "checkpoints")
        self._metrics = read_metrics(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Return the steps that process 0 finds on disk, oldest first; a save in progress is not among them."""
        return hosts.on_writer(lambda: saved_steps(self.directory), "saved steps")

    def manifest(self) -> dict | None:
        """Return the newest readable manifest, without reading any array; None if there is none."""
        for step in reversed(self.steps()):
            try:
                return read_manifest(self.directory, step)
            except Damaged:
                continue  # restore() reports the step and renames it
        return None

    def check_best_metric(self, metrics: Json) -> None:
        """Raise ``UserError`` if ``best_metric`` is set but is not among the metrics of an evaluation."""
        name = self.config.best_metric
        if name is not None and name not in metrics:
            names_text = ", ".join(sorted(metrics))
            remedy = f"available: {names_text}" if metrics else "there is no evaluation set: set data.eval"
            raise UserError(f"checkpoint.best_metric: {name!r} is not an evaluation metric; {remedy}")

    def save(self, step: int, state: Any, manifest: Json, metrics: Json | None = None, wait: bool = False) -> bool:
        """Start saving a step in the background; once this returns, the arrays may be donated to the next step.

        Args:
            step: number of steps done.
            state: pytree of jax arrays on one set of devices.
            manifest: from ``make_manifest``, with this step's ``offsets`` and ``extras``.
            metrics: the evaluation at this step, if there was one; must contain ``best_metric``.
            wait: return only when the step is on disk.

        Returns:
            False if this step was saved before; nothing is written, as a step's state is a function of the run.

        Raises:
            RunStopped: this save or the previous one could not be written.
            StorageUnreachable: the same, because the storage of a bucket does not answer; it can be tried again.
            UserError: ``best_metric`` is not among the metrics.
        """
        self.wait()
        if step in self.steps():
            return False
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            self.check_best_metric(metrics)
            self._metrics[step] = metrics
        leaves = describe_leaves(state)
        for name, checksum in leaf_checksums(state).items():
            leaves[name]["checksum"] = checksum
        sealed = seal(json.loads(json.dumps({**manifest, "step": step, "leaves": leaves, "metrics": metrics})))
        arguments = {STATE: ocp.args.PyTreeSave(state), MANIFEST: ocp.args.JsonSave(sealed)}
        self._start(step, ocp.args.Composite(**arguments))
        if wait:
            self.wait()
        return True

    def _start(self, step: int, arguments: ocp.args.Composite) -> None:
        error = None
        try:
            with _stop_on_failure(self.directory, step):
                self._manager = self._manager or _make_manager(self.directory, self)
                self._pending = step
                self._manager.save(step, args=arguments, force=True)
        except (RunStopped, StorageUnreachable) as failure:
            if not in_bucket(self.directory):
                raise
            error, self._pending, self._manager = failure, None, None
            self._metrics.pop(step, None)
        if in_bucket(self.directory):
            hosts.agree(error, f"start of the save of step {step}", 2 * hosts.TIMEOUT)

    def wait(self) -> None:
        """Wait until the save in progress is on disk; if it failed, raise the error of `save` on every process."""
        if self._manager is None or self._pending is None:
            return
        step, error = self._pending, None
        try:
            with _stop_on_failure(self.directory, step):
                self._manager.wait_until_finished()
                if hosts.is_writer() and step not in saved_steps(self.directory):
                    raise FileNotFoundError("the background save did not finish")
        except (RunStopped, StorageUnreachable) as failure:
            error = failure
            self._metrics.pop(step, None)
            self._manager = None  # closing it would raise the same error again
        self._pending = None
        hosts.agree(error, f"save of step {step}", 2 * hosts.TIMEOUT)

    def close(self) -> None:
        """Wait for the save in progress and stop the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, abstract_state: Any) -> tuple[Any, dict] | None:
        """Restore the newest intact step; damaged ones are reported and renamed to ``STEP.damaged``.

        Args:
            abstract_state: the state's pytree of ``jax.ShapeDtypeStruct`` with the target shardings; the number of
                devices and processes may differ from that of the save.

        Returns:
            State and manifest; None if nothing was ever saved here.

        Raises:
            RunStopped: there are checkpoints, but none is usable. The run never starts over by itself.
            UserError: a checkpoint has different arrays than ``abstract_state``.
        """
        assert self._pending is None, "restore must not be called during a save"
        reasons = {}
        for candidate in reversed(self.steps()):
            try:
                return _read_patiently(self.directory, candidate, abstract_state)
            except Damaged as damage:
                reasons[candidate] = str(damage)
                self._set_aside(candidate, str(damage))
        names = hosts.on_writer(self._set_aside_names, "damaged steps")
        if names:
            details = ", ".join(names) + "".join(f"; {number}: {reason}" for number, reason in reasons.items())
            remedy = "restore a good copy of a step, or choose a new run.dir"
            raise RunStopped(f"checkpoints: no checkpoint in {self.directory} is usable ({details}): {remedy}")
        return None

    def _set_aside_names(self) -> list[str]:
        if in_bucket(self.directory):
            names = [name.rstrip("/") for name in bucket_of(self.directory).entries()[1]]
        else:
            names = [path.name for path in self.directory.iterdir()]
        return sorted(name for name in names if DAMAGED in name)

    def _set_aside(self, step: int, reason: str) -> None:
        damaged_path = hosts.on_writer(lambda: self._rename(step), f"setting aside step {step}")
        if hosts.is_writer():
            self._report(f"checkpoint of step {step} is damaged ({reason}): renamed to {damaged_path}")
        self._metrics.pop(step, None)

    def _rename(self, step: int) -> str:
        if in_bucket(self.directory):
            return str(self.directory / move_step(bucket_of(self.directory), step, DAMAGED))
        damaged_path, num_copies = self.directory / f"{step}{DAMAGED}", 1
        while damaged_path.exists():
            num_copies += 1
            damaged_path = self.directory / f"{step}{DAMAGED}-{num_copies}"
        (self.directory / str(step)).rename(damaged_path)
        return str(damaged_path)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Return which checkpoints to keep, the newest and the best; Orbax calls this as a preservation policy."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        metrics = {step: self._metrics[step] for step in steps if step in self._metrics}
        kept_steps = {*sorted(steps)[-self.config.keep :], *rank_steps(metrics, self.config)[: self.config.keep_best]}
        return [step in kept_steps for step in steps]


def _read_patiently(directory: epath.Path, step: int, abstract_state: Any) -> tuple[Any, dict]:
    """Read a step as `read_step`, and again if the storage of a bucket does not answer."""
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read_step(directory, step, abstract_state)
        except StorageUnreachable as error:
            warn(f"{str(error).removesuffix(RETRY)}: trying again")
            time.sleep(READ_RETRY_SECONDS)
    return read_step(directory, step, abstract_state)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Return False: hosts.py handles preemption.

        Orbax calls this from a background thread with past steps, which would reset jax's step counter of this process.
        The processes could then agree to stop at a step that one has already passed, and the others would wait for it.
        """
        return False


def _make_manager(directory: epath.Path, policy: Checkpoints) -> ocp.CheckpointManager:
    if in_bucket(directory) and hosts.is_writer():
        remove_leftovers(bucket_of(directory))
    # With explicit processes, Orbax waits at the coordination service, with timeouts, and not in a device collective.
    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=not in_bucket(directory),
        lightweight_initialize=True,  # metrics are read from our manifests
        preservation_policy=policy,
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
        async_options=ocp.options.AsyncOptions(timeout_secs=int(hosts.TIMEOUT)),
    )
    return _Manager(directory, options=options)


@contextmanager
def _stop_on_failure(directory: epath.Path, step: int) -> Iterator[None]:
    """Context manager that turns any error of a save, whatever its type, into a one-line ``RunStopped``."""
    try:
        with storage_faults(directory, f"cannot save step {step}"):
            yield
    except (StorageUnreachable, StorageDenied):
        raise
    except Exception as error:
        failure = f"checkpoint of step {step}: could not be written to {directory} ({reason(error)})"
        raise RunStopped(f"{failure}: free space or correct the path, then run the same command again") from error
