"""The reference's log-probs on disk: computed once for what decides them, proven whole before they are used.

``reference-KEY.npz``, next to the tokenised data, holds the log-probs of every row and what made them. While it is
being computed, ``reference-KEY.part-N.npz`` hold the rows that are done, each part written by one process; an
interrupted build resumes from them.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.batching.batches import Batches
from dpo_jax.console import warn
from dpo_jax.errors import RunStopped
from dpo_jax.parallel import hosts
from dpo_jax.storage import list_files, write_whole

PART_STEPS = 64  # steps between two parts
Arrays = dict[str, np.ndarray]  # field of PairLogps -> [N, K] float32
Compute = Callable[[Batches, Sequence[int]], tuple[np.ndarray, Mapping[str, np.ndarray]]]


class Unusable(Exception):
    """A file is there and cannot be used; the text says why."""


def cached_logps(
    batches: Batches, made_by: Mapping[str, Any], compute: Compute, notice: Callable[[str], None] | None = None
) -> Arrays:
    """Reference log-probs of a whole store, from its file, or computed and kept there.

    Args:
        batches: hold every example of the store once, in order.
        made_by: what decides the log-probs besides the store; a file made by anything else is not taken.
        compute: (batches, steps) -> ids [n] and the fields of these rows, each [n, K].
        notice: takes each line about a file that cannot be used; default: the writer's standard error.

    Raises:
        RunStopped: what was computed does not hold each row once.
    """
    notice = notice or warn
    store = batches.store
    made_by = json.loads(json.dumps(made_by))
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    path = store.path / f"reference-{name}.npz"
    shape = (len(store), store.lengths.shape[1] - 1)
    logps = _whole(path, made_by, shape, notice)
    if all(hosts.gather(logps is not None, "reference cache")):  # all compute, or none: computing is collective
        assert logps is not None
        return logps
    logps, computed = _parts(path, made_by, shape, notice)
    if len(set(hosts.gather(hashlib.sha256(computed.tobytes()).hexdigest(), "parts of the reference cache"))) > 1:
        logps, computed = (
            {},
            np.zeros(len(store), int),
        )  # without a shared disk each sees its own parts
    ids_of = [ids[ids >= 0] for ids in map(batches.order.step_ids, range(batches.order.num_steps))]
    todo = [step for step, ids in enumerate(ids_of) if not computed[ids].all()]
    for count, start in enumerate(range(0, len(todo), PART_STEPS)):
        ids, fields = compute(batches, todo[start : start + PART_STEPS])
        new = computed[ids] == 0
        _put(logps, ids[new], {field: np.asarray(values)[new] for field, values in fields.items()}, shape)
        computed[ids[new]] += 1
        if count % jax.process_count() == jax.process_index():
            with suppress(FileNotFoundError):  # another run came first with the whole, and took all parts away
                _write(path.with_suffix(f".part-{int(ids[0]):08d}.npz"), made_by, {**fields, "ids": ids})
    _refuse_gaps(logps, computed, path)
    if hosts.is_writer():
        _write(path, made_by, logps)
    hosts.barrier("reference cache")
    if hosts.is_writer():
        for part in list_files(path.parent, f"{path.stem}.part-*"):  # with those whose writer was killed at it
            part.unlink(missing_ok=True)
    return logps


def _whole(path: Path, made_by: Mapping, shape: tuple[int, int], notice: Callable[[str], None]) -> Arrays | None:
    """The file's log-probs; None, and a line that says why, where there are none to be used."""
    if not path.is_file():
        for sibling in list_files(path.parent, "reference-*.npz"):
            if ".part-" not in sibling.name:
                notice(f"reference cache: {sibling} is of {_difference(sibling, made_by)}: computing again")
        return None
    try:
        fields = _read(path, made_by)
        if any(values.shape != shape for values in fields.values()):
            shapes = ", ".join(str(values.shape) for values in fields.values())
            raise Unusable(f"it holds {shapes} log-probs, the data has {shape}")
        finite = np.all([np.isfinite(values).all(1) for values in fields.values()], axis=0)
        if not finite.all():
            raise Unusable(f"row {int(np.argmin(finite))} has no log-prob")
    except Unusable as why:
        notice(f"reference cache: {path} cannot be used ({why}): computing again")
        return None
    return fields


def _parts(
    path: Path, made_by: Mapping, shape: tuple[int, int], notice: Callable[[str], None]
) -> tuple[Arrays, np.ndarray]:
    """Rows that an earlier build had done: their log-probs, and for each row of the store whether it is one."""
    logps: Arrays = {}
    computed = np.zeros(shape[0], int)
    for part in list_files(path.parent, f"{path.stem}.part-*.npz"):
        try:
            fields = _read(part, made_by)
            ids = fields.pop("ids", np.zeros(0, int))
            inside = ids.ndim == 1 and len(np.unique(ids)) == len(ids) and ((ids >= 0) & (ids < shape[0])).all()
            arrays = fields.values()
            if not inside or not all(x.shape == (len(ids), shape[1]) and np.isfinite(x).all() for x in arrays):
                raise Unusable("its rows are not those of the data")
        except Unusable as why:
            notice(f"reference cache: {part} cannot be used ({why}): its rows are computed again")
            continue
        new = computed[ids] == 0
        _put(logps, ids[new], {field: values[new] for field, values in fields.items()}, shape)
        computed[ids] = 1
    return logps, computed


def _put(logps: Arrays, ids: np.ndarray, fields: Mapping[str, np.ndarray], shape: tuple[int, int]) -> None:
    for name, values in fields.items():
        logps.setdefault(name, np.full(shape, np.nan, np.float32))[ids] = values


def _refuse_gaps(logps: Arrays, computed: np.ndarray, path: Path) -> None:
    wrong = np.flatnonzero(computed != 1)
    if len(wrong):
        raise RunStopped(f"reference cache: {path}: row {wrong[0]} was computed {computed[wrong[0]]} times, not once")
    for values in logps.values():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            remedy = "check the reference's weights and model.dtype"
            wrong_rows = f"the reference's log-prob of row {bad[0]} is not finite, of {len(bad)} rows in all"
            raise RunStopped(f"reference cache: {wrong_rows}: {remedy}")


def _difference(path: Path, made_by: Mapping) -> str:
    """In what a file's makers differ from these."""
    try:
        about, _ = _load(path, arrays=False)
    except Unusable:
        return "nothing that can be read"
    names = [name for name in {**made_by, **about} if name != "digest" and made_by.get(name) != about.get(name)]
    return "another " + ", ".join(names).replace("_", " ")


def _digest(fields: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(fields):
        digest.update(name.encode() + np.ascontiguousarray(fields[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path, made_by: Mapping) -> Arrays:
    """The arrays of a file.

    Raises:
        Unusable: it is torn or damaged, or made by something else.
    """
    about, fields = _load(path)
    if about != {**made_by, "digest": about.get("digest")}:
        raise Unusable(f"it is of {_difference(path, made_by)}")
    if about.get("digest") != _digest(fields):
        raise Unusable("its checksum is wrong")
    return fields


def _load(path: Path, arrays: bool = True) -> tuple[dict[str, Any], Arrays]:
    """What made a file, and its arrays if wanted."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = {**json.loads(str(file["about"]))}
            return about, {name: file[name] for name in file.files if arrays and name != "about"}
    except Exception as error:  # zip, zlib, numpy and json each have their own
        raise Unusable("it is cut off or damaged") from error


def _write(path: Path, made_by: Mapping, fields: Mapping[str, np.ndarray]) -> None:
    file = io.BytesIO()
    named: dict[str, Any] = {"about": json.dumps({**made_by, "digest": _digest(fields)}), **fields}
    np.savez(file, **named)
    write_whole(path, file.getbuffer(), durable=True)
