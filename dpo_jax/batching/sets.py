"""Open the data sets of a run: the training store with its order, and the evaluation sets by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.batching.order import Order, make_order
from dpo_jax.bucket import is_remote
from dpo_jax.config import DataConfig, PlannedAnswers, RunConfig, Stage
from dpo_jax.data.store import AnySource, Store, build_or_open_store, ids_by_source, split_held_out
from dpo_jax.errors import UserError
from dpo_jax.storage import local_copy

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = "held_out"


def with_answers(store: Store, planned: PlannedAnswers) -> Store:
    """Return a copy of a store of prompts with the lengths, but not the tokens, of ``planned`` answers added."""
    answer_lengths = np.full((len(store), planned.per_prompt), planned.num_tokens, np.int32)
    lengths = np.concatenate([store.lengths[:, :1], answer_lengths], axis=1)
    return replace(store, lengths=lengths, num_targets=answer_lengths)


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
    sources: dict[str, Sequence[AnySource]]  # of each store, by its key

    def with_answers(self, planned: PlannedAnswers) -> "DataSets":
        """Return the sets with the lengths of ``planned`` answers added to every prompt, for choosing row shapes.

        Evaluation samples one answer to each prompt.
        """
        if not planned.per_prompt:
            return self
        eval_sets = {
            name: replace(eval_set, store=with_answers(eval_set.store, planned._replace(per_prompt=1)))
            for name, eval_set in self.evals.items()
        }
        return replace(self, train=with_answers(self.train, planned), evals=eval_sets)


def store_folder(store: str | None, run_dir: str) -> Path:
    """Return the local folder for tokenized data and cached log-probs: ``store``, else a folder next to ``run_dir``.

    For a run in a bucket, that is a folder of this machine's cache, which other runs of the same folder share.

    Raises:
        UserError: ``store`` is in a bucket.
    """
    if store is not None and is_remote(store):
        raise UserError(f"data.store: {store} is not a local folder, which memory maps need; set it to one")
    if store is None and is_remote(run_dir):
        return local_copy("store", run_dir.rstrip("/").rpartition("/")[0])
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
    """Open or build a run's token stores, and set the order in which its training examples are read, ``size`` per step.

    ``train`` and ``evals`` replace the sets of ``data``.

    Raises:
        UserError: a source is invalid, see ``build_or_open_store`` and ``split_held_out``.
    """
    folder = store_folder(data.store, run.dir)
    sources = data.train if train is None else (train,)
    store = build_or_open_store(folder, sources, data, tokenizer, stage, data.workers)
    train_ids, held_out_ids = split_held_out(store, data.eval_fraction)
    eval_sets, sources_of = {}, dict[str, Sequence[AnySource]]({store.key: sources})
    for name, source in (data.eval if evals is None else evals).items():
        eval_store = build_or_open_store(folder, (source,), data, tokenizer, stage, data.workers)
        sources_of[eval_store.key] = (source,)
        eval_sets[name] = EvalSet(store=eval_store, ids=np.arange(len(eval_store)))
    if data.eval_fraction:
        eval_sets[HELD_OUT] = EvalSet(store=store, ids=held_out_ids)
    weights = [source.weight for source in data.train if source.weight is not None] if train is None else []
    groups = ids_by_source(store, train_ids)
    run_length = {"batch": size, "steps": run.steps, "epochs": run.epochs}
    order = make_order(groups=groups, weights=weights or None, seed=run.seed, shuffle=data.shuffle, **run_length)
    return DataSets(stage=stage, train=store, train_ids=train_ids, order=order, evals=eval_sets, sources=sources_of)
