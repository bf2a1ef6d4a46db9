"""Transfer each process's rows from the host to global arrays on the devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.batch import PreferenceBatch
from dpo_jax.parallel.sharding import local_row_shards, replicated, row_devices, row_sharding

ToDevices = Callable[[PreferenceBatch], PreferenceBatch]  # this process's rows on the host -> global arrays


def make_to_devices(mesh: Mesh, leading: int = 0) -> ToDevices:
    """Return a function that puts this process's rows on its devices, as shards of arrays that span all processes.

    ``leading``: number of dims before the rows, 1 with gradient accumulation.
    """
    shards, rows_sharding, replicated_sharding = local_row_shards(mesh), row_sharding(mesh, leading), replicated(mesh)

    def put_rows(array: np.ndarray) -> jax.Array:
        rows_per_shard = array.shape[leading] // len(shards)
        shape = (*array.shape[:leading], rows_per_shard * row_devices(mesh), *array.shape[leading + 1 :])

        def device_rows(index: Any) -> np.ndarray:
            start = shards.index((index[leading].start or 0) // rows_per_shard) * rows_per_shard
            return array[(*index[:leading], slice(start, start + rows_per_shard))]

        return jax.make_array_from_callback(shape, rows_sharding, device_rows)

    def put_replicated(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, replicated_sharding, lambda index: array[index])

    return lambda batch: jax.tree.map(lambda put, array: put(array), batch.per_array(put_rows, put_replicated), batch)
