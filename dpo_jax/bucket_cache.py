"""Files of a bucket in this machine's cache: small ones are copied, large ones only referred to and read in ranges.

A copy's folder is named after its url and the generations of its objects, so a change in the bucket makes a new copy. A
reference is a small JSON file in place of an object, with its url, generation and size.
"""

import json
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from threading import BoundedSemaphore
from typing import TypeVar

from dpo_jax.bucket import PATIENCE, Blob, Bucket, Changed, denied_as_usage
from dpo_jax.errors import UserError, reason
from dpo_jax.storage import claim, is_abandoned, list_files, local_copy

log = logging.getLogger(__name__)

MODELS = "models"  # kind of the local copies that hold references
UNFINISHED, SIZES = ".fetching-", ".sizes"
BLOCK_BYTES, CONNECTIONS = 2**24, 8  # of a range that is read; at once, in all
AHEAD_BYTES = BLOCK_BYTES * CONNECTIONS  # that `read_ahead` holds
_connections = BoundedSemaphore(CONNECTIONS)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """One generation of an object, of which ranges of bytes are read."""

    url: str
    generation: int
    size: int

    def read(self, start: int, end: int) -> bytearray:
        """Return the bytes from ``start`` to before ``end``, over several connections at once if there are many.

        Raises:
            UserError: the object has changed.
            StorageUnreachable, StorageDenied: storage does not answer, or a right is missing.
        """
        data = bytearray(end - start)
        bucket, view = Bucket(self.url, PATIENCE), memoryview(data)

        def fill(first: int) -> None:
            last = min(first + BLOCK_BYTES, end)
            with _connections:
                view[first - start : last - start] = bucket.read_range("", first, last, self.generation)

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                list(pool.map(fill, range(start, end, BLOCK_BYTES)))
            except (Changed, FileNotFoundError) as error:
                raise _changed(self.url) from error
        return data


def read_ahead(reads: Iterable[tuple[int, Callable[[], Result]]]) -> Iterator[Result]:
    """Yield the results of ``reads``, pairs of (bytes, function), in order, while the next ones run in threads.

    This hides the latency of small requests.
    """
    pending: deque[tuple[int, Future[Result]]] = deque()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for size, read in reads:
            while pending and size + sum(size for size, _ in pending) > AHEAD_BYTES:
                yield pending.popleft()[1].result()
            pending.append((size, pool.submit(read)))
        while pending:
            yield pending.popleft()[1].result()


def referenced_object(path: Path) -> RemoteFile | None:
    """Return the object that a weight file refers to, or None if ``path`` is not in the cache of models."""
    if path.parents[2:3] != (local_copy(MODELS, "").parent,):  # CACHE/models/HASH/NAME/file
        return None
    return RemoteFile(**json.loads(path.read_text()))


def fetch_data(option: str, url: str) -> Path:
    """Return a local copy of a file or folder of a bucket; ``option`` gives its url.

    Raises:
        UserError: there is no such file or folder, it changes meanwhile, a right is missing, or the cache cannot be
            written.
        StorageUnreachable: storage does not answer.
    """
    bucket = Bucket.named(option, url)
    with denied_as_usage(option):
        blob = None if url.endswith("/") else bucket.stat("")
        blobs = {"": blob} if blob is not None else bucket.walk()
        if blob is None:
            blobs.pop("", None)  # names the folder
        if not blobs:
            raise UserError(f"{option}: {url} does not exist; check the path")
        return fetch(bucket, blobs, "data")


def fetch(
    bucket: Bucket, blobs: Mapping[str, Blob], kind: str, refer: Callable[[str], bool] = lambda name: False
) -> Path:
    """Return the local copy of the objects ``blobs``, by their names in ``bucket``, made now if it is not there.

    Those for whose names ``refer`` is true are not copied, but referred to; see `referenced_object`.
    """
    blobs = {name: blob for name, blob in sorted(blobs.items()) if not name.endswith("/")}  # those only name folders
    identity = [bucket.url, {name: blob.generation for name, blob in blobs.items()}]
    folder = local_copy(kind, json.dumps(identity))
    copy = folder / PurePosixPath(bucket.url).name
    if _is_complete(folder):
        return copy
    log.info(
        "fetching %s to %s, %.1f MB", bucket.url, copy, sum(b.size for n, b in blobs.items() if not refer(n)) / 1e6
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder.parent, ignore_cleanup_errors=True)
        with temporary as name, claim(Path(name)):
            unfinished = Path(name) / folder.name
            _write(bucket, blobs, unfinished / copy.name, refer)
            paths = [path for path in unfinished.rglob("*") if path.is_file()]
            sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in paths}
            (unfinished / SIZES).write_text(json.dumps(sizes))
            if not _is_complete(folder):  # another process may have been first
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                os.rename(unfinished, folder)
        if not _is_complete(folder):
            raise OSError(f"{folder} cannot be created")
    except OSError as error:
        remedy = "free space, or set XDG_CACHE_HOME to a folder with more"
        raise UserError(f"{folder.parent}: cannot be written ({reason(error)}): {remedy}") from error
    return copy


def _write(bucket: Bucket, blobs: Mapping[str, Blob], copy: Path, refer: Callable[[str], bool]) -> None:
    for name, blob in blobs.items():
        path, url = copy / name, f"{bucket.url}/{name}".rstrip("/")
        if ".." in PurePosixPath(name).parts or not path.is_relative_to(copy):
            raise UserError(f"{url}: this is not a valid file name on this machine; rename the object")
        path.parent.mkdir(parents=True, exist_ok=True)
        if refer(name):
            path.write_text(json.dumps(asdict(RemoteFile(url, blob.generation, blob.size))))
            continue
        try:
            bucket.download(name, path, blob.generation)
        except (Changed, FileNotFoundError) as error:
            raise _changed(url) from error


def _is_complete(folder: Path) -> bool:
    """Return whether a copy has all its files; a crash or a cache cleaner may have removed some."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _changed(url: str) -> UserError:
    return UserError(f"{url}: changed while it was being read; run again once no process writes to it")


def _remove_leftovers(folder: Path) -> None:
    """Remove copies that killed processes left unfinished."""
    for path in list_files(folder, UNFINISHED + "*"):
        if is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
