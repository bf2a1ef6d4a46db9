"""Log-probs of whole datasets, for evaluation and for the reference cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from dpo_jax.batch import PairLogps, PreferenceBatch
from dpo_jax.batching.batches import Batches
from dpo_jax.batching.to_devices import ToDevices

LogpsStep = Callable[[Any, PreferenceBatch], PairLogps]  # compiled: (weights, batch on the devices)


def dataset_logps(
    logps_step: LogpsStep, weights: Any, batches: Batches, to_devices: ToDevices, steps: Sequence[int] | None = None
) -> tuple[np.ndarray, PairLogps]:
    """Compute the log-probs of all examples, or only of those in ``steps``, and return them in order as host arrays.

    Returns:
        Example ids [N], and the PairLogps of these N examples; a mixture's sums over tokens are those of all batches.
    """
    ids, chunks, sums = [], [], []
    for data in batches.ahead(range(batches.order.num_steps) if steps is None else steps):
        logps = logps_step(weights, to_devices(data.batch))
        is_real = data.ids >= 0
        ids.append(data.ids[is_real])
        sums.append(jax.device_get(logps.balance))
        chunks.append(jax.tree.map(lambda x: np.asarray(x)[is_real], replace(logps, balance=None)))  # noqa: B023  used at once
    joined_logps = jax.tree.map(lambda *arrays: np.concatenate(arrays), *chunks)
    return np.concatenate(ids), replace(joined_logps, balance=jax.tree.map(lambda *arrays: sum(arrays), *sums))
