"""The frozen model that the policy is held to: run in every step, or run once and remembered.

Either way it is made of its own arrays: a copy of the policy's start, never an alias of what the step donates. Only a
run of adapters needs no copy: its base is never donated.
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
    """New arrays with the same values, cast to ``dtype`` if given. A cast to the same type alone would alias."""
    return jax.tree.map(lambda x: jnp.copy(x if dtype is None else x.astype(dtype)), params)


@dataclass(frozen=True)
class LiveReference:
    """Weights whose forward pass runs in every step: a second tree, or an `Adapted` without adapters."""

    weights: Any

    def sums(
        self, logps_step: LogpsStep, data: StepData, store: Store, microbatches: Sequence[PreferenceBatch]
    ) -> np.ndarray:
        """Log-probs [B, K] of a step, whose batch lies on the devices in ``microbatches``."""
        return np.concatenate([np.asarray(logps_step(self.weights, microbatch).sum) for microbatch in microbatches])

    def dataset(self, logps_step: LogpsStep, batches: Batches, to_devices: ToDevices) -> PairLogps:
        """Log-probs of a whole set."""
        return dataset_logps(logps_step, self.weights, batches, to_devices)[1]


@dataclass(frozen=True)
class CachedReference:
    """Log-probs of every example of the run's stores, by store key; no weights."""

    logps: Mapping[str, Mapping[str, np.ndarray]]  # store key -> field of PairLogps -> [N, K] float32

    def _pairs(self, store: Store, ids: np.ndarray) -> PairLogps:
        real = ids >= 0
        safe_ids = np.maximum(ids, 0)
        take = lambda values: np.where(real[:, None], values[safe_ids], 0).astype(np.float32)  # noqa: E731
        kept = {name: take(values) for name, values in self.logps[store.key].items()}
        return PairLogps(count=take(store.num_targets), weight=real.astype(np.float32), valid=real, **kept)  # type: ignore[arg-type]

    def of(self, data: StepData, store: Store) -> PairLogps:
        """Log-probs of a step, as `dpo_jax.step.Frozen` takes them; leading dim: microbatches."""
        pairs = self._pairs(store, data.ids)
        if data.batch.valid.ndim == 1:
            return pairs
        return jax.tree.map(lambda x: x.reshape(*data.batch.valid.shape, *x.shape[1:]), pairs)

    def sums(
        self, logps_step: LogpsStep, data: StepData, store: Store, microbatches: Sequence[PreferenceBatch]
    ) -> np.ndarray:
        """Log-probs [B, K] of a step."""
        return np.asarray(self._pairs(store, data.ids).sum)

    def dataset(self, logps_step: LogpsStep, batches: Batches, to_devices: ToDevices) -> PairLogps:
        """Log-probs of a whole set."""
        return self._pairs(batches.store, np.concatenate(batches.order.groups))


Reference = LiveReference | CachedReference
