"""A run directory or an output in a bucket, and its copy on this machine's disk, where all but checkpoints is written.

Object stores cannot append, truncate or rename, so logs, config, report and export are local files, which are uploaded
whole: before each save begins, so that the bucket holds all that a checkpoint counts, and when the run ends, however it
ends. Local files of an earlier start are never trusted: a start empties the copy and fills it from the bucket.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dpo_jax.bucket import Bucket
from dpo_jax.errors import StorageDenied, UserError
from dpo_jax.runs.bucket_lock import BucketLock, locked
from dpo_jax.signals import closed_first

PROBE = ".probe-"  # objects that a start writes and deletes
CHECKPOINTS = "checkpoints/"  # written by Orbax straight to the bucket
MODEL = "model/"  # config.json and tokenizer
EVENTS = "events.jsonl"  # which makes a folder that of a run
FIRST_NAMES = (EVENTS, ".manifest.json")  # without which the other files would be refused
LAST_NAMES = (".index.json", "config.json")  # files that readers trust to be written last
RIGHTS = ("storage.objects.create", "storage.objects.get", "storage.objects.list", "storage.objects.delete")
GET_BUCKET = "storage.buckets.get"  # which Orbax needs to delete a step
PUSH_SECONDS = 30.0  # patience before a save, which can be tried again at the next
LAST_SECONDS = 600.0  # patience when there is no next time


@dataclass
class Mirror:
    """The local copy ``root`` of the files of a run in ``bucket``, or of those called ``names`` in any folder."""

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
            names = self._names()
            for name in sorted(
                names, key=lambda name: (name.endswith(LAST_NAMES), not name.endswith(FIRST_NAMES), name)
            ):
                version = _version(self.root / name)
                if self._pushed.get(name) != version:
                    bucket.upload(self.root / name, name)
                    self._pushed[name] = version
            for name in set(self._pushed) - names:
                bucket.delete(name)
                del self._pushed[name]

    def _names(self) -> set[str]:
        """Return the files that are there, but for unfinished ones and the lock."""
        assert self.lock is not None
        names = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}
        return {name for name in names if name != self.lock.name and ".partial" not in name}


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def locked_mirror(
    mirror: Mirror, lock_name: str, say: Callable[[str], None], has_run: Callable[[set[str]], bool] | None = None
) -> Iterator[None]:
    """Context manager that probes and locks a folder in a bucket, and refills its local copy; at the end it is pushed.

    It is pushed too if the block ends with an error or by a signal, whatever the main thread does then.

    ``has_run``: whether these names, directly in the folder, are those of a run; None: ``mirror`` is of an output, next
    to which there may be others. ``mirror.root`` exists, and this process has locked ``lock_name`` there.

    Raises:
        UserError: storage does not answer or a right is missing, or the folder has other files.
        InUse: another process holds the lock.
    """
    bucket = mirror.bucket
    if has_run is None:
        server_time = probe(bucket, "--output", RIGHTS)
    else:
        server_time = probe(bucket)
        objects, folders = bucket.entries()
        names = {name for name in (*objects, *folders) if not name.startswith(PROBE)}
        if names and not has_run(names):
            problem = f"{bucket.url} has other files but no run of this program"
            raise UserError(f"run.dir: {problem}: choose an empty directory")
    with locked(bucket, lock_name, server_time, say) as lock:
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
            say(f"the last lines are not in the bucket: {error}")


def empty(root: Path, keep: str = "") -> None:
    """Create a local copy, or delete everything in it but the file ``keep``."""
    root.mkdir(parents=True, exist_ok=True)
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()


def probe(bucket: Bucket, option: str = "run.dir", rights: Collection[str] = (*RIGHTS, GET_BUCKET)) -> float:
    """Try each of the rights, by default all that a run needs, and return the server's clock.

    ``option`` gives the folder.

    Raises:
        UserError: some are missing, each is named; or storage does not answer.
    """
    name, missing, times = f"{PROBE}{secrets.token_hex(8)}", [], [time.time()]
    requests = {
        "storage.objects.create": lambda: times.append(bucket.write(name, b"probe").updated),
        "storage.objects.get": lambda: bucket.read(name),
        "storage.objects.list": bucket.entries,
        "storage.objects.delete": lambda: bucket.delete(name),
        GET_BUCKET: bucket.get_bucket,
    }
    for right in rights:
        try:
            requests[right]()
        except StorageDenied as error:
            missing.append((right, error))
        except FileNotFoundError:
            continue  # it could not be written
    if missing:
        names = ", ".join(right for right, _ in missing)
        listed = f"missing rights: {names}: " if len(missing) < len(rights) else ""  # all: no credentials, no bucket
        raise UserError(f"{option}: {listed}{missing[0][1]}") from missing[0][1]
    return times[-1]
