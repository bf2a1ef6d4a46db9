"""The frozen model that the policy is held to: run beside it, or run once and remembered.

Either way it is made of its own arrays: a copy of the policy's start, never an alias of what the step donates.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import PairLogps, PreferenceBatch
from dpo_jax.checksums import describe_leaves, leaf_checksums
from dpo_jax.data.batches import Batches, StepData
from dpo_jax.data.store import Store
from dpo_jax.hosts import barrier, gather, is_writer
from dpo_jax.scoring import LogpsStep, Place, dataset_logps


def weights_id(params: Any) -> str:
    """SHA-256 (hex) over path, shape, type and checksum of every weight; how they lie on devices does not matter."""
    leaves = describe_leaves(params)
    sums = leaf_checksums(params)
    return hashlib.sha256(json.dumps([leaves, sums], sort_keys=True).encode()).hexdigest()


def copy_weights(params: Any, dtype: str | None) -> Any:
    """New arrays with the same values, cast to ``dtype`` if given. A cast to the same type alone would alias."""
    return jax.tree.map(lambda x: jnp.copy(x if dtype is None else x.astype(dtype)), params)


@dataclass(frozen=True)
class LiveReference:
    """A second tree of weights, whose forward pass runs in every step."""

    params: Any

    def of(self, data: StepData, store: Store) -> Any:
        """The step's ``reference`` argument."""
        return self.params

    def logps(self, logps_step: LogpsStep, data: StepData, store: Store, batch: PreferenceBatch) -> PairLogps:
        """Log-probs of a batch."""
        return logps_step(self.params, batch)

    def dataset(self, logps_step: LogpsStep, batches: Batches, place: Place) -> PairLogps:
        """Log-probs of a whole set."""
        return dataset_logps(logps_step, self.params, batches, place)[1]


@dataclass(frozen=True)
class CachedReference:
    """Log-probs of every example of the run's stores, by store key; no weights."""

    sums: Mapping[str, np.ndarray]  # [N, K] float32

    def _pairs(self, store: Store, ids: np.ndarray) -> PairLogps:
        real = ids >= 0
        held = np.maximum(ids, 0)
        sums = np.where(real[:, None], self.sums[store.key][held], 0).astype(np.float32)
        counts = np.where(real[:, None], store.num_targets[held], 0).astype(np.float32)
        return PairLogps(sum=sums, count=counts, weight=real.astype(np.float32), valid=real)  # type: ignore[arg-type]

    def of(self, data: StepData, store: Store) -> PairLogps:
        """The step's ``reference`` argument; leading dim: parts of an accumulated step."""
        pairs = self._pairs(store, data.ids)
        if data.batch.valid.ndim == 1:
            return pairs
        num_parts = data.batch.valid.shape[0]
        return jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), pairs)

    def logps(self, logps_step: LogpsStep, data: StepData, store: Store, batch: PreferenceBatch) -> PairLogps:
        """Log-probs of a batch."""
        return self._pairs(store, data.ids)

    def dataset(self, logps_step: LogpsStep, batches: Batches, place: Place) -> PairLogps:
        """Log-probs of a whole set."""
        return self._pairs(batches.store, np.concatenate(batches.order.groups))


Reference = LiveReference | CachedReference


def cached_sums(batches: Batches, made_by: Mapping[str, Any], compute: Callable[[Batches], PairLogps]) -> np.ndarray:
    """Reference log-probs [N, K] of a whole store, from its file, or computed and kept there.

    ``made_by`` is what decides them besides the store; a file made by anything else has another name. One that is
    damaged or of another size is computed again. ``batches`` hold every example of the store once, in order.
    """
    store = batches.store
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    path = store.path / f"reference-{name}.npz"
    sums = _read(path, made_by, (len(store), store.lengths.shape[1] - 1))
    found = gather(sums is not None, "reference cache")  # every process computes, or none: computing is collective
    if sums is None or not all(found):
        sums = np.asarray(compute(batches).sum)
        if is_writer():
            _write(path, made_by, sums)
        barrier("reference cache")
    return sums


def _digest(sums: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(sums).tobytes()).hexdigest()


def _read(path: Path, made_by: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            sums, about = file["sums"], json.loads(str(file["about"]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    good = about == {**made_by, "digest": _digest(sums)} and sums.shape == shape and np.isfinite(sums).all()
    return sums if good else None


def _write(path: Path, made_by: Mapping[str, Any], sums: np.ndarray) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    with open(partial, "wb") as file:
        np.savez(file, sums=sums, about=json.dumps({**made_by, "digest": _digest(sums)}))
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
