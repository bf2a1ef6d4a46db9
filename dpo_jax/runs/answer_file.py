"""A file of generated answers, one JSON line per prompt, that a stopped command can continue.

Next to it lies a manifest of the options and models that made it, and a lock while a command writes to it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax import storage
from dpo_jax.errors import UserError, reason
from dpo_jax.runs.directory import append_json, writing
from dpo_jax.runs.manifest import compare_manifest, rounding_changes

Row = dict[str, Any]


@dataclass(frozen=True)
class AnswerFile:
    """The file that ``--output`` names. Only the writer process calls its methods."""

    path: Path

    @classmethod
    def named(cls, name: str) -> "AnswerFile":
        """Return the answer file with the name that ``--output`` gives.

        Raises:
            UserError: the name is not that of a local file of JSON lines.
        """
        if "://" in name:
            raise UserError(f"--output: {name} is not a local path: mount the bucket, or copy the file afterwards")
        if not name.endswith(".jsonl"):
            raise UserError(f"--output: {name} must end with .jsonl, as it has one JSON object per line")
        return cls(Path(name))

    def beside(self, suffix: str) -> Path:
        """Return the path of another file of the same command, such as ``answers.manifest.json``."""
        return self.path.with_suffix(suffix)

    @property
    def manifest(self) -> Path:
        """Path of the manifest: the options and model hashes that the answers depend on."""
        return self.beside(".manifest.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context manager that keeps other processes from writing to the file.

        Raises:
            UserError: another process writes to it, or its folder cannot be written.
        """
        path = self.beside(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = storage.lock(path)
            storage.sign(lock)
        except storage.InUse as error:
            remedy = "wait for it, stop it, or choose another name"
            raise UserError(f"--output: {self.path} is being written by {error}: {remedy}") from error
        except OSError as error:
            cause = error.strerror or reason(error)
            raise UserError(f"--output: {self.path} cannot be written: {cause}: choose another file") from error
        with lock:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

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
            raise UserError(f"--output: {self.path} {mismatch}: {remedy}")
        with writing(self.path):
            storage.drop_torn_line(self.path)
        last = -1
        for last, row in enumerate(self.rows()):
            if row.get("row") != last or last >= num_rows:
                remedy = "restore the file, or choose another --output"
                raise UserError(f"--output: {self.path} was edited: line {last + 1} does not hold row {last}: {remedy}")
        return last + 1, rounding_changes(old, manifest)

    def _read_manifest(self) -> dict[str, Any]:
        remedy = "choose another name, or remove it first"
        if not self.manifest.is_file():
            raise UserError(f"--output: {self.path} exists, but {self.manifest.name} does not: {remedy}")
        try:
            manifest = storage.unseal(self.manifest.read_bytes())
            storage.check_fields(manifest, dict.fromkeys(("config", "identity", "place"), dict))
            return manifest
        except (OSError, ValueError) as error:
            raise UserError(f"--output: {self.manifest} cannot be read: {reason(error)}: {remedy}") from error

    def append(self, row: Row) -> None:
        """Append a row; if the process is killed at any point, at most the last line is incomplete."""
        append_json(self.path, row)

    def rows(self) -> Iterator[Row]:
        """Yield the rows, one at a time."""
        with open(self.path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    remedy = "restore the file, or choose another --output"
                    raise UserError(f"--output: {self.path}, line {number}: {reason(error)}: {remedy}") from None
                yield row if isinstance(row, dict) else {}
