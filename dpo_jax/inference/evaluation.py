"""Metrics of whole evaluation sets: means over all examples, exact for any batch size."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.batch import CHOSEN, REJECTED, PairLogps
from dpo_jax.batching.batches import Batches
from dpo_jax.batching.to_devices import ToDevices
from dpo_jax.config import LossConfig
from dpo_jax.data.store import Store
from dpo_jax.inference.distributions import calibration, reward_distributions, reward_margins
from dpo_jax.inference.reference import Reference
from dpo_jax.inference.score import LogpsStep, dataset_logps
from dpo_jax.losses import preference_metrics

_metrics = jax.jit(preference_metrics, static_argnums=2)  # one compiled program instead of one per operation


class ScoredSet(NamedTuple):
    """An evaluation set with its log-probs."""

    name: str
    store: Store
    ids: np.ndarray  # [N] example ids
    policy: PairLogps  # of these N examples
    reference: PairLogps | None
    scores: PairLogps | None = None  # of a reward model

    def metrics(self, loss: LossConfig) -> dict[str, float]:
        """Compute the metrics of `preference_metrics` as floats, and those of a reward model on the same pairs."""
        values = jax.device_get(_metrics(self.policy, self.reference, loss))
        metrics = {name: float(value) for name, value in values.items()}
        if self.scores is not None:
            margins, policy_margins = self.score_margins, reward_margins(self.policy, self.reference, loss)
            agreement = (np.sign(margins) * np.sign(policy_margins) + 1) / 2
            metrics["reward_model/accuracies"] = float((margins > 0).mean())
            metrics["reward_model/agreement"] = float(agreement.mean())
        return metrics

    def distributions(self, loss: LossConfig) -> dict[str, Any]:
        """Return `reward_distributions`, plus a reward model's calibration, if there is one, as ``reward_model``."""
        distributions = reward_distributions(self.policy, self.reference, loss)
        if self.scores is not None:
            margins = self.score_margins
            distributions["reward_model"] = {"calibration": calibration(margins[np.isfinite(margins)])}
        return distributions

    @property
    def score_margins(self) -> np.ndarray:
        """The reward model's score of the chosen answer minus that of the rejected one, [N]."""
        assert self.scores is not None
        return np.asarray(self.scores.sum[:, CHOSEN] - self.scores.sum[:, REJECTED])


def score_sets(
    sets: Mapping[str, Batches],
    logps_step: LogpsStep,
    to_devices: ToDevices,
    weights: Any,
    reference: Reference | None,
    scores: Mapping[str, PairLogps],
) -> Iterator[ScoredSet]:
    """Score each set in turn and yield it with the log-probs of policy and reference.

    ``scores``: those of a reward model by set, or none.
    """
    for name, batches in sets.items():
        ids, policy_logps = dataset_logps(logps_step, weights, batches, to_devices)
        reference_logps = None if reference is None else reference.dataset(logps_step, batches, to_devices)
        yield ScoredSet(name, batches.store, ids, policy_logps, reference_logps, scores.get(name))


def evaluation_of(scored: Iterator[ScoredSet], loss: LossConfig) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the metrics of all sets, named ``eval_SET_METRIC``, and the reward distributions of each set.

    Sets with one answer per prompt have no rewards and therefore no distributions.
    """
    metrics, distributions = {}, []
    for scored_set in scored:
        metrics |= {f"eval_{scored_set.name}_{key}": value for key, value in scored_set.metrics(loss).items()}
        if scored_set.policy.sum.shape[1] > 1:
            distribution = scored_set.distributions(loss)
            distributions.append({"set": scored_set.name, "pairs": len(scored_set.ids), **distribution})
    return metrics, distributions
