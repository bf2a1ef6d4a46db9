"""A file that a command writes whole, at its end, where ``--output`` says: on the disk or in a bucket."""

import os
from pathlib import Path, PurePosixPath

from dpo_jax.bucket import LAST_SECONDS, Bucket, is_remote
from dpo_jax.errors import UserError
from dpo_jax.storage import local_copy


def refuse_existing(name: str) -> None:
    """Raise ``UserError`` if the file that ``--output`` names exists, or its bucket cannot be read."""
    if Bucket.named("--output", name).stat("") is not None if is_remote(name) else os.path.exists(name):
        raise UserError(f"--output: {name} already exists; choose another name or remove it first")


def write_output(name: str, text: str) -> None:
    """Write ``text`` to the file that ``--output`` names; for one in a bucket, first to this machine's cache.

    Raises:
        UserError: the file cannot be written. If it is in a bucket, the text is kept in the cache.
    """
    path = local_copy("outputs", name) / PurePosixPath(name).name if is_remote(name) else Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}; choose another file") from error
    if is_remote(name):
        try:
            Bucket(name, LAST_SECONDS).upload(path, "")
        except UserError as error:
            raise type(error)(f"--output: {error}; the file is kept at {path}") from error
        path.unlink()
