"""Log-probs of whole sets of examples, for evaluation and for the reference's cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax.batch import PairLogps, PreferenceBatch
from dpo_jax.data.batches import Batches

LogpsStep = Callable[[Any, PreferenceBatch], PairLogps]  # compiled: (params, batch on the devices)
Place = Callable[[PreferenceBatch], PreferenceBatch]  # host arrays -> arrays on the devices


def make_logps_step(logps_fn: LogpsStep, whole: Any) -> LogpsStep:
    """``logps_fn`` compiled; every process gets all pairs' log-probs (``whole``: the sharding that says so)."""
    return jax.jit(logps_fn, out_shardings=whole)


def make_place(rows: Any, whole: Any) -> Place:
    """Puts a batch on the devices, each process its own part; ``rows`` and ``whole`` are shardings."""

    def put(array: np.ndarray, sharding: Any) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return lambda batch: jax.tree.map(put, batch, batch.place(rows, whole))


def dataset_logps(
    logps_step: LogpsStep, params: Any, batches: Batches, place: Place, steps: Sequence[int] | None = None
) -> tuple[np.ndarray, PairLogps]:
    """Log-probs of every example of ``batches``, or of some of its steps, on the host, in their order.

    Returns:
        Example ids [N], and the PairLogps of these N.
    """
    ids, parts = [], []
    for data in batches.ahead(range(batches.order.num_steps) if steps is None else steps):
        logps = logps_step(params, place(data.batch))
        real = data.ids >= 0
        ids.append(data.ids[real])
        parts.append(jax.tree.map(lambda x: np.asarray(x)[real], logps))  # noqa: B023  used at once
    return np.concatenate(ids), jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
