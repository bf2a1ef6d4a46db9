"""The directory that an export is written to: on a disk it appears whole, in a bucket its index is written last."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dpo_jax.bucket import LAST_SECONDS, PROBE, RIGHTS, Bucket, is_remote, probe, upload_order
from dpo_jax.console import say
from dpo_jax.errors import UserError, reason
from dpo_jax.runs.bucket_lock import locked
from dpo_jax.runs.mirror import empty
from dpo_jax.storage import InUse, claim, is_abandoned, local_copy
from dpo_jax.weights.safetensors import INDEX, WEIGHTS

# Files next to weights and config.json: tokenizer, chat template and generation config.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "generation_config.json",
)  # fmt: skip
LOCK, MARKER = "export.lock", "export.unfinished"  # objects of an export that is being written, or was broken off
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def export_target(out_dir: str | Path, overwrite: bool = False) -> Path | str:
    """Return the path to export to: ``out_dir`` with ``~`` expanded and links resolved, or its ``gs://`` url.

    Raises:
        UserError: ``out_dir`` is not empty and ``overwrite`` is false, or it cannot be a directory.
    """
    if is_remote(out_dir):
        bucket = Bucket.named("export", str(out_dir))
        probe(bucket, "export", RIGHTS)
        _refuse_other_objects(bucket)
        return bucket.url
    return _local_target(Path(out_dir), overwrite)


def _local_target(out_dir: Path, overwrite: bool) -> Path:
    if out_dir.parts and out_dir.parts[0].endswith(":"):
        raise UserError(f"{out_dir}: not a local path; name a local directory, or gs://BUCKET/FOLDER")
    target = Path(os.path.realpath(os.path.expanduser(out_dir)))
    with _writing(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{out_dir}: this is a file; name a directory to export to")
        if not overwrite and target.is_dir() and any(target.iterdir()):
            raise UserError(f"{out_dir}: it is not empty; name another directory to export to, or empty this one")
        if not overwrite and target == Path.cwd():  # replacing it would leave the shell in a deleted directory
            raise UserError(f"{out_dir}: this is the current directory; name a new one to export to")
    return target


def exported_sizes(target: Path | str) -> list[int]:
    """Return the size in bytes of each file of an export."""
    if isinstance(target, str):
        return [blob.size for blob in Bucket.named("export", target).walk().values()]
    return [path.stat().st_size for path in target.rglob("*") if path.is_file()]


@contextmanager
def export_directory(out_dir: str | Path, overwrite: bool) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Context manager that yields a directory to fill, and a function to call with each large file that is complete.

    A local ``out_dir`` appears when all is written. To a bucket, large files go as they are completed, so that the disk
    holds one at a time; the others follow, by `upload_order`. An export that was broken off there is replaced.

    Raises:
        UserError: ``out_dir`` is not empty and ``overwrite`` is false, another export to it is running, or it cannot
            be written.
    """
    if is_remote(out_dir):
        with _bucket_directory(Bucket.named("export", str(out_dir))) as (staging, upload):
            yield staging, upload
    else:
        with atomic_directory(Path(out_dir), overwrite) as staging:
            yield staging, lambda path: None


@contextmanager
def _bucket_directory(bucket: Bucket) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    staging, patient = local_copy("exports", bucket.url), bucket.with_patience(LAST_SECONDS)
    try:
        with locked(bucket, LOCK, probe(bucket, "export", RIGHTS), partial(say, True)) as lock:

            def upload(path: Path) -> None:
                lock.renew()
                patient.upload(path, path.relative_to(staging).as_posix())
                path.unlink()

            for name in _refuse_other_objects(bucket):
                bucket.delete(name)
            bucket.write(MARKER, b"")
            with _writing(staging):
                empty(staging)
                try:
                    yield staging, upload
                    paths = (path for path in staging.rglob("*") if path.is_file())
                    for path in sorted(paths, key=lambda path: upload_order(path.relative_to(staging).as_posix())):
                        upload(path)
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
            patient.delete(MARKER)
    except InUse as error:
        raise UserError(f"{bucket.url}: another export to it is running, {error}; wait for it") from error


def _refuse_other_objects(bucket: Bucket) -> list[str]:
    """Return what an export that was broken off left in an otherwise empty folder; raise if there is anything else."""
    names = [name for name in bucket.walk() if name not in ("", LOCK) and not name.startswith(PROBE)]
    if names and MARKER not in names:
        raise UserError(f"{bucket.url}: it is not empty; name another folder to export to, or empty this one")
    return sorted(names, key=lambda name: name == MARKER)


@contextmanager
def atomic_directory(out_dir: Path, overwrite: bool) -> Iterator[Path]:
    """Context manager that yields a temporary directory and renames it to ``out_dir``, or removes it on an error.

    Raises:
        UserError: ``out_dir`` is not empty and ``overwrite`` is false, another export to it is running, or it cannot
            be written.
    """
    target = _local_target(out_dir, overwrite)
    staging = target.parent / f".{target.name}.partial"
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if overwrite or is_abandoned(staging):  # to overwrite, the caller owns out_dir: a killed export left this
            shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
        except FileExistsError:
            remedy = "wait for it, or remove this directory"
            raise UserError(f"{staging}: another export to {target} is running or was killed; {remedy}") from None
        try:
            with claim(staging) as claimed:
                yield staging
                os.unlink(claimed.name)
                if overwrite:
                    _replace(target, staging)
                else:
                    os.rename(staging, target)  # fails if another process has filled target by now
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Context manager that turns an ``OSError`` into a one-line ``UserError``."""
    try:
        yield
    except OSError as error:
        remedy = "free space, grant access or name another directory"
        raise UserError(f"{target}: the export cannot be written ({reason(error)}); {remedy}") from error


def _replace(target: Path, staging: Path) -> None:
    """Rename the new export to ``target``, replacing an older one if it exists."""
    old_export = target.parent / f".{target.name}.replaced"
    if target.exists():
        _move_other_files(old_export, target)  # if an earlier call was killed between the renames below
        os.rename(target, old_export)
    os.rename(staging, target)
    _move_other_files(old_export, target)


def _move_other_files(replaced: Path, target: Path) -> None:
    """Move files that no export writes from ``replaced`` to ``target``, then remove ``replaced``."""
    if not replaced.is_dir():
        return
    for path in replaced.iterdir():
        if path.name not in (*COMPANIONS, "config.json", INDEX, WEIGHTS) and not _SHARD.fullmatch(path.name):
            os.rename(path, target / path.name)
    shutil.rmtree(replaced)
