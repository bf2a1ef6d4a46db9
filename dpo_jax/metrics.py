"""Where a run's numbers go: two files that are always written, trackers that may be added, and a line to watch."""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dpo_jax.config import RunConfig
from dpo_jax.errors import UserError
from dpo_jax.rundir import RunDir, append_json


class MetricsLog:
    """Writes a run's logs, in the one process that does; every other process holds one that writes nothing."""

    def __init__(self, run: RunDir, config: RunConfig, writes: bool):
        """Open the trackers.

        Raises:
            UserError: a tracker's package is not installed.
        """
        self._run = run
        self._writes = writes
        self._trackers = [TRACKERS[name](run) for name in config.trackers] if writes else []

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl: functions of (data, seed, step) only, as float32 gave them."""
        if self._writes:
            row = {name: plain(value) for name, value in values.items()}
            append_json(self._run.metrics, {"step": step, **row})
            for track in self._trackers:
                track(step, row)

    def evaluation(self, step: int, values: Mapping[str, Any], distributions: Sequence[Mapping[str, Any]]) -> None:
        """``metrics`` of an evaluation, and a line for each set to distributions.jsonl, which no tracker takes."""
        self.metrics(step, values)
        if self._writes:
            for found in distributions:
                append_json(self._run.distributions, {"step": step, **found})

    def timings(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to timings.jsonl: clocks, throughput, memory."""
        if self._writes:
            append_json(self._run.timings, {"step": step, **values})
            for track in self._trackers:
                track(step, {f"timings/{name}": value for name, value in values.items()})


def plain(value: Any) -> float | int:
    """A Python number of a scalar of any array library."""
    return value if isinstance(value, int | float) else value.item()


def clipped(values: Mapping[str, float | int], max_grad_norm: float | None) -> dict[str, int]:
    """``clipped``, 1 where the step's gradient was made smaller; nothing where the optimizer does not clip."""
    return {} if max_grad_norm is None else {"clipped": int(values["grad_norm"] > np.float32(max_grad_norm))}


def all_finite(values: Mapping[str, float | int]) -> bool:
    """Whether loss and gradient are finite; other metrics may be absent of meaning."""
    return all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))


def _tensorboard(run: RunDir):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("run.trackers: tensorboard needs the package tensorboardX: pip install 'dpo_jax[tracking]'"
                        ) from error  # fmt: skip
    writer = SummaryWriter(str(run.root / "tensorboard"))

    def track(step: int, row: Mapping[str, float | int]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return track


def _wandb(run: RunDir):
    try:
        import wandb
    except ImportError as error:
        raise UserError("run.trackers: wandb needs the package wandb: pip install 'dpo_jax[tracking]'") from error
    tracked = wandb.init(dir=str(run.root), id=run.root.name, resume="allow")
    return lambda step, row: tracked.log(dict(row), step=step)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def memory() -> dict[str, float]:
    """Peak memory so far, GiB: of this process, and of its fullest device where the backend tells."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    found = {"host_memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)}
    stats = [_memory_stats(device) for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return found | ({"device_memory_gib": round(max(peaks) / 2**30, 3)} if peaks else {})


def _memory_stats(device: jax.Device) -> Mapping[str, int]:
    """What the backend says of a device's memory: nothing, where it has no such function."""
    try:
        return device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:
        return {}


def progress_line(done: int, total: int, unit: str, shown: bool) -> tqdm:
    """A live line on stderr: steps, time left, and what ``set_postfix`` is given."""
    return tqdm(total=total, initial=done, unit=unit, disable=not shown, dynamic_ncols=True, leave=True)


def say(shown: bool, line: str) -> None:
    """A line for the user on stderr, from the first process, above the progress line."""
    if shown and jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)
