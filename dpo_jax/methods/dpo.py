"""Direct Preference Optimization: training on pairs of answers, relative to a reference model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import jax
import numpy as np

from dpo_jax.batch import Adapted, PairLogps, Params
from dpo_jax.batching.batches import Batches, set_batches
from dpo_jax.config import AnyConfig, DPOConfig, ModelConfig
from dpo_jax.config.generate import RewardModelConfig
from dpo_jax.errors import UserError, require
from dpo_jax.inference.reference import CachedReference, LiveReference, Reference, copy_weights
from dpo_jax.inference.reference_cache import cached_logps
from dpo_jax.inference.score import dataset_logps
from dpo_jax.logprobs import make_logps_fn
from dpo_jax.methods.offline import Offline, Start, make_offline
from dpo_jax.methods.rollouts import Judge
from dpo_jax.methods.samples import Samples, make_samples
from dpo_jax.methods.setup import Policy, Setup, follow_of, load_policy
from dpo_jax.models.decoder import Model, with_balance
from dpo_jax.models.families import refuse_positions
from dpo_jax.models.heads import make_scores_fn
from dpo_jax.parallel.sharding import local_row_shards, platform_of, replicated, row_devices
from dpo_jax.runs.checksums import weights_id
from dpo_jax.weights.open import ModelSource, build_model, find_model, load_weights
from dpo_jax.weights.reward_model import open_reward_model


def dpo(setup: Setup, flags: Mapping[str, str]) -> tuple[Offline, Start]:
    """Build the DPO method and the arrays it starts from; ``flags`` are compiler options of its step.

    The reference is always built from the weights that the config names, on resume too, never from a restored policy.
    """
    assert isinstance(setup.config, DPOConfig)
    scores, reward_ids = reward_model_scores(setup, setup.config.eval.reward)  # while no other weights are loaded
    policy = load_policy(setup)
    weights = reference_weights(setup, policy.weights)
    policy = policy._replace(ids=policy.ids | reward_ids | reference_ids(policy, weights))
    reference = make_reference(setup, weights, (setup.batches, *setup.evals.values()))
    method, start = make_offline(setup, policy, reference, flags, dpo_samples(setup, policy, reference, weights))
    return replace(method, scores=scores), start


def reward_model_scores(setup: Setup, options: RewardModelConfig) -> tuple[dict[str, PairLogps], dict[str, str]]:
    """Return a reward model's scores of each evaluation set's pairs, and its identity; empty if ``options`` has none.

    The pairs lie in the rows in which the policy is evaluated, and as a reward model was trained on them.

    Raises:
        UserError: it cannot be used, or has another tokenizer or chat template than the policy.
    """
    if options.path is None or not setup.evals:
        return {}, {}
    policy, date = setup.config.model, setup.config.data.template_date
    reward = open_reward_model(options, policy, platform_of(setup.mesh), setup.tokenizer, date)
    remedy = f"its tokenizer or chat template is not that of {policy.path}, with which the pairs are tokenized"
    require(reward.reads_tokens, f"{options.section}.path", options.path, f"{remedy}; use one of the same family")
    max_length = setup.config.data.max_length
    refuse_positions(reward.opened.model.config, max_length, f"{options.section}.path", options.path)
    weights = reward.opened.load(setup.mesh)
    step = jax.jit(make_scores_fn(reward.opened.model), out_shardings=replicated(setup.mesh))
    scores = {name: dataset_logps(step, weights, pairs, setup.to_devices)[1] for name, pairs in setup.evals.items()}
    return scores, {"eval_reward": weights_id(weights)}


def dpo_samples(
    setup: Setup, policy: Policy, reference: Reference | None, weights: Params, judge: Judge | None = None
) -> Samples | None:
    """Return a run's `Samples`: the policy's answers next to the reference's or, without one, the initial policy's."""
    if reference is None:
        return make_samples(setup, "start", policy.start, judge)
    if follow_of(setup.config) is not None:
        return make_samples(setup, "reference", None, judge)
    return make_samples(setup, "reference", sampling_weights(setup, reference, weights), judge)


def sampling_weights(setup: Setup, reference: Reference, weights: Params) -> Params:
    """Return the weights that sample the reference's answers: its own copy, in its dtype, or else ``weights``."""
    is_copy = isinstance(reference, LiveReference) and setup.model.lora is None
    return reference.weights if is_copy else weights


def reference_weights(setup: Setup, start: Params) -> Params:
    """Load the reference's weights from ``reference.path``, or return ``start``, the initial policy, without a copy.

    Raises:
        UserError: the model at ``reference.path`` differs in architecture or vocabulary.
    """
    config = setup.config
    path = config.reference.path
    if path is None:
        return start
    find = partial(find_model, revision=None, section="reference")
    source = find_reference(config, path, setup.model, platform_of(setup.mesh), find)
    options = ModelConfig(path=path, param_dtype=config.model.param_dtype)
    return load_weights(source, setup.model, options, setup.mesh)


def reference_ids(policy: Policy, weights: Params) -> dict[str, str]:
    """Return the identity of the reference's weights, which are hashed only if they are not the initial policy's."""
    return {"reference": policy.ids["weights"] if weights is policy.weights else weights_id(weights)}


def find_reference(
    config: AnyConfig, path: str, model: Model, platform: str, find: Callable[[str], ModelSource]
) -> ModelSource:
    """Open the model of ``reference.path`` with ``find``; its architecture must be that of the policy, ``model``.

    Raises:
        UserError: the model does not exist, or differs in architecture or vocabulary.
    """
    source = find(path)
    try:
        reference_model = build_model(source, config.model, platform)
    except UserError as error:
        raise UserError(f"reference.path: {error}") from error
    without_balance = lambda m: replace(m, config=with_balance(m.config, 0.0))  # matters in training only  # noqa: E731
    if without_balance(reference_model) != without_balance(model):
        difference = f"differs from model.path {config.model.path} in architecture or vocabulary"
        raise UserError(f"reference.path: {path} {difference}; choose a matching model")
    return source


def make_reference(setup: Setup, weights: Params, sets: Iterable[Batches]) -> Reference | None:
    """Return the reference, which shares no trained arrays with ``weights``, or None if the config uses none.

    ``sets``: what it is used for; a cached one has the log-probs of no other examples.
    """
    config = setup.config
    match config.reference_mode:
        case "none":
            return None
        case "live" if setup.model.lora is not None:
            return LiveReference(Adapted(None, weights))  # frozen base weights need no copy
        case "live":
            dtype = None if config.reference.dtype == "auto" else config.reference.dtype
            return LiveReference(copy_weights(weights, dtype))
    return _cached_reference(setup, weights, sets)


def _cached_reference(setup: Setup, weights: Params, sets: Iterable[Batches]) -> CachedReference:
    config, model, mesh = setup.config, setup.model, setup.mesh
    tail = setup.config.objective.ld_alpha is not None
    cache_inputs = {
        "format": 3,
        "batch_size": config.batch.size,  # the last bits of a row depend on the batch in which it is computed
        "tail": tail,
        "weights": weights_id(weights),
        "decoder": asdict(with_balance(model.config, 0.0)),
        "dtype": model.dtype,
        "matmul_precision": model.matmul_precision,
        "platform": jax.default_backend(),
    }
    chunk = config.batch.target_chunk
    logps_fn = make_logps_fn(model.hidden, model.unembedding, chunk=chunk, tail=tail, **model.logit_options)
    logps_step = jax.jit(logps_fn, out_shardings=replicated(mesh))  # without token statistics, which only metrics need

    def compute(batches: Batches, steps: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        ids, logps = dataset_logps(logps_step, weights, batches, setup.to_devices, steps)
        return ids, {name: getattr(logps, name) for name in ("sum", "tail_sum") if getattr(logps, name) is not None}

    row_split = row_devices(mesh), local_row_shards(mesh)
    by_store: dict[str, list[Batches]] = {}
    for batches in sets:
        by_store.setdefault(batches.store.key, []).append(batches)

    def logps_of(sets: Sequence[Batches]) -> dict[str, np.ndarray]:
        """Return the log-probs of a store for the sets that are drawn from it."""
        store, needed_ids = sets[0].store, np.unique(np.concatenate([batches.order.drawn_ids() for batches in sets]))
        all_batches = set_batches(store, np.arange(len(store)), config.batch, *row_split)
        return cached_logps(all_batches, needed_ids, cache_inputs, compute)

    return CachedReference({key: logps_of(sets) for key, sets in by_store.items()})
