"""The frozen reference model: evaluated in every step, or once with its log-probs cached.

A live reference is a copy of the initial policy and never an alias of arrays that the step donates. Only a run of
adapters needs no copy, as its base weights are never donated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import PairLogps, PreferenceBatch
from dpo_jax.batching.batches import Batches, StepData
from dpo_jax.batching.to_devices import ToDevices
from dpo_jax.data.store import Store
from dpo_jax.inference.score import LogpsStep, dataset_logps


def copy_weights(params: Any, dtype: str | None) -> Any:
    """Copy the arrays, cast to ``dtype`` if given. Without the copy, a cast to the same dtype would alias them."""
    return jax.tree.map(lambda x: jnp.copy(x if dtype is None else x.astype(dtype)), params)


@dataclass(frozen=True)
class LiveReference:
    """A reference model, evaluated at every step: its own copy of all weights, or the base weights without adapters."""

    weights: Any

    def sums(
        self, logps_step: LogpsStep, data: StepData, store: Store, microbatches: Sequence[PreferenceBatch]
    ) -> np.ndarray:
        """Compute the log-probs [B, K] of a step's batch, given as ``microbatches`` on the devices."""
        return np.concatenate([np.asarray(logps_step(self.weights, microbatch).sum) for microbatch in microbatches])

    def dataset(self, logps_step: LogpsStep, batches: Batches, to_devices: ToDevices) -> PairLogps:
        """Compute the log-probs of all examples of a set."""
        return dataset_logps(logps_step, self.weights, batches, to_devices)[1]


@dataclass(frozen=True)
class CachedReference:
    """Cached reference log-probs of the examples that the run uses; no reference weights are in memory."""

    logps: Mapping[str, Mapping[str, np.ndarray]]  # store key -> field of PairLogps -> [N, K] float32; NaN: not used

    def _pairs(self, store: Store, ids: np.ndarray) -> PairLogps:
        is_real = ids >= 0
        clipped_ids = np.maximum(ids, 0)
        lookup = lambda values: np.where(is_real[:, None], values[clipped_ids], 0).astype(np.float32)  # noqa: E731
        logps = {name: lookup(values) for name, values in self.logps[store.key].items()}
        return PairLogps(count=lookup(store.num_targets), weight=is_real.astype(np.float32), valid=is_real, **logps)  # type: ignore[arg-type]

    def of(self, data: StepData, store: Store) -> PairLogps:
        """Look up a step's log-probs in the form of `dpo_jax.step.Frozen`: by microbatch if the batch has several."""
        pair_logps = self._pairs(store, data.ids)
        if data.batch.valid.ndim == 1:
            return pair_logps
        return jax.tree.map(lambda x: x.reshape(*data.batch.valid.shape, *x.shape[1:]), pair_logps)

    def sums(
        self, logps_step: LogpsStep, data: StepData, store: Store, microbatches: Sequence[PreferenceBatch]
    ) -> np.ndarray:
        """Look up the log-probs [B, K] of a step."""
        return np.asarray(self._pairs(store, data.ids).sum)

    def dataset(self, logps_step: LogpsStep, batches: Batches, to_devices: ToDevices) -> PairLogps:
        """Look up the log-probs of all examples of a set."""
        return self._pairs(batches.store, np.concatenate(batches.order.groups))


Reference = LiveReference | CachedReference
