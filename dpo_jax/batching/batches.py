"""Step number -> packed batch: a pure function of (data, seed, step), computed a few steps ahead in a thread."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np

from dpo_jax.batch import PreferenceBatch
from dpo_jax.batching.order import Order, make_order
from dpo_jax.batching.packing import Packer, choose_shapes, pack_rows, step_shape
from dpo_jax.batching.sets import DataSets
from dpo_jax.config import BatchConfig, SFTBatchConfig
from dpo_jax.data.store import Store

SAMPLED_STEPS = 2048  # steps whose sizes decide the row shapes
AHEAD = 2  # batches made before they are asked for
STEPS_A_SHAPE = 24  # a run of fewer steps does not win back the compilation of another shape


@dataclass(frozen=True)
class StepData:
    """One step's pairs, packed; arrays are numpy's."""

    step: int
    ids: np.ndarray  # [B] example ids, -1 in empty slots
    batch: PreferenceBatch  # of its rows, this process' own; leading dim: parts of the step, when it is accumulated
    num_tokens: int  # tokens of each prompt with each of its answers, as TRL counts them
    used: int  # real tokens in the rows of all processes
    slots: int  # token slots of these rows

    @property
    def fill(self) -> float:
        """Real tokens / token slots."""
        return self.used / self.slots


@dataclass(frozen=True)
class Batches:
    """The batches of a run: ``batches(step)``, steps counted from 0.

    Which pair lies in which row follows from lengths, and is the same in every process; each lays its own rows alone.
    """

    store: Store
    order: Order
    packer: Packer
    own: Sequence[int] | None = None  # of the packer.multiple equal shares of the rows, this process'; None: all

    def __call__(self, step: int) -> StepData:
        """Pack step ``step``."""
        ids = self.order.step_ids(step)
        microbatches = self.packer.rows(*_sizes(self.store, ids))
        shape = self.packer.shape(microbatches)
        weights = np.where(ids < 0, 0, self.store.weights[np.maximum(ids, 0)]).astype(np.float32)
        num_answers = self.store.lengths.shape[1] - 1
        own_rows = self._own_rows(shape.rows)
        packed = []
        for rows, part_ids, weight in zip(
            microbatches, *(np.split(x, len(microbatches)) for x in (ids, weights)), strict=True
        ):
            pairs = {unit.pair for row in own_rows if row < len(rows) for unit in rows[row]}
            examples = {pair: self.store.example(part_ids[pair]) for pair in pairs}
            packed.append(pack_rows(rows, shape, examples, weight, num_answers, own_rows))
        lengths = self.store.lengths[ids[ids >= 0]].astype(np.int64)
        return StepData(
            step=step,
            ids=ids,
            batch=packed[0] if len(packed) == 1 else jax.tree.map(lambda *arrays: np.stack(arrays), *packed),
            num_tokens=int(lengths[:, 1:].sum() + num_answers * lengths[:, 0].sum()),
            used=sum(unit.size for rows in microbatches for row in rows for unit in row),
            slots=len(microbatches) * shape.rows * shape.length,
        )

    def _own_rows(self, num_rows: int) -> list[int]:
        size = num_rows // self.packer.multiple
        shares = range(self.packer.multiple) if self.own is None else self.own
        return [row for share in shares for row in range(share * size, (share + 1) * size)]

    def ahead(self, steps: Sequence[int]) -> Iterator[StepData]:
        """These steps in order, the next ones packed in a thread meanwhile."""
        yield from map(Prefetched(self, steps), steps)


class Prefetched:
    """Gives these steps of the batches, asked for in order; the next ones are packed in a thread meanwhile."""

    def __init__(self, batches: Batches, steps: Sequence[int]):
        self._batches, self._steps = batches, steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._coming: dict[int, Future[StepData]] = {}

    def __call__(self, step: int) -> StepData:
        """Step ``step``."""
        index = self._steps.index(step)
        for coming in self._steps[index : index + AHEAD + 1]:
            if coming not in self._coming:
                self._coming[coming] = self._pool.submit(self._batches, coming)
        return self._coming.pop(step).result()


def _sizes(store: Store, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [B, 1 + K] and learned answer tokens [B, K] of a step; 0 in empty slots."""
    real = (ids >= 0)[:, None]
    clipped_ids = np.maximum(ids, 0)
    return np.where(real, store.lengths[clipped_ids], 0), np.where(real, store.num_targets[clipped_ids], 0)


def make_batches(
    store: Store, order: Order, packer: Packer, max_shapes: int, own_shares: Sequence[int] | None = None
) -> Batches:
    """Batches with row shapes chosen from the sizes of the run's own steps; ``own_shares`` as in ``Batches``."""
    stride = max(1, order.num_steps // SAMPLED_STEPS)
    steps = range(0, order.num_steps, stride)
    needed = [step_shape(packer.rows(*_sizes(store, order.step_ids(step))), packer.row_length) for step in steps]
    most = min(max_shapes, 1 + order.num_steps // STEPS_A_SHAPE)
    return Batches(store, order, replace(packer, shapes=choose_shapes(needed, most)), own_shares)


def train_batches(
    sets: DataSets, batch: BatchConfig | SFTBatchConfig, row_devices: int, shares: Sequence[int] | None = None
) -> Batches:
    """The batches of the run's steps.

    Args:
        sets: of the run.
        batch: how their examples are laid in rows.
        row_devices: devices over which rows are spread.
        shares: which of the equal shares of the rows, one a device, are this process's; None: all.
    """
    packer = _packer(batch, row_devices, batch.accumulation)
    return make_batches(sets.train, sets.order, packer, batch.max_shapes, shares)


def set_batches(
    store: Store,
    ids: np.ndarray,
    batch: BatchConfig | SFTBatchConfig,
    row_devices: int,
    shares: Sequence[int] | None = None,
) -> Batches:
    """Batches that hold each of ``ids`` once, in order; the last one is ragged. The rest as in ``train_batches``."""
    order = make_order(groups=[ids], weights=None, seed=0, shuffle=False, batch=batch.size, steps=None, epochs=1)
    return make_batches(store, order, _packer(batch, row_devices, 1), batch.max_shapes, shares)


def _packer(batch: BatchConfig | SFTBatchConfig, row_devices: int, accumulation: int) -> Packer:
    row_length = None if batch.row_length == "auto" else batch.row_length
    return Packer(batch.layout, row_devices, row_length, accumulation)
