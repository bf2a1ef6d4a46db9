"""The parts of a run, made from its config: what training and evaluation both stand on."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.config import DPOConfig, LossConfig, ModelConfig, SFTConfig
from dpo_jax.data.batches import Batches, set_batches, train_batches
from dpo_jax.data.sets import DataSets, open_sets
from dpo_jax.data.tokenize import tokenizer_hash
from dpo_jax.errors import UserError
from dpo_jax.logprobs import LogpsFn, Params, make_logps_fn
from dpo_jax.losses import preference_metrics
from dpo_jax.manifest import make_manifest
from dpo_jax.models.decoder import Model
from dpo_jax.policy import ModelSource, build_model, find_model, find_tokenizer, load_weights
from dpo_jax.reference import CachedReference, LiveReference, Reference, cached_sums, copy_weights, weights_id
from dpo_jax.scoring import LogpsStep, Place, dataset_logps, make_logps_step, make_place
from dpo_jax.sharding import replicated, row_devices, row_sharding

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Parts:
    """What a run is made of, weights and checkpoints apart."""

    config: DPOConfig | SFTConfig
    mesh: Mesh
    source: ModelSource
    model: Model
    tokenizer: Any
    sets: DataSets
    batches: Batches  # of the run's steps
    evals: dict[str, Batches]
    logps_fn: LogpsFn
    logps_step: LogpsStep  # compiled, without gradient
    place: Place  # host batch -> devices

    @property
    def loss(self) -> LossConfig:
        """The objective; fine-tuning's is the token mean over the answer."""
        return self.config.loss if isinstance(self.config, DPOConfig) else LossConfig(type="sft")

    @property
    def place_parts(self) -> Place:
        """As ``place``, for the train step: an accumulated batch has its parts before the rows."""
        leading = 0 if self.config.batch.accumulation == 1 else 1
        return make_place(row_sharding(self.mesh, leading), replicated(self.mesh))


def assemble(
    config: DPOConfig | SFTConfig,
    mesh: Mesh,
    train_set: "Dataset | None" = None,
    eval_sets: "Mapping[str, Dataset] | None" = None,
) -> Parts:
    """Find the model, tokenise the data, lay out every step; nothing is compiled and no weight is loaded yet."""
    source = find_model(config.model.path, config.model.revision)
    model = build_model(source, config.model)
    tokenizer = find_tokenizer(source, model, config.model, config.data.chat_template)
    sets = open_sets(config, tokenizer, train_set, eval_sets)
    devices = row_devices(mesh)
    logps_fn = make_logps_fn(
        model.hidden, model.unembedding, chunk=config.batch.target_chunk, stats=config.run.token_stats
    )
    return Parts(
        config=config,
        mesh=mesh,
        source=source,
        model=model,
        tokenizer=tokenizer,
        sets=sets,
        batches=train_batches(config, sets, devices),
        evals={name: set_batches(config, own.store, own.ids, devices) for name, own in sets.evals.items()},
        logps_fn=logps_fn,
        logps_step=make_logps_step(logps_fn, replicated(mesh)),
        place=make_place(row_sharding(mesh), replicated(mesh)),
    )


def describe(parts: Parts, ids: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a run of these parts; ``ids`` are those of its weights and of its reference."""
    template = getattr(parts.tokenizer, "chat_template", None)
    identity = {
        **ids,
        "decoder": asdict(parts.model.config),
        "tokenizer": tokenizer_hash(parts.tokenizer),
        "template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
        "store": parts.batches.store.key,
        "dtype": parts.model.dtype,
    }
    place = {
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
    }
    return make_manifest(asdict(parts.config), identity, place)


def reference_weights(parts: Parts, start: Params) -> Params:
    """Weights of the reference: the policy's start itself, or those of ``reference.path``; to be copied, not kept.

    Raises:
        UserError: the other model has another architecture or vocabulary.
    """
    assert isinstance(parts.config, DPOConfig)
    path = parts.config.reference.path
    if path is None:
        return start
    try:
        source = find_model(path, None)
        model = build_model(source, parts.config.model)
    except UserError as error:
        raise UserError(f"reference.path: {str(error).removeprefix('model.path: ')}") from error
    if model != parts.model:
        raise UserError(f"reference.path: {path} has another architecture or vocabulary than model.path "
                        f"{parts.config.model.path}; choose a model of the same kind")  # fmt: skip
    return load_weights(source, model, ModelConfig(path=path, param_dtype=parts.config.model.param_dtype), parts.mesh)


def make_reference(parts: Parts, weights: Params) -> Reference:
    """The reference, of ``weights`` that stay the caller's."""
    config = parts.config
    assert isinstance(config, DPOConfig)
    if config.reference.mode == "live":
        dtype = None if config.reference.dtype == "auto" else config.reference.dtype
        return LiveReference(copy_weights(weights, dtype))
    made_by = {
        "format": 1,
        "weights": weights_id(weights),
        "decoder": asdict(parts.model.config),
        "dtype": parts.model.dtype,
        "matmul_precision": parts.model.matmul_precision,
        "platform": jax.default_backend(),
    }
    logps_fn = make_logps_fn(parts.model.hidden, parts.model.unembedding, chunk=config.batch.target_chunk)
    logps_step = make_logps_step(logps_fn, replicated(parts.mesh))  # without the statistics that metrics want
    sums = {}
    for store in {batches.store.key: batches.store for batches in (parts.batches, *parts.evals.values())}.values():
        every = set_batches(config, store, np.arange(len(store)), row_devices(parts.mesh))
        sums[store.key] = cached_sums(
            every, made_by, lambda every: dataset_logps(logps_step, weights, every, parts.place)[1]
        )
    return CachedReference(sums)


def evaluate_sets(parts: Parts, params: Params, reference: Reference | None) -> dict[str, float]:
    """Metrics of every evaluation set, as ``eval_NAME_METRIC``: means over all its pairs, exact for any batch size."""
    metrics = {}
    for name, batches in parts.evals.items():
        policy = dataset_logps(parts.logps_step, params, batches, parts.place)[1]
        fixed = None if reference is None else reference.dataset(parts.logps_step, batches, parts.place)
        for key, value in jax.device_get(preference_metrics(policy, fixed, parts.loss)).items():
            metrics[f"eval_{name}_{key}"] = float(value)
    return metrics
