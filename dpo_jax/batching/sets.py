"""The sets of a run, from its config: the training store with its order, and the evaluation sets by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.batching.order import Order, make_order
from dpo_jax.config import DPOConfig, SFTConfig, TrainConfig
from dpo_jax.data.schemas import Stage
from dpo_jax.data.store import Store, build_or_open_store, ids_by_source, split_held_out
from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Examples to evaluate on, in the order of the ids."""

    store: Store
    ids: np.ndarray  # int64


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """All that a run learns from and is judged by."""

    stage: Stage
    train: Store
    train_ids: np.ndarray  # int64: without those held out
    order: Order  # of the training examples
    evals: dict[str, EvalSet]


def store_folder(config: TrainConfig) -> Path:
    """Where the run keeps tokenised data and cached log-probs: a local folder.

    Raises:
        UserError: the run directory is in a bucket and data.store is not set.
    """
    given = config.data.store or config.run.dir
    if "://" in given:
        field = "data.store" if config.data.store else "run.dir"
        raise UserError(f"{field}: {given} is no local folder, which tokenised data needs; set data.store to one")
    return Path(config.data.store) if config.data.store else Path(config.run.dir).absolute().parent / "store"


def open_sets(
    config: TrainConfig,
    tokenizer: Any,
    train: "Dataset | None" = None,
    evals: "Mapping[str, Dataset] | None" = None,
) -> DataSets:
    """The stores of a run, opened or built, and the order of its steps; ``train`` and ``evals`` replace the config's.

    Raises:
        UserError: whatever is wrong with a source, see ``build_or_open_store`` and ``split_held_out``.
    """
    assert isinstance(config, DPOConfig | SFTConfig)
    data, folder = config.data, store_folder(config)
    stage: Stage = "dpo" if isinstance(config, DPOConfig) else "sft"
    sources = data.train if train is None else (train,)
    store = build_or_open_store(folder, sources, data, tokenizer, stage, data.workers)
    train_ids, held_out = split_held_out(store, data.eval_fraction)
    sets = {}
    for name, source in (data.eval if evals is None else evals).items():
        opened = build_or_open_store(folder, (source,), data, tokenizer, stage, data.workers)
        sets[name] = EvalSet(store=opened, ids=np.arange(len(opened)))
    if data.eval_fraction:
        sets[HELD_OUT] = EvalSet(store=store, ids=held_out)
    weights = [source.weight for source in data.train if source.weight is not None] if train is None else []
    order = make_order(
        groups=ids_by_source(store, train_ids),
        weights=weights or None,
        seed=config.run.seed,
        shuffle=data.shuffle,
        batch=config.batch.pairs if isinstance(config, DPOConfig) else config.batch.examples,
        steps=config.run.steps,
        epochs=config.run.epochs,
    )
    return DataSets(stage=stage, train=store, train_ids=train_ids, order=order, evals=sets)
