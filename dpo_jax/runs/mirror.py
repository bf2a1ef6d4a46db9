"""A run directory or an output in a bucket, and its copy on this machine's disk, where all but checkpoints is written.

Object stores cannot append, truncate or rename, so logs, config, report and export are local files, which are uploaded
whole: before each save begins, so that the bucket holds all that a checkpoint counts, and when the run ends, however it
ends. Local files of an earlier start are never trusted: a start empties the copy and fills it from the bucket.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dpo_jax.bucket import LAST_NAMES, LAST_SECONDS, PROBE, Bucket, upload_order
from dpo_jax.errors import UserError
from dpo_jax.runs.bucket_lock import BucketLock, locked
from dpo_jax.signals import closed_first

CHECKPOINTS = "checkpoints/"  # written by Orbax straight to the bucket
MODEL = "model/"  # config.json and tokenizer
EVENTS = "events.jsonl"  # which makes a folder that of a run
FIRST_NAMES = (EVENTS, ".manifest.json")  # without which the other files would be refused
PUSH_SECONDS = 30.0  # patience before a save, which can be tried again at the next


@dataclass
class Mirror:
    """Local copy ``root`` of a run in ``bucket``, or of its files ``names`` in a folder that may hold others."""

    bucket: Bucket
    root: Path
    names: tuple[str, ...] = ()
    lock: BucketLock | None = None  # None on processes that do not write
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> size and time of the file in the bucket
    _mutex: threading.Lock = field(default_factory=threading.Lock)  # a signal may make two threads push

    def pull(self) -> None:
        """Download the files."""
        stored = filter(self.bucket.stat, self.names) if self.names else self.bucket.walk(skip=CHECKPOINTS)
        for name in stored:
            if not name.startswith(PROBE) and (self.lock is None or name != self.lock.name):
                self.bucket.download(name, self.root / name)
                self._pushed[name] = _version(self.root / name)

    def pull_model(self, config_name: str) -> None:
        """Download the run's options and the files next to its model, which a reader of its checkpoints needs."""
        for name in (config_name, *self.bucket.walk(MODEL)):
            with suppress(FileNotFoundError):  # of a run that stopped before it wrote them
                self.bucket.download(name, self.root / name)

    def push(self, patience: float = PUSH_SECONDS) -> None:
        """Upload what has changed, and delete from the bucket what was deleted here.

        Raises:
            RunStopped: another process has taken the run over; nothing is written then.
            StorageUnreachable: storage did not answer within ``patience`` seconds.
        """
        assert self.lock is not None, "only the process that holds the lock writes"
        with self._mutex:
            self.lock.renew()
            bucket = self.bucket.with_patience(patience)
            versions = {name: _version(self.root / name) for name in self._names()}
            changed = [name for name, version in versions.items() if self._pushed.get(name) != version]
            replaced = {name for name in changed if name in self._pushed and PurePosixPath(name).name in LAST_NAMES}
            for name in (set(self._pushed) - set(versions)) | replaced:  # no old config.json stands next to new weights
                bucket.delete(name)
                del self._pushed[name]
            for name in sorted(changed, key=lambda name: (not name.endswith(FIRST_NAMES), upload_order(name))):
                bucket.upload(self.root / name, name)
                self._pushed[name] = versions[name]

    def _names(self) -> set[str]:
        """Return the files that are there, but for unfinished ones and the lock."""
        assert self.lock is not None
        names = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}
        return {name for name in names if name != self.lock.name and ".partial" not in name}


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def locked_mirror(mirror: Mirror, lock_name: str, server_time: float, say: Callable[[str], None]) -> Iterator[None]:
    """Context manager that locks a folder in a bucket, and refills its local copy; at the end it is pushed.

    It is pushed too if the block ends with an error or by a signal, whatever the main thread does then.

    ``mirror.root`` exists, and this process has locked ``lock_name`` there. ``server_time`` is what `probe` returned.

    Raises:
        UserError: storage does not answer.
        InUse: another process holds the lock.
    """
    with locked(mirror.bucket, lock_name, server_time, say) as lock:
        empty(mirror.root, keep=lock_name)
        mirror.lock = lock
        mirror.pull()

        def close() -> None:
            _try_to_push(mirror, say)
            lock.release()

        with closed_first(close):
            try:
                yield
                mirror.push(LAST_SECONDS)
            except BaseException:
                _try_to_push(mirror, say)
                raise


def _try_to_push(mirror: Mirror, say: Callable[[str], None]) -> None:
    """Push a run that ends with an error, which is what the user has to see."""
    try:
        mirror.push()
    except UserError as error:
        if mirror.lock is None or mirror.lock.lost_to is None:
            say(f"the last changes were not uploaded: {error}")


def empty(root: Path, keep: str = "") -> None:
    """Create a local copy, or delete everything in it but the file ``keep``."""
    root.mkdir(parents=True, exist_ok=True)
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()
