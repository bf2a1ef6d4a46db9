"""Open the data sets of a run: the training store with its order, and the evaluation sets by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.batching.order import Order, make_order
from dpo_jax.config import DataConfig, RunConfig, Stage
from dpo_jax.data.store import Store, build_or_open_store, ids_by_source, split_held_out
from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Evaluation examples of a store, in the order of ``ids``."""

    store: Store
    ids: np.ndarray  # int64


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """The training set and the evaluation sets of a run."""

    stage: Stage
    train: Store
    train_ids: np.ndarray  # int64, without held-out examples
    order: Order  # order of the training examples
    evals: dict[str, EvalSet]


def store_folder(store: str | None, run_dir: str) -> Path:
    """Return the local folder for tokenized data and cached log-probs: ``store``, else a folder next to ``run_dir``.

    Raises:
        UserError: the folder is in a bucket.
    """
    location = store or run_dir
    if "://" in location:
        field = "data.store" if store else "run.dir"
        raise UserError(f"{field}: {location} is not a local folder; set data.store to one for tokenized data")
    return Path(store) if store else Path(run_dir).absolute().parent / "store"


def open_sets(
    data: DataConfig,
    run: RunConfig,
    tokenizer: Any,
    stage: Stage,
    size: int,
    train: "Dataset | None" = None,
    evals: "Mapping[str, Dataset] | None" = None,
) -> DataSets:
    """Open or build the stores of a run, and make the order of its examples in steps of ``size``.

    ``train`` and ``evals`` replace the sets of ``data``.

    Raises:
        UserError: a source is invalid, see ``build_or_open_store`` and ``split_held_out``.
    """
    folder = store_folder(data.store, run.dir)
    sources = data.train if train is None else (train,)
    store = build_or_open_store(folder, sources, data, tokenizer, stage, data.workers)
    train_ids, held_out_ids = split_held_out(store, data.eval_fraction)
    sets = {}
    for name, source in (data.eval if evals is None else evals).items():
        eval_store = build_or_open_store(folder, (source,), data, tokenizer, stage, data.workers)
        sets[name] = EvalSet(store=eval_store, ids=np.arange(len(eval_store)))
    if data.eval_fraction:
        sets[HELD_OUT] = EvalSet(store=store, ids=held_out_ids)
    weights = [source.weight for source in data.train if source.weight is not None] if train is None else []
    groups, sizes = ids_by_source(store, train_ids), {"batch": size, "steps": run.steps, "epochs": run.epochs}
    order = make_order(groups=groups, weights=weights or None, seed=run.seed, shuffle=data.shuffle, **sizes)
    return DataSets(stage=stage, train=store, train_ids=train_ids, order=order, evals=sets)
