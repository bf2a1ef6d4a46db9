"""Reference log-probs on disk: computed once per set of inputs, for the rows that are used, and verified before use.

Rows are computed in batches that are fixed by the store, not by the run that needs them, so that their bits do not
depend on which runs have used the cache before. ``reference-KEY.part-*.npz``, next to the tokenized data, holds rows
that one process has computed, with the inputs that determine them; what is missing is added in further parts. Once
every row is there, ``reference-KEY.npz`` replaces the parts.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import jax
import numpy as np

from dpo_jax.batching.batches import Batches
from dpo_jax.console import warn
from dpo_jax.errors import RunStopped
from dpo_jax.parallel import hosts
from dpo_jax.storage import list_files, remove_partial_files, write_atomically

PART_STEPS = 64  # steps per part
Arrays = dict[str, np.ndarray]  # field of PairLogps -> [N, K] float32
ComputeLogps = Callable[[Batches, Sequence[int]], tuple[np.ndarray, Mapping[str, np.ndarray]]]


class Unusable(Exception):
    """Raised if a file exists but cannot be used; the text gives the reason."""


def cached_logps(
    batches: Batches,
    needed_ids: np.ndarray,
    inputs: Mapping[str, Any],
    compute: ComputeLogps,
    report: Callable[[str], None] | None = None,
) -> Arrays:
    """Return the reference log-probs of a store's examples, loaded from its cache or computed and saved there.

    Args:
        batches: contain every example of the store once, in order.
        needed_ids: the examples that are used; batches without any are not computed, and their log-probs may be NaN.
        inputs: everything besides the store that determines the log-probs; files made from other inputs are ignored.
        compute: (batches, steps) -> ids [n] and the fields of these rows, each [n, K].
        report: called with a line for each file that cannot be used; default: prints to the writer's stderr.

    Raises:
        RunStopped: ``compute`` did not return a needed row, or a log-prob that it returned is not finite.
    """
    report = report or warn
    store = batches.store
    inputs = json.loads(json.dumps(inputs))
    name = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    path = store.path / f"reference-{name}.npz"
    shape = (len(store), store.lengths.shape[1] - 1)
    if hosts.is_writer():
        remove_partial_files(store.path)
    logps = _load_complete(path, inputs, shape, report)
    if _is_same_everywhere(logps, "reference cache"):  # computing is collective: all processes or none
        if hosts.is_writer():
            _remove_parts(path)
        return logps
    logps, is_computed = _load_parts(path, inputs, shape, report)
    if not _is_same_everywhere({**logps, "is_computed": is_computed}, "parts of the reference cache"):
        logps, is_computed = {}, np.zeros(len(store), bool)  # without a shared disk, processes see different parts
    is_missing = np.zeros(len(store), bool)
    is_missing[needed_ids] = ~is_computed[needed_ids]
    remaining_steps = np.unique(np.flatnonzero(is_missing) // batches.order.batch).tolist()
    if remaining_steps and not path.is_file():
        _report_others(path, inputs, report)
    for count, start in enumerate(range(0, len(remaining_steps), PART_STEPS)):
        ids, fields = compute(batches, remaining_steps[start : start + PART_STEPS])
        is_new = ~is_computed[ids]
        _put(logps, ids[is_new], {field: np.asarray(values)[is_new] for field, values in fields.items()}, shape)
        is_computed[ids] = True
        if count % jax.process_count() == jax.process_index():
            with suppress(FileNotFoundError):  # another run has finished the cache and removed all parts
                _write(_part_path(path, ids), inputs, {**fields, "ids": ids})
    _refuse_gaps(logps, is_computed, needed_ids, path)
    is_complete = bool(is_computed.all())
    if hosts.is_writer() and is_complete:
        _write(path, inputs, logps)
    hosts.barrier("reference cache")
    if hosts.is_writer() and is_complete:
        _remove_parts(path)
    return logps


def _is_same_everywhere(fields: Arrays | None, what: str) -> TypeGuard[Arrays]:
    """Return whether every process has the same arrays; None is none."""
    digests = hosts.gather(None if fields is None else _digest(fields), what)
    return digests[0] is not None and len(set(digests)) == 1


def _remove_parts(path: Path) -> None:
    for part in list_files(path.parent, f"{path.stem}.part-*"):  # including partly written ones of killed runs
        part.unlink(missing_ok=True)


def _report_others(path: Path, inputs: Mapping, report: Callable[[str], None]) -> None:
    """Report how the complete files of other inputs differ."""
    for other in list_files(path.parent, "reference-*.npz"):
        if ".part-" not in other.name:
            report(f"reference cache: {other} {_difference(other, inputs)}: recomputing")


def _load_complete(path: Path, inputs: Mapping, shape: tuple[int, int], report: Callable[[str], None]) -> Arrays | None:
    """Load the log-probs of a complete cache file; if it cannot be used, report why and return None."""
    if not path.is_file():
        return None
    try:
        fields = _read(path, inputs)
        if any(values.shape != shape for values in fields.values()):
            shapes_text = ", ".join(str(values.shape) for values in fields.values())
            raise Unusable(f"it holds log-probs of shape {shapes_text}, but the data needs {shape}")
        is_finite = np.all([np.isfinite(values).all(1) for values in fields.values()], axis=0)
        if not is_finite.all():
            raise Unusable(f"row {int(np.argmin(is_finite))} has a log-prob that is not finite")
    except Unusable as error:
        report(f"reference cache: {path} cannot be used ({error}): recomputing")
        return None
    return fields


def _load_parts(
    path: Path, inputs: Mapping, shape: tuple[int, int], report: Callable[[str], None]
) -> tuple[Arrays, np.ndarray]:
    """Load the rows that earlier builds computed: their log-probs, and whether a row is one of them."""
    logps: Arrays = {}
    is_computed = np.zeros(shape[0], bool)
    for part in list_files(path.parent, f"{path.stem}.part-*.npz"):
        try:
            fields = _read(part, inputs)
            ids = fields.pop("ids", np.zeros(0, int))
            ids_are_valid = ids.ndim == 1 and len(np.unique(ids)) == len(ids) and ((ids >= 0) & (ids < shape[0])).all()
            arrays = fields.values()
            if not ids_are_valid or not all(x.shape == (len(ids), shape[1]) and np.isfinite(x).all() for x in arrays):
                raise Unusable("its rows do not match the data")
        except Unusable as error:
            report(f"reference cache: {part} cannot be used ({error}): recomputing its rows")
            continue
        is_new = ~is_computed[ids]
        _put(logps, ids[is_new], {field: values[is_new] for field, values in fields.items()}, shape)
        is_computed[ids] = True
    return logps, is_computed


def _put(logps: Arrays, ids: np.ndarray, fields: Mapping[str, np.ndarray], shape: tuple[int, int]) -> None:
    for name, values in fields.items():
        logps.setdefault(name, np.full(shape, np.nan, np.float32))[ids] = values


def _part_path(path: Path, ids: np.ndarray) -> Path:
    """Name a part by its first row and by all of them: runs that need other rows write other parts."""
    return path.with_suffix(f".part-{int(ids[0]):08d}-{hashlib.sha256(ids.tobytes()).hexdigest()[:8]}.npz")


def _refuse_gaps(logps: Arrays, is_computed: np.ndarray, needed_ids: np.ndarray, path: Path) -> None:
    missing = needed_ids[~is_computed[needed_ids]]
    if len(missing):
        raise RunStopped(f"reference cache: {path}: row {missing[0]} was not computed")
    for values in logps.values():
        rows = np.flatnonzero(is_computed & ~np.isfinite(values).all(1))
        if len(rows):
            remedy = "check the reference's weights and model.dtype"
            problem = f"the reference log-prob of row {rows[0]} is not finite ({len(rows)} such rows in total)"
            raise RunStopped(f"reference cache: {problem}: {remedy}")


def _difference(path: Path, inputs: Mapping) -> str:
    """Return how a file's inputs differ from ``inputs``, such as `was made with different dtype`, for messages."""
    try:
        saved_inputs, _ = _load(path, arrays=False)
    except Unusable:
        return "cannot be read"
    saved_inputs.pop("digest", None)
    names = [name for name in {**inputs, **saved_inputs} if inputs.get(name) != saved_inputs.get(name)]
    return "was made with different " + ", ".join(names).replace("_", " ")


def _digest(fields: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(fields):
        digest.update(name.encode() + np.ascontiguousarray(fields[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path, inputs: Mapping) -> Arrays:
    """Read and verify the arrays of a file."""
    saved_inputs, fields = _load(path)
    if saved_inputs != {**inputs, "digest": saved_inputs.get("digest")}:
        raise Unusable(f"it {_difference(path, inputs)}")
    if saved_inputs.get("digest") != _digest(fields):
        raise Unusable("its checksum is wrong")
    return fields


def _load(path: Path, arrays: bool = True) -> tuple[dict[str, Any], Arrays]:
    """Load the inputs that a file was made from and, unless ``arrays`` is false, its arrays."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            saved_inputs = {**json.loads(str(file["about"]))}
            return saved_inputs, {name: file[name] for name in file.files if arrays and name != "about"}
    except Exception as error:  # zip, zlib, numpy and json each raise their own types
        raise Unusable("it is truncated or damaged") from error


def _write(path: Path, inputs: Mapping, fields: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"about": json.dumps({**inputs, "digest": _digest(fields)}), **fields}
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getbuffer(), durable=True)
