"""A lock in a bucket, for folders that processes on different machines may write.

The lock is an object that its holder overwrites every ``BEAT_SECONDS``, each time only the generation that it wrote
before. If it is older than ``STALE_SECONDS`` by the server's clock, another process may take it over, again by
overwriting exactly that generation. So of any two writers one sees that it has lost.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dpo_jax.bucket import Blob, Bucket, Changed
from dpo_jax.errors import RunStopped, UserError
from dpo_jax.storage import InUse

BEAT_SECONDS = 30.0
STALE_SECONDS = 180.0
POLL_SECONDS = 5.0
ASKING_SECONDS = 30.0  # patience of `BucketLock.renew`, which is called before each save


@dataclass
class BucketLock:
    """A lock that this process holds, or held until another process took it over."""

    bucket: Bucket
    name: str
    token: str
    generation: int
    lost_to: str | None = None  # the process that took it over
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def renew(self) -> None:
        """Overwrite the lock; returns only if this process still holds it.

        Raises:
            RunStopped: another process has taken it over.
            StorageUnreachable: storage does not answer.
        """
        with self._mutex:
            if self.lost_to is None:
                stored, holder = _write(
                    self.bucket.with_patience(ASKING_SECONDS), self.name, self.token, self.generation
                )
                if stored is None:
                    self.lost_to = "another process" if holder is None else _owner(holder)
                else:
                    self.generation = stored.generation
        if self.lost_to is not None:
            remedy = "nothing more is written; the other process continues from the last checkpoint"
            raise RunStopped(f"{self.bucket.url} was taken over by {self.lost_to} while this one paused: {remedy}")

    def release(self) -> None:
        """Delete the lock if it is still held; if storage does not answer, it becomes stale."""
        with self._mutex, suppress(Changed, UserError):
            if self.lost_to is None:
                self.bucket.with_patience(ASKING_SECONDS).delete(self.name, self.generation)


@contextmanager
def locked(bucket: Bucket, name: str, server_time: float, say: Callable[[str], None]) -> Iterator[BucketLock]:
    """Context manager that takes the lock and renews it in a thread until the end of the block.

    It waits for a lock that was not renewed lately, until its holder renews it or it is stale.

    Args:
        bucket: the folder of the lock.
        name: of the lock's object.
        server_time: the server's clock now.
        say: called with a line before it waits.

    Raises:
        InUse: another process holds the lock; the text names it.
    """
    lock = _acquire(bucket, name, server_time - time.monotonic(), say)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(UserError):  # the next call of `renew` raises it where it is seen
                lock.renew()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        lock.release()


def _acquire(bucket: Bucket, name: str, clock_offset: float, say: Callable[[str], None]) -> BucketLock:
    token, first_seen = secrets.token_hex(16), None
    holder = bucket.stat(name)
    while True:
        age = 0.0 if holder is None else time.monotonic() + clock_offset - holder.updated
        if holder is None or age > STALE_SECONDS or _has_ended(holder):
            stored, holder = _write(bucket, name, token, 0 if holder is None else holder.generation)
            if stored is not None:
                return BucketLock(bucket, name, token, stored.generation)
            first_seen = None
            if holder is None:
                continue
        if first_seen is None:
            first_seen = holder.generation
            if not _runs_here(holder):
                say(f"{bucket.url} was in use by {_owner(holder)} {max(age, 0):.0f} s ago: waiting until it is stale")
        if holder.generation != first_seen or _runs_here(holder):
            raise InUse(_owner(holder))
        time.sleep(POLL_SECONDS)
        holder = bucket.stat(name)


def _write(bucket: Bucket, name: str, token: str, generation: int) -> tuple[Blob | None, Blob | None]:
    """Overwrite a generation of the lock; return the new one, or None and the object that is there instead.

    A request that seemed to fail may have taken effect, so an object with this token is this process's own.
    """
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    metadata = {"owner": owner, "process": _identity(os.getpid()), "token": token}
    try:
        return bucket.write(name, f"{owner}\n".encode(), generation, metadata), None
    except Changed:
        holder = bucket.stat(name)
        is_own = holder is not None and holder.metadata.get("token") == token
        return (holder, None) if is_own else (None, holder)


def _owner(holder: Blob) -> str:
    return holder.metadata.get("owner", "another process")


def _runs_here(holder: Blob) -> bool:
    """Return whether the process that wrote a lock runs on this machine."""
    return _is_of_here(holder) and not _has_ended(holder)


def _has_ended(holder: Blob) -> bool:
    """Return whether a lock was written by a process of this machine that has ended."""
    identity = holder.metadata.get("process", "")
    return _is_of_here(holder) and _identity(int(identity.split()[0])) != identity


def _is_of_here(holder: Blob) -> bool:
    identity = holder.metadata.get("process", "").split()
    return len(identity) == 4 and identity[0].isdigit() and identity[2:] == _identity(os.getpid()).split()[2:]


def _identity(pid: int) -> str:
    """Return what tells a process from all others: its id, when it started, the boot and the namespace of such ids.

    Empty where the system does not say, or there is no such process.
    """
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{pid} {started} {boot} {os.readlink(f'/proc/{pid}/ns/pid')}"
    except OSError:
        return ""
