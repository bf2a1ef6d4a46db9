"""What a run directory holds, and how its files are written so that a run can be killed at any moment.

Logs are append-only JSON lines; a checkpoint records how long they were, and continuing from
it cuts them back to that, so that they read as if the run had never stopped.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_jax import storage
from dpo_jax.errors import RunStopped, UserError, reason

Event = Literal["start", "data", "restore", "save", "preempt", "end"]
LOCK, EVENTS = "run.lock", "events.jsonl"


class _Inside:
    """A path below the root of a run."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, run: "RunDir", kind: type) -> Path:
        return run.root / self.name


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    root: Path
    config = _Inside("config.yaml")  # the resolved options, every default spelled out
    checkpoints = _Inside("checkpoints")  # saved steps, each with its manifest
    export = _Inside("export")  # the model as a Hugging Face directory
    metrics = _Inside("metrics.jsonl")  # one object a logged step: functions of data, seed and step only
    timings = _Inside("timings.jsonl")  # clocks, throughput and memory of the same steps
    distributions = _Inside("distributions.jsonl")  # one object an evaluation and set: what its means stand for
    events = _Inside(EVENTS)  # what happened to the run: never cut back
    profile = _Inside("profile")  # traces of the steps that ``run.profile_steps`` names
    report = _Inside("report.html")  # what a person looks at

    @property
    def logs(self) -> tuple[Path, ...]:
        """What is cut back to the step that a run resumes from."""
        return self.metrics, self.timings, self.distributions


def is_run_dir(path: str | Path) -> bool:
    """Whether a run of this program was ever started in the directory."""
    return (Path(path) / EVENTS).is_file() or (Path(path) / LOCK).is_file()


def find_run(path: str | Path) -> RunDir:
    """An existing run, to read from it.

    Raises:
        UserError: the path is no run directory.
    """
    root = _local(path)
    if not root.exists():
        raise UserError(f"run directory {path}: does not exist: check the path")
    if not is_run_dir(root):
        raise UserError(f"run directory {path}: holds no {EVENTS}, so it is no run of this program: check the path")
    return RunDir(root)


@contextmanager
def hold_run(path: str | Path) -> Iterator[RunDir]:
    """Make or reopen a run directory and keep it to this process; with several processes, the writer alone does so.

    Raises:
        UserError: another process trains there, the directory is something else, or it cannot be written. Nothing
            was touched then.
    """
    root = _local(path)
    try:
        if root.is_dir() and any(root.iterdir()) and not is_run_dir(root):
            raise UserError(f"run.dir: {path} holds other files and no run of this program: choose an empty directory")
        root.mkdir(parents=True, exist_ok=True)
        lock = storage.lock(root / LOCK)
    except storage.InUse as owner:
        remedy = "wait for it, stop it, or choose another directory"
        raise UserError(f"run.dir: {path} is in use by {owner}: {remedy}") from owner
    except OSError as error:
        text = f"run.dir: {path} cannot be written or locked ({error.strerror}): choose another directory"
        raise UserError(text) from error
    with lock:
        run = RunDir(root)
        with writing(run.events):
            storage.drop_torn_line(run.events)
        yield run


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UserError(f"run.dir: {path} is not a local path: mount the bucket, or copy the directory afterwards")
    return Path(path).expanduser().absolute()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a run's file that cannot be written ends the run with one line, as a save that cannot be written does.

    What was written halfway is cut off when the run resumes.

    Raises:
        RunStopped: a full disk, a read-only one, or the like.
    """
    try:
        yield
    except OSError as error:
        remedy = "free space or correct the path, then run the same command again to resume"
        raise RunStopped(f"{path}: cannot be written ({error.strerror or reason(error)}): {remedy}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it always holds its old text or its new one, whole.

    Raises:
        RunStopped: it cannot be written.
    """
    with writing(path):
        storage.write_whole(path, text)


def append_json(path: Path, values: dict[str, Any]) -> None:
    """Append one line, in one write. Equal values always give equal bytes.

    Numbers may be numpy or jax scalars; floats are written by ``repr``, the shortest text that reads back to the same
    float64. JSON has no infinities or NaN: they become the texts "Infinity", "-Infinity", "NaN", which ``float`` reads.

    Raises:
        RunStopped: it cannot be written.
    """
    line = json.dumps(_plain(values), allow_nan=False, ensure_ascii=False)
    with writing(path):
        storage.append_line(path, line)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, str | int | float | None):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_json(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a log; a last line that was cut off while written is left out. No file: no lines."""
    return [json.loads(line) for line in storage.read_lines(path)]


def last_metrics(run: RunDir) -> dict[str, float]:
    """The last step's metrics and the last evaluation, as they were logged."""
    last: dict[str, float] = {}
    for row in read_json(run.metrics):
        last |= row
    return last


def log_event(run: RunDir, event: Event, **facts: Any) -> None:
    """Append what happened, with the time (seconds since 1970, UTC) and this process's id."""
    append_json(run.events, {"event": event, "time": time.time(), "pid": os.getpid(), **facts})


def log_offsets(run: RunDir) -> dict[str, int]:
    """Lengths in bytes of the logs that are cut back, for a checkpoint; what they count is on the disk by then."""
    offsets = {}
    for path in run.logs:
        with writing(path):
            offsets[path.name] = storage.file_size(path, durable=True)
    return offsets


def cut_back(run: RunDir, offsets: dict[str, int]) -> None:
    """Shorten the logs to what they were when ``log_offsets`` gave these.

    Raises:
        UserError: a log is shorter than that, or was changed; neither is touched then.
    """
    logs = {run.root / name: offset for name, offset in offsets.items()}
    for path, offset in logs.items():
        size, remedy = storage.file_size(path), "restore the file, or start in a new run.dir"
        if size < offset:
            raise UserError(f"{path}: has {size} bytes, but {offset} at the step to resume from: {remedy}")
        if not storage.ends_line(path, offset):
            raise UserError(f"{path}: byte {offset} ends no line, but did at the step to resume from: {remedy}")
    for path, offset in logs.items():
        if path.exists():
            with writing(path):
                storage.cut(path, offset)


def lost_saves(run: RunDir) -> UserError | None:
    """The error when no save is there although the events name a finished one; None: it is a new run.

    A save is finished when the same process began another, or said that it ended or was stopped.
    """
    begun = 0
    for event in read_json(run.events):
        kind = event["event"]
        begun = 0 if kind == "start" else begun + (kind == "save")
        if begun > 1 or kind in ("restore", "preempt", "end"):
            remedy = "restore the saves, or choose a new run.dir, as starting over empties its logs"
            return UserError(f"run.dir: {run.root} was saved before, but {run.checkpoints} holds no save: {remedy}")
    return None
