"""Log-probs of whole sets of examples, for evaluation and for the reference's cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.batch import PairLogps, PreferenceBatch
from dpo_jax.data.batches import Batches
from dpo_jax.sharding import own_shares, replicated, row_devices, row_sharding

LogpsStep = Callable[[Any, PreferenceBatch], PairLogps]  # compiled: (params, batch on the devices)
Place = Callable[[PreferenceBatch], PreferenceBatch]  # this process' rows on the host -> whole arrays on the devices


def make_logps_step(logps_fn: LogpsStep, out_sharding: Any) -> LogpsStep:
    """``logps_fn`` compiled; every process gets all pairs' log-probs (``out_sharding`` says so)."""
    return jax.jit(logps_fn, out_shardings=out_sharding)


def make_place(mesh: Mesh, leading: int = 0) -> Place:
    """Puts a batch of this process' rows on its devices: all processes' rows together are the arrays.

    ``leading``: dims before the rows, those of an accumulated step.
    """
    shares, rows, replicated_sharding = own_shares(mesh), row_sharding(mesh, leading), replicated(mesh)

    def put_rows(array: np.ndarray) -> jax.Array:
        size = array.shape[leading] // len(shares)  # rows of a share
        shape = (*array.shape[:leading], size * row_devices(mesh), *array.shape[leading + 1 :])

        def part(index: Any) -> np.ndarray:
            start = shares.index((index[leading].start or 0) // size) * size
            return array[(*index[:leading], slice(start, start + size))]

        return jax.make_array_from_callback(shape, rows, part)

    def put_whole(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, replicated_sharding, lambda index: array[index])

    return lambda batch: jax.tree.map(lambda put, array: put(array), batch.place(put_rows, put_whole), batch)


def dataset_logps(
    logps_step: LogpsStep, params: Any, batches: Batches, to_devices: Place, steps: Sequence[int] | None = None
) -> tuple[np.ndarray, PairLogps]:
    """Log-probs of every example of ``batches``, or of some of its steps, on the host, in their order.

    Returns:
        Example ids [N], and the PairLogps of these N.
    """
    ids, chunks = [], []
    for data in batches.ahead(range(batches.order.num_steps) if steps is None else steps):
        logps = logps_step(params, to_devices(data.batch))
        real = data.ids >= 0
        ids.append(data.ids[real])
        chunks.append(jax.tree.map(lambda x: np.asarray(x)[real], logps))  # noqa: B023  used at once
    return np.concatenate(ids), jax.tree.map(lambda *arrays: np.concatenate(arrays), *chunks)
