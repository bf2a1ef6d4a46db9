"""A run's metrics logs: files, which are always written, and optional trackers."""

import math
import queue
import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax.config import RunConfig
from dpo_jax.console import warn
from dpo_jax.errors import UserError, reason
from dpo_jax.runs.directory import RunDir, append_json

MAX_WAITING = 10_000  # rows that may be queued for a tracker
CLOSE_SECONDS = 60  # time for a tracker to take the remaining rows at the end


class MetricsLog:
    """Writer of a run's logs; with ``writes`` false, as on all processes but the writer, it does nothing.

    Use it as a context manager: on exit it closes the trackers.
    """

    def __init__(self, run: RunDir, config: RunConfig, writes: bool):
        """Open the trackers.

        Raises:
            UserError: a tracker's package is not installed.
        """
        self._run = run
        self._writes = writes
        self._trackers = [Tracker(name, run) for name in config.trackers] if writes else []

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl: float32 values that are functions of (data, seed, step) only."""
        if self._writes:
            append_json(self._run.metrics, {"step": step, **values})
            self._track(step, values)

    def evaluation(self, step: int, values: Mapping[str, Any], distributions: Sequence[Mapping[str, Any]]) -> None:
        """Log the metrics of an evaluation, and append a line per set to distributions.jsonl (not to trackers)."""
        self.metrics(step, values)
        if self._writes:
            for distribution in distributions:
                append_json(self._run.distributions, {"step": step, **distribution})

    def timings(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to timings.jsonl: clocks, throughput, memory."""
        if self._writes:
            append_json(self._run.timings, {"step": step, **values})
            self._track(step, {f"timings/{name}": value for name, value in values.items()})

    def _track(self, step: int, row: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.put(step, row)


def clipped(values: Mapping[str, float | int], max_grad_norm: float | None) -> dict[str, int]:
    """Return the metric ``clipped``, 1 if the step's gradient was clipped; empty if the optimizer does not clip."""
    return {} if max_grad_norm is None else {"clipped": int(values["grad_norm"] > np.float32(max_grad_norm))}


def all_finite(values: Mapping[str, float | int]) -> bool:
    """Return whether loss and gradient norm are finite; other metrics may be undefined for a step."""
    return all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))


class Tracker:
    """A tracker in its own thread. One that fails or hangs is dropped with a warning, and training continues.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, name: str, run: RunDir):
        self._name, self._dropped, self._thread = name, False, None
        self._rows: queue.SimpleQueue = queue.SimpleQueue()  # of (step, row), and last a bool: whether the run failed
        try:
            functions = TRACKERS[name](run)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (tracker libraries raise errors of any type)
            self._drop(reason(error))
        else:
            self._thread = threading.Thread(target=self._follow, args=functions, daemon=True)
            self._thread.start()

    def put(self, step: int, row: Mapping[str, Any]) -> None:
        """Queue a row for the tracker."""
        if self._rows.qsize() >= MAX_WAITING and not self._dropped:
            self._drop(f"{MAX_WAITING} rows are waiting for it")
        if not self._dropped:
            self._rows.put((step, row))

    def close(self, failed: bool) -> None:
        """Wait until all rows are processed, at most ``CLOSE_SECONDS``."""
        if self._thread is None or self._dropped:
            return
        self._rows.put(failed)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._drop(f"it did not finish within {CLOSE_SECONDS} s")

    def _follow(self, track: Callable[[int, Mapping[str, Any]], Any], close: Callable[[bool], Any]) -> None:
        try:
            while not isinstance(row := self._rows.get(), bool):
                track(*row)
            close(row)
        except Exception as error:  # noqa: BLE001 (tracker libraries raise errors of any type)
            self._drop(reason(error))

    def _drop(self, why: str) -> None:
        self._dropped = True
        warn(f"tracker {self._name}: {why}: dropped, the run continues without it; metrics.jsonl has every row")


def _tensorboard(run: RunDir):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("run.trackers: tensorboardX is not installed: pip install 'dpo_jax[tracking]'") from error
    writer = SummaryWriter(str(run.root / "tensorboard"))

    def track(step: int, row: Mapping[str, float | int]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # raises here on a full disk, not only in the library's own thread

    return track, lambda failed: writer.close()


def _wandb(run: RunDir):
    try:
        import wandb
    except ImportError as error:
        raise UserError("run.trackers: wandb is not installed: pip install 'dpo_jax[tracking]'") from error
    wandb_run = wandb.init(dir=str(run.root), id=run.root.name, resume="allow")
    return lambda step, row: wandb_run.log(dict(row), step=step), lambda failed: wandb_run.finish(exit_code=int(failed))


TRACKERS = {  # name -> function from a run to the functions track(step, row) and close(failed)
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def memory() -> dict[str, float]:
    """Return the peak memory in GiB of this process and, if the backend reports it, of its fullest device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    usage = {"host_memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)}
    stats = [_memory_stats(device) for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [device_stats["peak_bytes_in_use"] for device_stats in stats if "peak_bytes_in_use" in device_stats]
    return usage | ({"device_memory_gib": round(max(peaks) / 2**30, 3)} if peaks else {})


def _memory_stats(device: jax.Device) -> Mapping[str, int]:
    """Return a device's memory statistics; empty if the backend has none."""
    try:
        return device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        return {}
