"""Reading saved steps: nothing is taken for good before the checksums of its arrays agree with its manifest.

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
from dpo_jax.errors import UserError, reason
from dpo_jax.parallel import hosts
from dpo_jax.runs.checksums import describe_leaves, leaf_checksums
from dpo_jax.runs.manifest import FORMAT
from dpo_jax.storage import SEAL, unseal

STATE, MANIFEST = "state", "manifest"
# Errors of the machine or the storage, not of the checkpoint: by type, by text.
NOT_DAMAGE = (MemoryError, PermissionError, TimeoutError, ConnectionError, jax.errors.JaxRuntimeError)
NOT_ITS_FAULT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")


class Damaged(Exception):
    """This step cannot be used; the text is the reason."""


def saved_steps(directory: epath.Path) -> list[int]:
    """Steps that were committed, oldest first; they may have been damaged since."""
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def rank_steps(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> list[int]:
    """Steps by ``best_metric``, best first, of equals the later first; those without it, or with NaN, are left out."""
    name = config.best_metric
    if name is None:
        return []
    values = {step: evaluation[name] for step, evaluation in metrics.items() if name in evaluation}
    values = {step: value for step, value in values.items() if not math.isnan(value)}
    sign = -1 if config.best_mode == "max" else 1
    return sorted(values, key=lambda step: (sign * values[step], -step))


def restore_part(
    directory, which: Literal["newest", "best"], abstract: Mapping[str, Any], notice: Callable[[str], None] = warn
) -> tuple[dict[str, Any], dict]:
    """Some fields of the state of a finished or running run; changes nothing there.

    Args:
        directory: the run's checkpoints.
        which: newest, or best by the run's own ``checkpoint.best_metric``. A damaged step is passed over.
        abstract: field of the state, such as ``params``, to its pytree of ``jax.ShapeDtypeStruct`` with shardings;
            another dtype than the saved one is converted to, after the checksums have agreed.
        notice: takes the one line that is said about each damaged step.

    Returns:
        The fields, and the manifest.

    Raises:
        UserError: no step is there or good, none is best, or the fields have other shapes.
    """
    directory = epath.Path(directory)
    steps = saved_steps(directory)
    if not steps:
        raise UserError(f"{directory}: holds no saved step: check the path, or train first")
    order = list(reversed(steps))
    if which == "best":
        order = _best_order(directory, order)
    for step in order:
        try:
            return read_step(directory, step, dict(abstract), part=True)
        except Damaged as damage:
            notice(f"checkpoint of step {step} in {directory} is damaged ({damage}): passed over")
    raise UserError(f"{directory}: none of its saved steps {steps} can be used: see the lines above")


def _best_order(directory: epath.Path, steps: list[int]) -> list[int]:
    metrics = read_metrics(directory)
    for step in steps:
        try:
            kept = read_manifest(directory, step)["config"]["checkpoint"]
        except Damaged:
            continue
        if kept["best_metric"] is None:
            raise UserError(f"{directory}: its run named no checkpoint.best_metric, so no step is best: use newest")
        order = rank_steps(metrics, CheckpointConfig(**kept))
        if not order:
            raise UserError(f"{directory}: no saved step has {kept['best_metric']!r}: use newest")
        return order
    raise UserError(f"{directory}: none of its saved steps {steps} has a readable manifest: use another run")


def read_manifest(directory: epath.Path, step: int) -> dict:
    """Manifest of a step; ``Damaged`` if none is intact, ``UserError`` if it has another format."""
    try:
        text = (directory / str(step) / MANIFEST / "metadata").read_bytes()  # the name is Orbax's
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged("it has no manifest") from error
    try:
        manifest = unseal(text)
    except ValueError as error:
        if b'"format": 1,' not in text or SEAL.encode() in text:
            raise Damaged(f"its manifest cannot be used: {error}") from error
        manifest = {"format": 1}
    if manifest["format"] != FORMAT:
        differs = f"has format {manifest['format']!r}, this version reads {FORMAT}"
        raise UserError(f"checkpoint of step {step}: {directory} {differs}: use the version that wrote it")
    if manifest.get("step") != step:
        raise Damaged(f"its manifest is that of step {manifest.get('step')}")
    return manifest


def read_metrics(directory: epath.Path) -> dict[int, dict[str, float]]:
    """Evaluations of the saved steps that have one, by step."""
    metrics = {}
    for step in saved_steps(directory):
        try:
            metrics[step] = read_manifest(directory, step)["metrics"]
        except Damaged:
            continue  # restore() says so, and sets it aside
    return {step: evaluation for step, evaluation in metrics.items() if evaluation is not None}


def read_step(directory: epath.Path, step: int, abstract: Any, part: bool = False) -> tuple[Any, dict]:
    """State and manifest of one step, proven; all processes find the same. part: a part of the state is enough."""
    why, state, manifest, saved = None, None, {}, {}
    try:
        manifest = read_manifest(directory, step)
        _refuse_other_leaves(abstract, manifest["leaves"], directory / str(step), part)
        saved = {name: manifest["leaves"][name] for name in describe_leaves(abstract)}
        state = _read_arrays(directory / str(step) / STATE, abstract, saved, part)
    except Damaged as damage:
        why = str(damage)
    damages = hosts.gather(why, f"reading step {step}", 2 * hosts.TIMEOUT)
    if any(damages):
        raise Damaged(next(filter(None, damages)))
    wrong = [name for name, sum_ in leaf_checksums(state).items() if sum_ != saved[name]["checksum"]]
    if wrong:
        raise Damaged(f"the checksum of {wrong[0]} is wrong" + f", and of {len(wrong) - 1} more" * (len(wrong) > 1))
    cast = jax.tree.map(lambda array, wanted: array.astype(wanted.dtype), state, abstract)
    return cast, manifest


def _read_arrays(path: epath.Path, abstract: Any, saved: Mapping[str, dict], part: bool) -> Any:
    dtypes = jax.tree.unflatten(jax.tree.structure(abstract), [leaf["dtype"] for leaf in saved.values()])
    as_saved = lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)  # noqa: E731
    item = jax.tree.map(as_saved, abstract, dtypes)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    options = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=part)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _PatientReader()))
    try:
        # The handler itself, not the manager: a process that fails must not leave the others at Orbax's barrier.
        return ocp.PyTreeCheckpointHandler(type_handler_registry=registry).restore(path, args=options)
    except Exception as error:  # Orbax raises a plain Exception for a chunk that cannot be decoded
        text = f"{error} {error.__cause__ or ''}"
        if isinstance(error, NOT_DAMAGE) or any(mark in text for mark in NOT_ITS_FAULT):
            raise
        raise Damaged(f"its arrays cannot be read: {reason(error.__cause__ or error)}") from error


class _PatientReader(ocp.type_handlers.ArrayHandler):
    """Orbax's reader, which closes its event loop at the first error, while other reads still report to it."""

    async def deserialize(self, infos, args=None):
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        finally:
            await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)


def _refuse_other_leaves(abstract: Any, saved: Mapping[str, dict], path: epath.Path, part: bool) -> None:
    wanted = describe_leaves(abstract)
    names = wanted if part else {**wanted, **saved}
    differ = []
    for name in names:
        a, b = saved.get(name), wanted.get(name)
        equal = a is not None and b is not None and a["shape"] == b["shape"] and (part or a["dtype"] == b["dtype"])
        if not equal:
            differ.append(f"{name}: saved {_shown(a)}, needed {_shown(b)}")
    if differ:
        more = f"; and {len(differ) - 4} more" * (len(differ) > 4)
        remedy = "use the options it was written with"
        raise UserError(f"checkpoint {path}: holds other arrays than this run: {'; '.join(differ[:4])}{more}: {remedy}")


def _shown(leaf: Mapping | None) -> str:
    return "absent" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"
