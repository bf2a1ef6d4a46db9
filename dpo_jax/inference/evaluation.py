"""Metrics of whole sets of examples: means over all of them, exact for any batch size."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.batch import PairLogps
from dpo_jax.batching.batches import Batches
from dpo_jax.batching.to_devices import ToDevices
from dpo_jax.config import LossConfig
from dpo_jax.data.store import Store
from dpo_jax.inference.distributions import reward_distributions
from dpo_jax.inference.reference import Reference
from dpo_jax.inference.score import LogpsStep, dataset_logps
from dpo_jax.losses import preference_metrics


class ScoredSet(NamedTuple):
    """An evaluation set and its log-probs."""

    name: str
    store: Store
    ids: np.ndarray  # [N] examples
    policy: PairLogps  # of these N
    reference: PairLogps | None

    def metrics(self, loss: LossConfig) -> dict[str, float]:
        """As `preference_metrics` names them."""
        values = jax.device_get(preference_metrics(self.policy, self.reference, loss))
        return {name: float(value) for name, value in values.items()}


def score_sets(
    sets: Mapping[str, Batches],
    logps_step: LogpsStep,
    to_devices: ToDevices,
    weights: Any,
    reference: Reference | None,
) -> Iterator[ScoredSet]:
    """Every set, scored, one after another."""
    for name, batches in sets.items():
        ids, policy = dataset_logps(logps_step, weights, batches, to_devices)
        logps = None if reference is None else reference.dataset(logps_step, batches, to_devices)
        yield ScoredSet(name, batches.store, ids, policy, logps)


def evaluation_of(scored: Iterator[ScoredSet], loss: LossConfig) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of every set as ``eval_NAME_METRIC``, and what these means stand for, an object a set.

    Sets of one answer a prompt have no rewards, and so no such object.
    """
    metrics, distributions = {}, []
    for one in scored:
        metrics |= {f"eval_{one.name}_{key}": value for key, value in one.metrics(loss).items()}
        if one.policy.sum.shape[1] > 1:
            distribution = reward_distributions(one.policy, one.reference, loss)
            distributions.append({"set": one.name, "pairs": len(one.ids), **distribution})
    return metrics, distributions
