"""The layout of a run directory; its files are written so that a run can be killed at any time.

Logs are append-only JSON lines. A checkpoint records their lengths; resuming from it truncates them to these lengths,
so that they read as if the run had never stopped.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_jax import storage
from dpo_jax.bucket import PROBE, Bucket, is_remote, probe
from dpo_jax.errors import RunStopped, UserError, reason
from dpo_jax.runs.mirror import CHECKPOINTS, EVENTS, PUSH_SECONDS, Mirror, locked_mirror

Event = Literal["start", "data", "restore", "save", "save_failed", "preempt", "error", "end"]
LOCK = "run.lock"


def _path(name: str) -> Any:
    return property(lambda run: run.root / name)


@dataclass(frozen=True)
class RunDir:
    """The paths of a run's files; of a run in a bucket, ``root`` is the local copy of all but the checkpoints."""

    root: Path
    mirror: Mirror | None = None  # of a run in a bucket
    config = _path("config.yaml")  # the resolved options, including all defaults
    export = _path("export")  # the model as a Hugging Face directory
    metrics = _path("metrics.jsonl")  # one object per logged step: functions of data, seed and step only
    timings = _path("timings.jsonl")  # clocks, throughput and memory of the same steps
    distributions = _path("distributions.jsonl")  # one object per evaluation and set: reward distributions
    samples = _path("samples.jsonl")  # one object per evaluation and prompt: answers
    events = _path(EVENTS)  # starts, saves, restores, stops; never truncated
    profile = _path("profile")  # profiler traces of ``run.profile_steps``
    report = _path("report.html")  # the report for people

    @property
    def location(self) -> str:
        """The path or url that names the run."""
        return str(self.root) if self.mirror is None else self.mirror.bucket.url

    @property
    def checkpoints(self) -> Path | str:
        """Path or url of the saved steps, each with its manifest."""
        name = CHECKPOINTS.rstrip("/")
        return self.root / name if self.mirror is None else f"{self.location}/{name}"

    def push(self, patience: float = PUSH_SECONDS) -> None:
        """Upload the local copy of a run in a bucket, as `Mirror.push` does; any other run needs no such thing."""
        if self.mirror is not None:
            self.mirror.push(patience)

    @property
    def logs(self) -> tuple[Path, ...]:
        """Paths of the logs that are truncated, when a run resumes, to the step that it resumes from."""
        return self.metrics, self.timings, self.distributions, self.samples


def is_run_dir(path: str | Path) -> bool:
    """Return whether a run of this program was ever started in the directory or bucket."""
    if is_remote(path):
        bucket = Bucket.named("run", str(path))
        return any(bucket.stat(name) is not None for name in (EVENTS, LOCK))
    return (Path(path) / EVENTS).is_file() or (Path(path) / LOCK).is_file()


def find_run(path: str | Path) -> RunDir:
    """Return the paths of an existing run; of one in a bucket, the files of its model are downloaded."""
    if is_remote(path):
        run = run_at(path, copy="read")
        if not is_run_dir(path):
            raise UserError(f"run directory {path} has no {EVENTS}, so it is not a run of this program: check the path")
        assert run.mirror is not None
        run.mirror.pull_model(run.config.name)
        return run
    root = _local(path)
    if not root.exists():
        raise UserError(f"run directory {path} does not exist; check the path")
    if not is_run_dir(root):
        raise UserError(f"run directory {path} has no {EVENTS}, so it is not a run of this program: check the path")
    return RunDir(root)


def run_at(path: str | Path, process: int = 0, copy: str = "runs") -> RunDir:
    """Return the paths of the run in a directory or bucket, for one of its processes; nothing is read or written.

    ``copy``: the kind of local copy that a run in a bucket has.

    Raises:
        UserError: the path has a scheme other than ``gs://``.
    """
    if not is_remote(path):
        return RunDir(_local(path))
    bucket = Bucket.named("run.dir", str(path))
    root = storage.local_copy(copy, bucket.url, process)
    return RunDir(root, Mirror(bucket, root))


@contextmanager
def locked_run(path: str | Path, say: Callable[[str], None] = lambda line: None) -> Iterator[RunDir]:
    """Context manager that creates or reopens a run directory and locks it; only the writer process calls it.

    ``say`` is called with a line before it waits for the lock of a bucket.

    Raises:
        UserError: another process trains there, the directory is not a run, or it cannot be written. In these
            cases nothing in it is changed.
    """
    run = run_at(path)
    with ExitStack() as stack:
        has_ours = is_run_dir if run.mirror is None else lambda root: True
        root = stack.enter_context(locked_directory(run.root, LOCK, has_ours, "run of this program", str(path)))
        if run.mirror is not None:
            with in_use(path):
                server_time = probe(run.mirror.bucket)
                _refuse_other_objects(run.mirror.bucket)
                stack.enter_context(locked_mirror(run.mirror, LOCK, server_time, say))
        with writing(run.events):
            for folder in (root, *(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())):
                storage.remove_partial_files(folder)
            storage.drop_torn_line(run.events)
        yield run


def _refuse_other_objects(bucket: Bucket) -> None:
    objects, folders = bucket.entries()
    names = {name for name in (*objects, *folders) if not name.startswith(PROBE)}
    if names and not names & {EVENTS, LOCK}:
        raise UserError(f"run.dir: {bucket.url} has other files but no run of this program: choose an empty directory")


@contextmanager
def in_use(path: str | Path) -> Iterator[None]:
    """Context manager that turns `storage.InUse` into a one-line ``UserError``."""
    try:
        yield
    except storage.InUse as error:
        remedy = "wait for it, stop it, or choose another directory"
        raise UserError(f"run.dir: {path} is in use by {error}: {remedy}") from error


def holds_files(folder: Path) -> bool:
    """Return whether a folder exists and holds more than what a stopped ``dpo-jax doctor`` tried there."""
    return folder.is_dir() and any(not path.name.startswith(PROBE) for path in folder.iterdir())


@contextmanager
def locked_directory(
    path: str | Path, lock_name: str, has_ours: Callable[[Path], bool], ours: str, shown: str | None = None
) -> Iterator[Path]:
    """Context manager that creates ``run.dir``, or reopens it if ``has_ours`` is true, and locks ``lock_name`` in it.

    Messages name ``shown`` in place of the path of a local copy.

    Raises:
        UserError: another process has locked it, it has other files only, or it cannot be written. In these cases
            nothing in it is changed.
    """
    root, path = _local(path), shown or path
    try:
        if holds_files(root) and not has_ours(root):
            raise UserError(f"run.dir: {path} has other files but no {ours}: choose an empty directory")
        root.mkdir(parents=True, exist_ok=True)
        with in_use(path):
            lock = storage.lock(root / lock_name)
    except OSError as error:
        message = f"run.dir: {path} cannot be written or locked ({error.strerror}): choose another directory"
        raise UserError(message) from error
    with lock:
        with writing(root / lock_name):
            storage.sign(lock)
        yield root


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UserError(f"run.dir: {path} is not a local path: mount the bucket, or copy the directory afterwards")
    return storage.expanded(path).absolute()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns an ``OSError`` from writing a run's file into a one-line ``RunStopped``.

    Partial writes are truncated when the run resumes.
    """
    try:
        yield
    except OSError as error:
        remedy = "free space or correct the path, then run the same command again to resume"
        raise RunStopped(f"{path}: cannot be written ({error.strerror or reason(error)}): {remedy}") from error


def append_json(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON line in a single write; equal values always give equal bytes.

    Numbers may be numpy or jax scalars; floats are written by ``repr``, the shortest text that reads back as the same
    float64. JSON has no infinities or NaN: they become the strings "Infinity", "-Infinity", "NaN", as ``float`` reads.
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
    """Return the complete lines of a log, dropping a truncated last line; an absent file has no lines.

    Raises:
        UserError: the file is not a log.
    """
    try:
        rows = [json.loads(line) for line in storage.read_lines(path)]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged: {reason(error)}: restore the file") from error
    return rows


def last_metrics(run: RunDir) -> dict[str, float]:
    """Return the last logged value of each of the run's training and evaluation metrics."""
    metrics: dict[str, float] = {}
    for row in read_json(run.metrics):
        metrics |= row
    return metrics


def log_event(run: RunDir, event: Event, **facts: Any) -> None:
    """Append an event with the time (seconds since 1970, UTC) and this process's id."""
    append_json(run.events, {"event": event, "time": time.time(), "pid": os.getpid(), **facts})


def log_offsets(run: RunDir) -> dict[str, dict[str, Any]]:
    """Sync the logs to disk and return, by name, ``size`` in bytes and ``digest`` of each, for a checkpoint."""
    offsets = {}
    for path in run.logs:
        with writing(path):
            size = storage.file_size(path, durable=True)
            offsets[path.name] = {"size": size, "digest": storage.hash_start(path, size)}
    return offsets


def empty_logs(run: RunDir) -> None:
    """Truncate the logs to nothing."""
    for path in run.logs:
        _truncate(path, 0)


def truncate_logs(run: RunDir, offsets: Mapping[str, Mapping[str, Any]]) -> None:
    """Truncate the logs to the lengths that ``log_offsets`` returned.

    Raises:
        UserError: a log is shorter than its offset or was edited; no log is changed then.
    """
    logs = {run.root / name: offset["size"] for name, offset in offsets.items()}
    remedy = "restore the file, or start in a new run.dir"
    for path, offset in logs.items():
        try:
            size, digest = storage.file_size(path), storage.hash_start(path, offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)}): {remedy}") from error
        if size < offset:
            raise UserError(f"{path}: has {size} bytes, but had {offset} at the step to resume from: {remedy}")
        if digest != offsets[path.name]["digest"]:
            raise UserError(f"{path}: was edited: its first {offset} bytes are not those of the save: {remedy}")
    for path, offset in logs.items():
        _truncate(path, offset)


def _truncate(path: Path, size: int) -> None:
    if path.exists():
        with writing(path):
            storage.truncate(path, size)


def lost_checkpoints(run: RunDir) -> UserError | None:
    """Return the error for a run without checkpoints whose events record a finished save, or None for a new run.

    A save is known to have finished once the same process started another, or logged its end or preemption.
    """
    num_saves = 0
    try:
        events = read_json(run.events)
    except UserError as error:
        return error
    for event in events:
        kind = event.get("event")
        num_saves = 0 if kind in ("start", "save_failed") else num_saves + (kind == "save")
        if num_saves > 1 or kind in ("restore", "preempt", "end"):
            remedy = "restore the checkpoints, or choose a new run.dir, as starting over empties its logs"
            return UserError(
                f"run.dir: {run.location} was saved before, but {run.checkpoints} has no checkpoint: {remedy}"
            )
    return None
