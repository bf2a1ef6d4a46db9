"""A small cache of a reference's log-probs, computed by hand."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from small_tokenizer import make_tokenizer

from dpo_jax.batching.batches import Batches
from dpo_jax.batching.order import make_order
from dpo_jax.batching.packing import Packer
from dpo_jax.config import DataConfig, SourceConfig
from dpo_jax.data.store import build_or_open_store
from dpo_jax.inference.reference_cache import cached_logps

NUM_ROWS = 23
MADE_BY = {"format": 2, "weights": "a", "dtype": "float32", "tail": True}
LOGPS = np.random.Generator(np.random.Philox(0)).normal(-50, 9, (NUM_ROWS, 2)).astype(np.float32)

ALL = np.arange(NUM_ROWS)


def small_store(folder: Path):
    """A store of as many pairs."""
    rows = [{"prompt": f"Q{i}", "chosen": "yes", "rejected": "no"} for i in range(NUM_ROWS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(folder / "pairs.jsonl"))
    data = DataConfig(train=(source,), max_length=64)
    return build_or_open_store(folder / "store", (source,), data, make_tokenizer(), "dpo", 1)


def in_steps(store, batch: int) -> Batches:
    """Every row once, in file order."""
    order = make_order(
        groups=[np.arange(NUM_ROWS)], weights=None, seed=0, shuffle=False, batch=batch, steps=None, epochs=1
    )
    return Batches(store, order, Packer("shared", 1, None, 1))


@dataclass
class Computer:
    """Gives the rows of the steps it is asked for, and remembers them; may be cut off after some calls."""

    calls: list = field(default_factory=list)
    cut_off_after: int = 10**9
    logps: np.ndarray = field(default_factory=LOGPS.copy)

    def __call__(self, batches, steps):
        if len(self.calls) == self.cut_off_after:
            raise KeyboardInterrupt
        self.calls.append(list(steps))
        ids = np.concatenate([batches.order.step_ids(step) for step in steps])
        ids = ids[ids >= 0]
        return ids, {"sum": self.logps[ids], "tail_sum": self.logps[ids] / 4}


def run(batches, compute, made_by=MADE_BY):
    said = []
    found = cached_logps(batches, ALL, made_by, compute, said.append)
    np.testing.assert_array_equal(found["sum"], compute.logps)
    np.testing.assert_array_equal(found["tail_sum"], compute.logps / 4)
    return said


def files(batches, pattern="reference-*"):
    return sorted(batches.store.path.glob(pattern))
