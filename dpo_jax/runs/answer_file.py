"""A file of generated answers, one JSON line per prompt, that a stopped command can continue.

Next to it lies a manifest of the options and models that made it, and a lock while a command writes to it. In a bucket
all of them are objects, written on the disk and uploaded every ``PUSH_INTERVAL`` seconds and at the end.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_jax import storage
from dpo_jax.bucket import RETRY, RIGHTS, Bucket, is_remote, probe
from dpo_jax.console import warn
from dpo_jax.errors import StorageUnreachable, UserError, reason
from dpo_jax.runs.directory import append_json, writing
from dpo_jax.runs.manifest import compare_manifest, rounding_changes
from dpo_jax.runs.mirror import Mirror, locked_mirror

PUSH_INTERVAL = 120.0
Row = dict[str, Any]


@dataclass
class AnswerFile:
    """The file that ``--output`` names, or its local copy. Only the writer process calls its methods."""

    path: Path
    mirror: Mirror | None = None  # of a file in a bucket
    last_push: float = field(default_factory=time.monotonic)

    @classmethod
    def named(cls, name: str) -> "AnswerFile":
        """Return the answer file with the name that ``--output`` gives.

        Raises:
            UserError: the name is not that of a file of JSON lines, or it is in storage other than ``gs://``.
        """
        if not name.endswith(".jsonl"):
            raise UserError(f"--output: {name} must end with .jsonl, as it has one JSON object per line")
        if not is_remote(name):
            return cls(Path(name))
        folder, _, file_name = name.rpartition("/")
        file = cls(storage.local_copy("outputs", name) / file_name)
        file.mirror = Mirror(Bucket.named("--output", folder), file.path.parent, names=(file_name, file.manifest.name))
        return file

    def beside(self, suffix: str) -> Path:
        """Return the path of another file of the same command, such as ``answers.manifest.json``."""
        return self.path.with_suffix(suffix)

    @property
    def manifest(self) -> Path:
        """Path of the manifest: the options and model hashes that the answers depend on."""
        return self.beside(".manifest.json")

    def location(self, path: Path) -> str:
        """Return the path, or the url, of this file or of one beside it."""
        return str(path) if self.mirror is None else f"{self.mirror.bucket.url}/{path.name}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context manager that keeps other processes from writing to the file.

        For a file in a bucket, the local copy is downloaded first and uploaded at the end, also after an error.

        Raises:
            UserError: another process writes to it, or its folder cannot be written.
        """
        path, name = self.beside(".lock"), self.location(self.path)
        with ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(storage.lock(path))
                storage.sign(lock)
                stack.callback(path.unlink, missing_ok=True)
                if self.mirror is not None:
                    server_time = probe(self.mirror.bucket, "--output", RIGHTS)
                    stack.enter_context(locked_mirror(self.mirror, path.name, server_time, warn))
            except storage.InUse as error:
                remedy = "wait for it, stop it, or choose another name"
                raise UserError(f"--output: {name} is being written by {error}: {remedy}") from error
            except OSError as error:
                cause = error.strerror or reason(error)
                raise UserError(f"--output: {name} cannot be written: {cause}: choose another file") from error
            yield

    def resume(self, manifest: Mapping[str, Any], num_rows: int) -> tuple[int, list[str]]:
        """Create the file or drop an incomplete last line; return its number of rows and changes that affect rounding.

        Raises:
            UserError: the file is not that of a command with this ``manifest``, or was edited.
        """
        if not self.path.exists():
            with writing(self.manifest):
                storage.write_atomically(
                    self.manifest, json.dumps(storage.seal(manifest), indent=1) + "\n", durable=True
                )
            with writing(self.path):
                self.path.touch()
            return 0, []
        old = self._read_manifest()
        changes = compare_manifest(old, manifest)
        if changes:
            remedy = "restore these, or choose another --output"
            mismatch = f"has answers made with other options: {'; '.join(changes)}"
            raise UserError(f"--output: {self.location(self.path)} {mismatch}: {remedy}")
        with writing(self.path):
            storage.drop_torn_line(self.path)
        last = -1
        for last, row in enumerate(self.rows()):
            if row.get("row") != last or last >= num_rows:
                remedy = "restore the file, or choose another --output"
                name = self.location(self.path)
                raise UserError(f"--output: {name} was edited: line {last + 1} does not hold row {last}: {remedy}")
        return last + 1, rounding_changes(old, manifest)

    def _read_manifest(self) -> dict[str, Any]:
        remedy = "choose another name, or remove it first"
        if not self.manifest.is_file():
            name = self.location(self.path)
            raise UserError(f"--output: {name} exists, but {self.manifest.name} does not: {remedy}")
        try:
            manifest = storage.unseal(self.manifest.read_bytes())
            storage.check_fields(manifest, dict.fromkeys(("config", "identity", "place"), dict))
            return manifest
        except (OSError, ValueError) as error:
            name = self.location(self.manifest)
            raise UserError(f"--output: {name} cannot be read: {reason(error)}: {remedy}") from error

    def append(self, rows: Sequence[Row]) -> None:
        """Append rows; if the process is killed at any point, at most the last line is incomplete."""
        for row in rows:
            append_json(self.path, row)
        if self.mirror is not None and time.monotonic() - self.last_push >= PUSH_INTERVAL:
            try:
                self.mirror.push()
            except StorageUnreachable as error:
                warn(f"--output: upload failed, will be retried: {str(error).removesuffix(RETRY)}")
            self.last_push = time.monotonic()

    def rows(self) -> Iterator[Row]:
        """Yield the rows, one at a time."""
        with open(self.path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    remedy = "restore the file, or choose another --output"
                    name = self.location(self.path)
                    raise UserError(f"--output: {name}, line {number}: {reason(error)}: {remedy}") from None
                yield row if isinstance(row, dict) else {}
