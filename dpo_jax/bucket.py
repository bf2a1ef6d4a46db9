"""Read and write the objects of a folder in a Google Cloud Storage bucket, and tell faults of storage apart.

The client libraries come with the extra ``gcs`` and are imported only once a ``gs://`` path is named. Requests are
billed to the project that ``DPO_JAX_GCS_USER_PROJECT`` names, as a requester-pays bucket demands.
"""

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

from dpo_jax.errors import StorageDenied, StorageUnreachable, UserError, reason
from dpo_jax.storage import partial_file

SCHEME = "gs://"
PATIENCE = 120.0  # seconds to repeat a request that storage does not answer
LAST_SECONDS = 600.0  # the same when there is no next time
TIMEOUT = 60.0  # seconds for one request; for a file, without progress
UNANSWERED, REFUSED = (408, 429, *range(500, 600)), (401, 403)
# Codes in the texts of tensorstore's errors, which have no types.
UNREACHABLE_TEXTS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
UNPAID = "requester pays bucket"
DENIED_TEXTS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden: ", UNPAID)
NETWORK_MODULES = ("aiohttp", "requests", "urllib3")
USER_PROJECT = "DPO_JAX_GCS_USER_PROJECT"
RETRY = ": try again later"
ROLES = "grant roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket"
PROBE = ".probe-"  # objects that `probe` writes and deletes
RIGHTS = ("storage.objects.create", "storage.objects.get", "storage.objects.list", "storage.objects.delete")
GET_BUCKET = "storage.buckets.get"  # which Orbax needs to delete a step
LAST_NAMES = ("adapter_config.json", "config.json", "model.safetensors.index.json")  # which readers ask for first

Result = TypeVar("Result")


class Changed(Exception):
    """Raised if an object is not of the generation that a write or deletion requires."""


class Blob(NamedTuple):
    """An object of a bucket."""

    generation: int
    updated: float  # when it was written, in seconds since 1970, by the server's clock
    metadata: Mapping[str, str]
    size: int  # in bytes


def is_remote(path: object) -> bool:
    """Return whether a path names storage elsewhere, by a scheme such as ``gs://``."""
    return "://" in str(path)


def split_url(name: str, url: str) -> tuple[str, str]:
    """Split ``gs://BUCKET/FOLDER`` into bucket and folder; ``name`` is the option it was given for.

    Raises:
        UserError: it has another scheme, or names no folder.
    """
    match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+[a-z0-9])/+(.*[^/])/*", url)
    if not url.startswith(SCHEME):
        raise UserError(f"{name}: {url} is neither a local path nor in a bucket of Google Cloud Storage, gs://...")
    if match is None:
        raise UserError(f"{name}: {url} names no folder in a bucket: give gs://BUCKET/FOLDER")
    return match[1], match[2]


def fault_of(error: BaseException | None) -> Literal["unreachable", "denied"] | None:
    """Return what kept storage from doing what was asked, from an error of any of its clients, or None."""
    for cause in _causes(error):
        code, text = getattr(cause, "code", None), str(cause)
        if isinstance(cause, StorageUnreachable | StorageDenied):
            return "unreachable" if isinstance(cause, StorageUnreachable) else "denied"
        if code in UNANSWERED or any(word in text for word in UNREACHABLE_TEXTS):
            return "unreachable"
        name, module = type(cause).__name__, type(cause).__module__
        if code in REFUSED or name == "DefaultCredentialsError" or any(word in text for word in DENIED_TEXTS):
            return "denied"
        if isinstance(cause, ConnectionError | TimeoutError) or module.split(".")[0] in NETWORK_MODULES:
            return "unreachable"
        if name in ("TransportError", "RefreshError", "ChecksumError", "DataCorruption", "RetryError"):
            return "unreachable"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending = [error]
    while pending:
        cause = pending.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            pending += [cause.__context__, cause.__cause__, *getattr(cause, "exceptions", ())]


def storage_error(what: str, error: BaseException) -> UserError | None:
    """Return the one-line error for a fault of storage, or None if ``error`` has another cause."""
    fault = fault_of(error)
    if isinstance(error, UserError):
        return error
    if fault == "unreachable":
        return StorageUnreachable(f"{what}: storage does not answer ({reason(error)}){RETRY}")
    if fault == "denied":
        if type(error).__name__ == "DefaultCredentialsError":
            return StorageDenied(f"{what}: no credentials: run gcloud auth application-default login")
        text = str(error)
        is_scope = "authentication scope" in text or "ACCESS_TOKEN_SCOPE" in text
        remedy = "start the VM with the scope cloud-platform" if is_scope else ROLES
        if UNPAID in text:
            remedy = f"set {USER_PROJECT} to the project to bill"
        return StorageDenied(f"{what}: access is denied ({reason(error)}): {remedy}")
    return None


@lru_cache(maxsize=1)
def prepare_clients() -> Any:
    """Import the client libraries, set their defaults, and return a client; raise ``UserError`` without the extra."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 (etils and Orbax use it for gs://)
        from google.cloud import storage
    except ImportError as error:
        raise UserError("gs:// needs packages that are not installed: pip install 'dpo_jax[gcs]'") from error
    for protocol in ("gs", "gcs"):  # a directory that was listed once would never show what others write
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    for name in ("absl", "gcsfs", "google.auth"):  # what goes wrong is reported in one line, without their tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")  # ends a transfer that stalls
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "256")
    return storage.Client()


@dataclass(frozen=True)
class Bucket:
    """The objects below a ``gs://`` folder, by their names relative to it; ``""`` is the object of the url itself.

    Every method repeats a request that storage does not answer, for ``patience`` seconds.

    Raises:
        StorageUnreachable: storage did not answer in time.
        StorageDenied: a right or the bucket is missing.
        FileNotFoundError: there is no such object.
        Changed: an object is of another generation than required.
    """

    url: str
    patience: float = 0.0

    @classmethod
    def named(cls, name: str, url: str) -> "Bucket":
        """Return the folder that the option ``name`` gives."""
        bucket, folder = split_url(name, url)
        return cls(f"{SCHEME}{bucket}/{folder}", PATIENCE)

    def connect(self) -> None:
        """Import the client libraries and find credentials."""
        assert self._client is not None

    def with_patience(self, seconds: float) -> "Bucket":
        """Return the same folder with another patience."""
        return replace(self, patience=seconds)

    def entries(self, prefix: str = "") -> tuple[dict[str, Blob], list[str]]:
        """Return the objects directly in a folder, ``""`` or ending with ``/``, and the names of its folders."""

        def call() -> tuple[dict[str, Blob], list[str]]:
            options = {"prefix": f"{self._folder}/{prefix}", "delimiter": "/", "retry": None, "timeout": TIMEOUT}
            listing = self._client.list_blobs(self._bucket, **options)
            objects = {self._relative(blob.name): _blob_of(blob) for blob in listing}
            return objects, sorted(self._relative(name) for name in listing.prefixes)

        return self._ask("list", prefix, call)

    def walk(self, prefix: str = "", skip: str = "") -> dict[str, Blob]:
        """Return all objects below a folder, but for those in the folder ``skip``."""
        objects, folders = self.entries(prefix)
        for folder in folders:
            if folder != skip:
                objects |= self.walk(folder, skip)
        return objects

    def stat(self, name: str) -> Blob | None:
        """Return an object's generation, time and metadata; None if there is none."""

        def call() -> Blob | None:
            blob = self._bucket.get_blob(self._full(name), retry=None, timeout=TIMEOUT)
            return None if blob is None else _blob_of(blob)

        return self._ask("read", name, call)

    def read(self, name: str) -> bytes:
        """Return an object's content."""
        return self._ask("read", name, lambda: self._blob(name).download_as_bytes(retry=None, timeout=TIMEOUT))

    def read_range(self, name: str, start: int, end: int, generation: int) -> bytes:
        """Return the bytes from ``start`` to before ``end`` of one generation of an object."""
        span = {"start": start, "end": end - 1, "raw_download": True, "checksum": None}
        options = {"if_generation_match": generation, "retry": None, "timeout": TIMEOUT}
        return self._ask("read", name, lambda: self._blob(name).download_as_bytes(**span, **options))

    def write(
        self, name: str, content: bytes, generation: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> Blob:
        """Write an object whole; with a ``generation``, only over exactly that one, 0 for none."""

        def call() -> Blob:
            blob = self._blob(name)
            blob.metadata = dict(metadata or {})
            blob.upload_from_string(content, if_generation_match=generation, retry=None, timeout=TIMEOUT)
            return _blob_of(blob)

        return self._ask("write", name, call)

    def upload(self, path: Path, name: str) -> None:
        """Write a local file to an object."""
        self._ask("write", name, lambda: self._blob(name).upload_from_filename(str(path), retry=None, timeout=TIMEOUT))

    def download(self, name: str, path: Path, generation: int | None = None) -> None:
        """Write an object, or exactly this generation of it, to a local file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, options = partial_file(path), {"if_generation_match": generation, "retry": None, "timeout": TIMEOUT}
        try:
            self._ask("read", name, lambda: self._blob(name).download_to_filename(partial, **options))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def copy(self, name: str, target: str) -> None:
        """Copy an object within the bucket."""
        blob, full = self._blob(name), self._full(target)
        options = {"retry": None, "timeout": TIMEOUT}
        self._ask("write", target, lambda: self._bucket.copy_blob(blob, self._bucket, full, **options))

    def delete(self, name: str, generation: int | None = None) -> None:
        """Delete an object; it may be gone."""
        with suppress(FileNotFoundError):
            self._ask("delete", name, lambda: self._blob(name).delete(if_generation_match=generation, retry=None))

    def requester_pays(self) -> bool:
        """Ask for the bucket itself, as Orbax does before it deletes, and return whether it is a requester-pays one."""
        bucket = self._ask("get the bucket of", "", lambda: self._client.get_bucket(self._bucket, retry=None))
        return bucket.requester_pays

    @property
    def _client(self) -> Any:
        return self._ask("connect", "", prepare_clients)

    @property
    def _bucket(self) -> Any:
        return self._client.bucket(split_url("", self.url)[0], user_project=os.environ.get(USER_PROJECT))

    @property
    def _folder(self) -> str:
        return split_url("", self.url)[1]

    def _full(self, name: str) -> str:
        return f"{self._folder}/{name}" if name else self._folder

    def _relative(self, name: str) -> str:
        return name.removeprefix(f"{self._folder}/")

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._full(name))

    def _ask(self, verb: str, name: str, call: Callable[[], Result]) -> Result:
        """Make a request until storage answers it, for as long as ``patience``."""
        deadline, delay = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return call()
            except Exception as error:
                code = getattr(error, "code", None)
                if code == 412:
                    raise Changed(name) from error
                failure = storage_error(f"{self.url}: cannot {verb} {name}".rstrip(), error)
                if failure is None and code == 404:
                    if "bucket does not exist" in str(error):
                        raise StorageDenied(
                            f"{self.url}: the bucket does not exist: create it, or correct its name"
                        ) from error
                    raise FileNotFoundError(f"{self.url}/{name}") from error
                if failure is None:
                    raise
                if not isinstance(failure, StorageUnreachable) or time.monotonic() + delay > deadline:
                    raise failure from (None if failure is error else error)
                time.sleep(delay)
                delay = min(2 * delay, 15.0)


def _blob_of(blob: Any) -> Blob:
    return Blob(int(blob.generation), blob.updated.timestamp(), blob.metadata or {}, int(blob.size))


@contextmanager
def denied_as_usage(option: str) -> Iterator[None]:
    """Context manager that turns `StorageDenied` into a plain `UserError` of ``option``, as nothing has begun yet."""
    try:
        yield
    except StorageDenied as error:
        raise UserError(f"{option}: {error}") from error


def upload_order(name: str) -> tuple[int, str]:
    """Return the key by which files are sorted for upload, so that those that readers ask for first come last."""
    base = PurePosixPath(name).name
    return (1 + LAST_NAMES.index(base) if base in LAST_NAMES else 0), name


def probe(bucket: Bucket, option: str = "run.dir", rights: Collection[str] = (*RIGHTS, GET_BUCKET)) -> float:
    """Try each of the rights, by default all that a run needs, and return the server's clock.

    ``option`` gives the folder.

    Raises:
        UserError: some are missing, each is named; storage does not answer; or a run's bucket is a requester-pays one.
    """
    name, missing, times, pays = f"{PROBE}{secrets.token_hex(8)}", [], [time.time()], []
    requests = {
        "storage.objects.create": lambda: times.append(bucket.write(name, b"probe").updated),
        "storage.objects.get": lambda: bucket.read(name),
        "storage.objects.list": bucket.entries,
        "storage.objects.delete": lambda: bucket.delete(name),
        GET_BUCKET: lambda: pays.append(bucket.requester_pays()),
    }
    for right in rights:
        try:
            requests[right]()
        except StorageDenied as error:
            missing.append((right, error))
        except FileNotFoundError:
            continue  # it could not be written
    if GET_BUCKET in rights and (any(pays) or any(UNPAID in str(error) for _, error in missing)):
        problem = f"{bucket.url} is in a requester-pays bucket, which checkpoints do not support"
        raise UserError(f"{option}: {problem}: use another bucket")
    if missing:
        names = ", ".join(right for right, _ in missing)
        listed = f"missing rights: {names}: " if len(missing) < len(rights) else ""  # all: no credentials, no bucket
        raise UserError(f"{option}: {listed}{missing[0][1]}") from missing[0][1]
    return times[-1]
