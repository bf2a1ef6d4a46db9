"""The sets of a run: the training store with its order, and the evaluation sets by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.batching.order import Order, make_order
from dpo_jax.config import DataConfig, Stage
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


def store_folder(store: str | None, run_dir: str) -> Path:
    """Where a run keeps tokenised data and cached log-probs: a local folder, given or next to the run.

    Raises:
        UserError: it is in a bucket.
    """
    given = store or run_dir
    if "://" in given:
        field = "data.store" if store else "run.dir"
        raise UserError(f"{field}: {given} is no local folder, which tokenised data needs; set data.store to one")
    return Path(store) if store else Path(run_dir).absolute().parent / "store"


def open_sets(
    data: DataConfig,
    folder: Path,
    tokenizer: Any,
    stage: Stage,
    *,
    size: int,
    seed: int,
    steps: int | None,
    epochs: float | None,
    train: "Dataset | None" = None,
    evals: "Mapping[str, Dataset] | None" = None,
) -> DataSets:
    """The stores of a run, opened or built in ``folder``, and the order of its steps.

    Args:
        data: the sets, and how they become tokens.
        folder: of `store_folder`.
        tokenizer: of the model.
        stage: what the rows are for.
        size: examples in a step.
        seed: of the order.
        steps: of the run; None: as many as ``epochs`` ask for.
        epochs: of the run.
        train: in place of the set to train on that ``data`` names.
        evals: in place of its evaluation sets.

    Raises:
        UserError: whatever is wrong with a source, see ``build_or_open_store`` and ``split_held_out``.
    """
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
        seed=seed,
        shuffle=data.shuffle,
        batch=size,
        steps=steps,
        epochs=epochs,
    )
    return DataSets(stage=stage, train=store, train_ids=train_ids, order=order, evals=sets)
