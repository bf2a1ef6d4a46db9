"""A run's logs: JSON-lines files, which are always written, and optional trackers."""

import queue
import resource
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.config import RunConfig
from dpo_jax.console import warn
from dpo_jax.errors import UserError, reason
from dpo_jax.runs.directory import RunDir, append_json

MAX_QUEUED = 10_000  # rows that may be queued for a tracker
CLOSE_SECONDS = 60  # time for a tracker to take the remaining rows at the end


class Evaluation(NamedTuple):
    """Results of an evaluation, which depend only on (data, seed, step)."""

    metrics: Mapping[str, float]
    distributions: Sequence[Mapping[str, Any]] = ()  # one object per set
    samples: Sequence[Mapping[str, Any]] = ()  # one object per prompt


class MetricsLog:
    """Writer of a run's logs; if ``writes`` is false, as on all processes but one, it does nothing.

    Use it as a context manager: on exit it closes the trackers.
    """

    def __init__(self, run: RunDir, config: RunConfig, writes: bool):
        self._run = run
        self._writes = writes
        self._trackers = [Tracker(name, run) for name in config.trackers] if writes else []

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Log float32 values that depend only on (data, seed, step), to metrics.jsonl and the trackers."""
        if self._writes:
            append_json(self._run.metrics, {"step": step, **values})
            self._track(step, values)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log an evaluation: metrics to all logs, distributions and samples only to the files named after them."""
        self.metrics(step, evaluation.metrics)
        if self._writes:
            for distribution in evaluation.distributions:
                append_json(self._run.distributions, {"step": step, **distribution})
            for sample in evaluation.samples:
                append_json(self._run.samples, {"step": step, **sample})

    def timings(self, step: int, values: Mapping[str, Any]) -> None:
        """Log clocks, throughput and memory, to timings.jsonl and the trackers."""
        if self._writes:
            append_json(self._run.timings, {"step": step, **values})
            self._track(step, {f"timings/{name}": value for name, value in values.items()})

    def _track(self, step: int, row: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.put(step, row)


def clipped(values: Mapping[str, float | int], max_grad_norm: float | None) -> dict[str, int]:
    """Return {"clipped": 1 if the step's gradient was clipped, else 0}, or {} if the optimizer does not clip."""
    return {} if max_grad_norm is None else {"clipped": int(values["grad_norm"] > np.float32(max_grad_norm))}


class Tracker:
    """A tracker that runs in its own thread; if it fails or hangs, it is dropped with a warning and training continues.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, name: str, run: RunDir):
        self._name, self._dropped, self._thread = name, False, None
        self._rows: queue.SimpleQueue = queue.SimpleQueue()  # of (step, row), and last a bool: whether the run failed
        try:
            track_and_close = TRACKERS[name](run)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (tracker libraries raise errors of any type)
            self._drop(reason(error))
        else:
            self._thread = threading.Thread(target=self._follow, args=track_and_close, daemon=True)
            self._thread.start()

    def put(self, step: int, row: Mapping[str, Any]) -> None:
        """Queue a row for the tracker."""
        if self._rows.qsize() >= MAX_QUEUED and not self._dropped:
            self._drop(f"{MAX_QUEUED} rows are waiting for it")
        if not self._dropped:
            self._rows.put((step, row))

    def close(self, failed: bool) -> None:
        """Wait at most ``CLOSE_SECONDS`` until the tracker has processed all rows, then close it."""
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
        warn(f"tracker {self._name} failed: {why}: the run continues without it, and metrics.jsonl has every row")


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


def peak_memory() -> dict[str, float]:
    """Return the peak memory in GiB of this process and, if the backend reports it, of its fullest device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    usage = {"host_memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)}
    peaks = []
    for device in (device for device in jax.local_devices() if device.platform != "cpu"):
        with suppress(jax.errors.JaxRuntimeError, KeyError):  # the backend has no statistics
            peaks.append((device.memory_stats() or {})["peak_bytes_in_use"])
    return usage | ({"device_memory_gib": round(max(peaks) / 2**30, 3)} if peaks else {})
