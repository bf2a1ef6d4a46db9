"""Pack the batch of a step as a pure function of (data, seed, step); a thread prefetches the next few steps."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np

from dpo_jax.batch import PreferenceBatch
from dpo_jax.batching.order import Order, make_order
from dpo_jax.batching.packing import ExampleTokens, Packer, choose_shapes, pack_rows, step_shape
from dpo_jax.batching.sets import DataSets
from dpo_jax.config import AnyBatch
from dpo_jax.data.store import Store

SAMPLED_STEPS = 2048  # approximate number of steps sampled to choose the row shapes
NUM_PREFETCHED = 2  # number of batches to prefetch
STEPS_PER_SHAPE = 24  # number of steps for which compiling one more shape pays off


@dataclass(frozen=True)
class StepData:
    """The packed pairs of one step, as numpy arrays."""

    step: int
    ids: np.ndarray  # [B] example ids; -1: padding
    batch: PreferenceBatch  # this process's rows; leading dim: microbatches, with gradient accumulation
    num_tokens: int  # counted as in TRL: each answer together with its prompt
    num_real_tokens: int  # real tokens in the rows of all processes
    slots: int  # token slots in these rows

    @property
    def fill(self) -> float:
        """Fraction of token slots that hold real tokens."""
        return self.num_real_tokens / self.slots


@dataclass(frozen=True)
class Batches:
    """The batches of a run: ``batches(step)`` packs the batch of a step, counted from 0.

    Every process assigns the same pairs to the same rows, from their lengths alone, and packs only its own rows.
    """

    store: Store
    order: Order
    packer: Packer
    local_row_shards: Sequence[int] | None = None  # row shards of this process, out of packer.multiple; None: all

    def __call__(self, step: int) -> StepData:
        """Pack the batch of one step, counted from 0."""
        ids = self.order.step_ids(step)
        return self.pack(step, ids, *_sizes(self.store, ids), lambda slot: self.store.example(ids[slot]))

    def pack(
        self,
        step: int,
        ids: np.ndarray,
        lengths: np.ndarray,
        num_targets: np.ndarray,
        example: Callable[[int], ExampleTokens],
    ) -> StepData:
        """Pack examples into the rows of a step; ``example(i)`` returns the i-th example of the step.

        ``lengths`` [B, 1 + K] and ``num_targets`` [B, K] as in `make_units`; ``ids`` [B].
        """
        microbatches = self.packer.rows(lengths, num_targets)
        shape = self.packer.shape(microbatches)
        weights, margins = (
            np.where(ids < 0, 0, array[np.maximum(ids, 0)]).astype(np.float32)
            for array in (self.store.weights, self.store.margins)
        )
        num_answers = lengths.shape[1] - 1
        rows_per_shard = shape.rows // self.packer.multiple
        shards = range(self.packer.multiple) if self.local_row_shards is None else self.local_row_shards
        local_rows = [shard * rows_per_shard + row for shard in shards for row in range(rows_per_shard)]
        batches = []
        microbatch_arrays = (np.split(array, len(microbatches)) for array in (weights, margins))
        for index, (rows, weight, margin) in enumerate(zip(microbatches, *microbatch_arrays, strict=True)):
            local_pairs = {unit.pair for row in local_rows if row < len(rows) for unit in rows[row]}
            examples = {pair: example(index * len(weight) + pair) for pair in local_pairs}
            batches.append(pack_rows(rows, shape, examples, weight, num_answers, local_rows, margin))
        lengths = lengths[ids >= 0].astype(np.int64)
        return StepData(
            step=step,
            ids=ids,
            batch=batches[0] if len(batches) == 1 else jax.tree.map(lambda *arrays: np.stack(arrays), *batches),
            num_tokens=int(lengths[:, 1:].sum() + num_answers * lengths[:, 0].sum()),
            num_real_tokens=sum(unit.size for rows in microbatches for row in rows for unit in row),
            slots=len(microbatches) * shape.rows * shape.length,
        )

    def ahead(self, steps: Sequence[int]) -> Iterator[StepData]:
        """Yield the batches of ``steps`` in order, while a thread packs the next batches."""
        yield from map(prefetched(self, steps), steps)


def prefetched(batches: Batches, steps: Sequence[int]) -> Callable[[int], StepData]:
    """Return a function from step to batch; call it for ``steps`` in order, while a thread packs the next batches."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="pack")
    pending: dict[int, Future[StepData]] = {}

    def batch_of_step(step: int) -> StepData:
        index = steps.index(step)
        for upcoming_step in steps[index : index + NUM_PREFETCHED + 1]:
            if upcoming_step not in pending:
                pending[upcoming_step] = pool.submit(batches, upcoming_step)
        return pending.pop(step).result()

    return batch_of_step


def _sizes(store: Store, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of each pair's prompt and K answers [B, 1 + K], and target counts [B, K]; 0 for padding."""
    is_real = (ids >= 0)[:, None]
    clipped_ids = np.maximum(ids, 0)
    return np.where(is_real, store.lengths[clipped_ids], 0), np.where(is_real, store.num_targets[clipped_ids], 0)


def make_batches(
    store: Store, order: Order, packer: Packer, max_shapes: int, local_row_shards: Sequence[int] | None = None
) -> Batches:
    """Make batches whose row shapes suit the steps of ``order``; for ``local_row_shards`` see ``Batches``."""
    steps = range(0, order.num_steps, max(1, order.num_steps // SAMPLED_STEPS))
    step_shapes = [step_shape(packer.rows(*_sizes(store, order.step_ids(step))), packer.row_length) for step in steps]
    shape_limit = min(max_shapes, 1 + order.num_steps // STEPS_PER_SHAPE)
    return Batches(store, order, replace(packer, shapes=choose_shapes(step_shapes, shape_limit)), local_row_shards)


def train_batches(
    sets: DataSets, batch: AnyBatch, row_devices: int, row_shards: Sequence[int] | None = None
) -> Batches:
    """Make the training batches of a run, whose rows are sharded over ``row_devices`` devices.

    ``row_shards``: indices of the row shards, one per device, that belong to this process; None: all.
    """
    packer = _packer(batch, row_devices, batch.accumulation)
    return make_batches(sets.train, sets.order, packer, batch.max_shapes, row_shards)


def set_batches(
    store: Store,
    ids: np.ndarray,
    batch: AnyBatch,
    row_devices: int,
    row_shards: Sequence[int] | None = None,
) -> Batches:
    """Make batches of the examples ``ids``, in order and each once; the last batch may be padded.

    Arguments as in ``train_batches``.
    """
    order = make_order(groups=[ids], weights=None, seed=0, shuffle=False, batch=batch.size, steps=None, epochs=1)
    return make_batches(store, order, _packer(batch, row_devices, 1), batch.max_shapes, row_shards)


def _packer(batch: AnyBatch, row_devices: int, accumulation: int) -> Packer:
    row_length = None if batch.row_length == "auto" else batch.row_length
    return Packer(batch.layout, row_devices, row_length, accumulation)
