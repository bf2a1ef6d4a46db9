"""Read checkpoints, and verify the checksums of their arrays against the manifest before use.

Every process makes the same calls and gets the same result.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_jax.config import CheckpointConfig
from dpo_jax.console import warn
from dpo_jax.errors import StorageDenied, StorageUnreachable, UserError, reason
from dpo_jax.parallel import hosts
from dpo_jax.runs.bucket_steps import bucket_of, in_bucket, step_folders, storage_faults
from dpo_jax.runs.checksums import describe_leaves, leaf_checksums
from dpo_jax.runs.manifest import FORMAT, check_shape
from dpo_jax.storage import SEAL, check_fields, unseal

STATE, MANIFEST = "state", "manifest"
# Errors of the machine or the storage, not of the checkpoint: by type, and by text.
ENVIRONMENT_ERRORS = (MemoryError, PermissionError, TimeoutError, ConnectionError, jax.errors.JaxRuntimeError)
ENVIRONMENT_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")


class Damaged(Exception):
    """Raised if a saved step is unusable; the text gives the reason."""


def saved_steps(directory: epath.Path) -> list[int]:
    """Return the committed steps, oldest first; they may have been damaged since."""
    if in_bucket(directory):
        return sorted(step for step, is_complete in step_folders(bucket_of(directory)).items() if is_complete)
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def rank_steps(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> list[int]:
    """Rank steps by ``best_metric``, best first and ties by latest step; omit steps where it is missing or NaN."""
    name = config.best_metric
    if name is None:
        return []
    values = {step: evaluation[name] for step, evaluation in metrics.items() if name in evaluation}
    values = {step: value for step, value in values.items() if not math.isnan(value)}
    sign = -1 if config.best_mode == "max" else 1
    return sorted(values, key=lambda step: (sign * values[step], -step))


def restore_part(
    directory, which: Literal["newest", "best"], abstract: Mapping[str, Any], report: Callable[[str], None] = warn
) -> tuple[dict[str, Any], dict]:
    """Read some fields of the state of a finished or running run, without changing the run.

    Args:
        directory: the run's checkpoints.
        which: newest, or best by the run's ``checkpoint.best_metric``. Damaged steps are skipped.
        abstract: maps fields of the state, such as ``params``, to pytrees of ``jax.ShapeDtypeStruct`` with shardings;
            arrays saved in another dtype are converted after their checksums have been verified.
        report: called with one line for each damaged step.

    Returns:
        The fields, and the manifest.

    Raises:
        UserError: there is no usable step, the best step is unknown, or the fields have other shapes.
    """
    directory = epath.Path(directory)
    steps = saved_steps(directory)
    if not steps:
        raise UserError(f"{directory}: contains no saved step: check the path, or train first")
    order = list(reversed(steps))
    if which == "best":
        order = _best_order(directory, order)
    for step in order:
        try:
            return read_step(directory, step, dict(abstract), part=True)
        except Damaged as damage:
            report(f"checkpoint of step {step} in {directory} is damaged ({damage}): skipped")
    raise UserError(f"{directory}: all saved steps {steps} are damaged (see above): restore a copy, or use another run")


def _best_order(directory: epath.Path, steps: list[int]) -> list[int]:
    metrics = read_metrics(directory)
    for step in steps:
        try:
            options = read_manifest(directory, step)["config"]["checkpoint"]
        except Damaged:
            continue
        if options["best_metric"] is None:
            raise UserError(
                f"{directory}: the run has no checkpoint.best_metric, so no step is best; set checkpoint to newest"
            )
        order = rank_steps(metrics, CheckpointConfig(**options))
        if not order:
            raise UserError(
                f"{directory}: no saved step recorded the metric {options['best_metric']!r}; set checkpoint to newest"
            )
        return order
    raise UserError(f"{directory}: none of its saved steps {steps} has a readable manifest: use another run")


def read_manifest(directory: epath.Path, step: int) -> dict:
    """Return a step's manifest; raise ``Damaged`` if it is absent or damaged, ``UserError`` if its format differs."""
    try:
        name = f"{step}/{MANIFEST}/metadata"  # named by Orbax
        text = bucket_of(directory).read(name) if in_bucket(directory) else (directory / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged("it has no manifest") from error
    try:
        manifest = unseal(text)
    except ValueError as error:
        if b'"format": 1,' not in text or SEAL.encode() in text:
            raise Damaged(f"its manifest cannot be used: {error}") from error
        manifest = {"format": 1}
    if isinstance(manifest.get("format"), int) and manifest["format"] != FORMAT:
        mismatch = f"has format {manifest['format']}, but this version reads {FORMAT}"
        raise UserError(f"checkpoint of step {step}: {directory} {mismatch}: use the version that wrote it")
    try:
        check_fields(manifest, {"format": int})
        check_shape(manifest)
    except ValueError as error:
        raise Damaged(f"its manifest cannot be used: {error}") from error
    if manifest["step"] != step:
        raise Damaged(f"its manifest belongs to step {manifest['step']}")
    return manifest


def read_metrics(directory: epath.Path) -> dict[int, dict[str, float]]:
    """Return the evaluation metrics by saved step, for the steps that were evaluated."""
    metrics = {}
    for step in saved_steps(directory):
        try:
            metrics[step] = read_manifest(directory, step)["metrics"]
        except Damaged:
            continue  # restore() reports the step and renames it
    return {step: evaluation for step, evaluation in metrics.items() if evaluation is not None}


def read_step(directory: epath.Path, step: int, abstract: Any, part: bool = False) -> tuple[Any, dict]:
    """Read and verify a step's state (if ``part``, some fields) and manifest; all processes get the same result."""
    failure, fault, state, manifest, saved = None, None, None, {}, {}
    try:
        manifest = read_manifest(directory, step)
        _check_leaves(abstract, manifest["leaves"], directory / str(step), part)
        saved = {name: manifest["leaves"][name] for name in describe_leaves(abstract)}
        state = _read_arrays(directory / str(step) / STATE, abstract, saved, part)
    except Damaged as damage:
        failure = str(damage)
    except (StorageUnreachable, StorageDenied) as error:
        fault = error
    if in_bucket(directory):
        hosts.agree(fault, f"reading step {step}", 2 * hosts.TIMEOUT)
    failures = hosts.gather(failure, f"reading step {step}", 2 * hosts.TIMEOUT)
    if any(failures):
        raise Damaged(next(filter(None, failures)))
    corrupted = [name for name, checksum in leaf_checksums(state).items() if checksum != saved[name]["checksum"]]
    if corrupted:
        others_note = f", and of {len(corrupted) - 1} more" * (len(corrupted) > 1)
        raise Damaged(f"the checksum of {corrupted[0]} is wrong{others_note}")
    return jax.tree.map(lambda array, struct: array.astype(struct.dtype), state, abstract), manifest


def _read_arrays(path: epath.Path, abstract: Any, saved: Mapping[str, dict], part: bool) -> Any:
    dtypes = jax.tree.unflatten(jax.tree.structure(abstract), [leaf["dtype"] for leaf in saved.values()])
    saved_struct = lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)  # noqa: E731
    item = jax.tree.map(saved_struct, abstract, dtypes)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    options = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=part)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _PatientReader()))
    try:
        # Use the handler, not the manager: a process that fails must not leave the others waiting at Orbax's barrier.
        with storage_faults(path, "cannot read the arrays"):
            return ocp.PyTreeCheckpointHandler(type_handler_registry=registry).restore(path, args=options)
    except (StorageUnreachable, StorageDenied):
        raise
    except Exception as error:  # Orbax raises a plain Exception for a chunk that cannot be decoded
        error_text = f"{error} {error.__cause__ or ''}"
        if isinstance(error, ENVIRONMENT_ERRORS) or any(code in error_text for code in ENVIRONMENT_CODES):
            raise
        raise Damaged(f"its arrays cannot be read: {reason(error.__cause__ or error)}") from error


class _PatientReader(ocp.type_handlers.ArrayHandler):
    """Orbax's array reader; after an error it waits for the other reads, before the event loop is closed."""

    async def deserialize(self, infos, args=None):
        earlier_tasks = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        finally:
            await asyncio.gather(*asyncio.all_tasks() - earlier_tasks, return_exceptions=True)


def _check_leaves(abstract: Any, saved: Mapping[str, dict], path: epath.Path, part: bool) -> None:
    expected = describe_leaves(abstract)
    names = expected if part else {**expected, **saved}
    mismatches, compared_keys = [], ("shape",) if part else ("shape", "dtype")
    for name in names:
        saved_leaf, expected_leaf = saved.get(name, {}), expected.get(name, {})
        if any(saved_leaf.get(key) != expected_leaf.get(key) for key in compared_keys):
            mismatches.append(f"{name}: saved {_describe(saved_leaf)}, needed {_describe(expected_leaf)}")
    if mismatches:
        mismatches_text = "; ".join(mismatches[:4]) + f"; and {len(mismatches) - 4} more" * (len(mismatches) > 4)
        remedy = "use the options it was written with"
        raise UserError(f"checkpoint {path}: has different arrays from this run: {mismatches_text}: {remedy}")


def _describe(leaf: Mapping) -> str:
    return f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent"
