"""Where a run's numbers go: files that are always written, and trackers that may be added."""

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

MAX_WAITING = 10_000  # rows that may wait for a tracker
CLOSE_SECONDS = 60  # for a tracker to take what is left at the end


class MetricsLog:
    """Writes a run's logs, in the one process that does; every other process holds one that writes nothing.

    Use it as a context manager: leaving closes the trackers.
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
        """Append a line to metrics.jsonl: functions of (data, seed, step) only, as float32 gave them."""
        if self._writes:
            row = {name: plain(value) for name, value in values.items()}
            append_json(self._run.metrics, {"step": step, **row})
            self._track(step, row)

    def evaluation(self, step: int, values: Mapping[str, Any], distributions: Sequence[Mapping[str, Any]]) -> None:
        """``metrics`` of an evaluation, and a line for each set to distributions.jsonl, which no tracker takes."""
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


def plain(value: Any) -> float | int:
    """A Python number of a scalar of any array library."""
    return value if isinstance(value, int | float) else value.item()


def clipped(values: Mapping[str, float | int], max_grad_norm: float | None) -> dict[str, int]:
    """``clipped``, 1 where the step's gradient was made smaller; nothing where the optimizer does not clip."""
    return {} if max_grad_norm is None else {"clipped": int(values["grad_norm"] > np.float32(max_grad_norm))}


def all_finite(values: Mapping[str, float | int]) -> bool:
    """Whether loss and gradient are finite; other metrics may be absent of meaning."""
    return all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))


class Tracker:
    """A tracker in a thread of its own: one that fails or hangs is dropped with one line, and training continues.

    Raises:
        UserError: its package is not installed.
    """

    def __init__(self, name: str, run: RunDir):
        self._name, self._dropped, self._thread = name, False, None
        self._rows: queue.SimpleQueue = queue.SimpleQueue()  # (step, row); at the end, whether the run failed
        try:
            start = TRACKERS[name](run)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (its library raises whatever comes up)
            self._drop(reason(error))
        else:
            self._thread = threading.Thread(target=self._follow, args=start, daemon=True)
            self._thread.start()

    def put(self, step: int, row: Mapping[str, Any]) -> None:
        """Hand a row over."""
        if self._rows.qsize() >= MAX_WAITING and not self._dropped:
            self._drop(f"it left {MAX_WAITING} rows waiting")
        if not self._dropped:
            self._rows.put((step, row))

    def close(self, failed: bool) -> None:
        """Wait until the rows are taken, ``CLOSE_SECONDS`` at most."""
        if self._thread is None or self._dropped:
            return
        self._rows.put(failed)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._drop(f"it did not end within {CLOSE_SECONDS} s")

    def _follow(self, track: Callable[[int, Mapping[str, Any]], Any], close: Callable[[bool], Any]) -> None:
        try:
            while not isinstance(row := self._rows.get(), bool):
                track(*row)
            close(row)
        except Exception as error:  # noqa: BLE001 (its library raises whatever comes up)
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
        writer.flush()  # so that a full disk is an error here, and not in the library's own thread only

    return track, lambda failed: writer.close()


def _wandb(run: RunDir):
    try:
        import wandb
    except ImportError as error:
        raise UserError("run.trackers: wandb is not installed: pip install 'dpo_jax[tracking]'") from error
    tracked = wandb.init(dir=str(run.root), id=run.root.name, resume="allow")
    return lambda step, row: tracked.log(dict(row), step=step), lambda failed: tracked.finish(exit_code=int(failed))


TRACKERS = {  # by name: of a run, the function that takes a step and its row, and the one that ends it
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def memory() -> dict[str, float]:
    """Peak memory so far, GiB: of this process, and of its fullest device where the backend reports it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    usage = {"host_memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)}
    stats = [_memory_stats(device) for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [device_stats["peak_bytes_in_use"] for device_stats in stats if "peak_bytes_in_use" in device_stats]
    return usage | ({"device_memory_gib": round(max(peaks) / 2**30, 3)} if peaks else {})


def _memory_stats(device: jax.Device) -> Mapping[str, int]:
    """What the backend says of a device's memory: nothing, where it has no such function."""
    try:
        return device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        return {}
