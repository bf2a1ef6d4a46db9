"""The parts of a run, made from its config: what training and evaluation both stand on."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.batch import PairLogps, PreferenceBatch
from dpo_jax.batching.batches import Batches, StepData, set_batches, train_batches
from dpo_jax.batching.sets import DataSets, open_sets
from dpo_jax.batching.to_devices import Place, make_place
from dpo_jax.config import LOSS_TRAITS, DPOConfig, LossConfig, ModelConfig, SFTConfig
from dpo_jax.config.idle import Facts, idle_options
from dpo_jax.data.store import Store
from dpo_jax.data.template import reads_clock
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.errors import UserError
from dpo_jax.inference.distributions import reward_distributions
from dpo_jax.inference.reference import CachedReference, LiveReference, Reference, copy_weights
from dpo_jax.inference.reference_cache import cached_logps
from dpo_jax.inference.score import LogpsStep, dataset_logps, make_logps_step
from dpo_jax.logprobs import LogpsFn, Params, make_logps_fn
from dpo_jax.losses import preference_metrics
from dpo_jax.models.adapters import Adapted
from dpo_jax.models.decoder import Model
from dpo_jax.parallel import hosts
from dpo_jax.parallel.compiler import platform_flags
from dpo_jax.parallel.sharding import own_shares, placed, platform_of, replicated, row_devices
from dpo_jax.runs.checksums import weights_id
from dpo_jax.runs.manifest import make_manifest
from dpo_jax.step import Base, TrainState, TrainStep, init_state, make_train_step, state_shardings
from dpo_jax.weights.open import (
    ModelSource,
    build_model,
    find_model,
    find_tokenizer,
    load_start,
    load_weights,
    trained_shapes,
    trained_shardings,
)

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
    logps_step: LogpsStep  # compiled, without gradient; of a run of adapters, its weights are `Adapted`
    place: Place  # host batch -> devices

    @property
    def loss(self) -> LossConfig:
        """The objective."""
        return loss_of(self.config)

    @property
    def place_parts(self) -> Place:
        """As ``place``, for the train step: an accumulated batch has its parts before the rows."""
        return make_place(self.mesh, leading=0 if self.config.batch.accumulation == 1 else 1)


def loss_of(config: DPOConfig | SFTConfig) -> LossConfig:
    """The objective; fine-tuning's is the token mean over the answer."""
    return config.loss if isinstance(config, DPOConfig) else LossConfig(type="sft")


def refuse_weights(loss: LossConfig, store: Store) -> None:
    """A loss that sorts the pairs of a step has no loss of a pair that could be weighed."""
    sorts = [name for name, _ in loss.terms if LOSS_TRAITS[name].sorts]
    weighed = np.flatnonzero(store.weights != 1)
    if sorts and len(weighed):
        row, weight = store.rows[weighed[0]], store.weights[weighed[0]]
        raise UserError(f"loss.type: {sorts[0]} sorts the pairs of a step, but row {row} of the data has weight "
                        f"{weight:g}: remove the column weight, or choose another loss")  # fmt: skip


def assemble(
    config: DPOConfig | SFTConfig,
    mesh: Mesh,
    train_set: "Dataset | None" = None,
    eval_sets: "Mapping[str, Dataset] | None" = None,
) -> Parts:
    """Find the model, tokenise the data, lay out every step; nothing is compiled and no weight is loaded yet."""
    source = find_model(config.model.path, config.model.revision, config.model.checkpoint)
    model = build_model(source, config.model, platform_of(mesh), config.lora)
    tokenizer = find_tokenizer(source, config.model, config.data.chat_template)
    sets = hosts.writer_first(partial(open_sets, config, tokenizer, train_set, eval_sets), "tokenised data")
    for store in (sets.train, *(eval_set.store for eval_set in sets.evals.values())):
        refuse_weights(loss_of(config), store)
    spread = row_devices(mesh), own_shares(mesh)
    logps_fn = train_logps_fn(config, model)
    return Parts(
        config=config,
        mesh=mesh,
        source=source,
        model=model,
        tokenizer=tokenizer,
        sets=sets,
        batches=train_batches(config, sets, *spread),
        evals={
            name: set_batches(config, eval_set.store, eval_set.ids, *spread) for name, eval_set in sets.evals.items()
        },
        logps_fn=logps_fn,
        logps_step=make_logps_step(logps_fn if model.lora is None else of_adapted(logps_fn), replicated(mesh)),
        place=make_place(mesh),
    )


def notes_of(parts: Parts) -> list[str]:
    """Options that have no effect in this run, and lengths that the model was not made for; a line each."""
    stores = [batches.store for batches in (parts.batches, *parts.evals.values())]
    reports = [source for store in stores for source in store.report]
    device = parts.mesh.devices.flat[0]
    messages = sum(source["rendered"] for source in reports)
    facts = Facts(
        steps=parts.batches.order.num_steps,
        eval_sets=len(parts.evals),
        examples=sum(source["kept"] for source in reports),
        messages=messages,
        dated=messages > 0 and reads_clock(parts.tokenizer.chat_template),
        platform=device.platform,
        flags=frozenset(platform_flags(device.platform, device.device_kind, {})),
    )
    notes, order, lengths = idle_options(parts.config, facts), parts.batches.order, parts.batches.store.lengths
    longest = int((lengths[:, 0] + lengths[:, 1:].max(1)).max())
    made_for = parts.source.hf_config.get("max_position_embeddings", longest)
    if longest > made_for:
        notes.append(f"a prompt and answer have up to {longest} tokens, the model was made for {made_for} "
                     "(max_position_embeddings): lower data.max_length")  # fmt: skip
    if order.batch > order.epoch_draws:
        notes.append(f"a step holds {order.batch}, more than the {order.epoch_draws} there are to train on, so that "
                     "some come twice in it: use a smaller batch")  # fmt: skip
    return notes


def train_logps_fn(config: DPOConfig | SFTConfig, model: Model) -> LogpsFn:
    """What the train step computes log-probs with."""
    return make_logps_fn(
        *scoring_functions(model),
        chunk=config.batch.target_chunk,
        stats=config.run.token_stats,
        tail=loss_of(config).ld_alpha is not None,
        squares=loss_of(config).weighting == "wpo",
        precision=model.precision,
    )


def scoring_functions(model: Model) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Hidden states and unembedding as `make_logps_fn` takes them; of adapters, the weights are the last argument."""
    if model.lora is None:
        return model.hidden, model.unembedding
    return lambda adapters, batch, base: model.hidden(base, batch, adapters), lambda _, base: model.unembedding(base)


def of_adapted(fn: Callable[..., Any]) -> Callable[[Adapted, PreferenceBatch], Any]:
    """``fn(adapters, batch, base)`` as a function of both at once."""
    return lambda weights, batch: fn(weights.adapters, batch, weights.base)


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
    environment = {
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
    }
    return make_manifest(asdict(parts.config), identity, environment)


def reference_weights(parts: Parts, start: Params) -> Params:
    """Weights of the reference: the policy's start itself, or those of ``reference.path``; to be copied, not kept.

    Raises:
        UserError: the other model has another architecture or vocabulary.
    """
    assert isinstance(parts.config, DPOConfig)
    path = parts.config.reference.path
    if path is None:
        return start
    find = partial(find_model, revision=None)
    source = find_reference(parts.config, path, parts.model, platform_of(parts.mesh), find)
    options = ModelConfig(path=path, param_dtype=parts.config.model.param_dtype)
    return load_weights(source, parts.model, options, parts.mesh)


def find_reference(
    config: DPOConfig, path: str, model: Model, platform: str, find: Callable[[str], ModelSource]
) -> ModelSource:
    """The model that ``reference.path`` names, by ``find``; it must have the architecture of ``model``, the policy.

    Raises:
        UserError: there is no such model, or it has another architecture or vocabulary.
    """
    try:
        source = find(path)
        reference_model = build_model(source, config.model, platform)
    except UserError as error:
        raise UserError(f"reference.path: {str(error).removeprefix('model.path: ')}") from error
    if reference_model != model:
        raise UserError(f"reference.path: {path} has another architecture or vocabulary than model.path "
                        f"{config.model.path}; choose a model of the same kind")  # fmt: skip
    return source


def make_reference(parts: Parts, weights: Params) -> Reference | None:
    """The reference, of ``weights`` that stay the caller's; None where the config wants none."""
    config = parts.config
    assert isinstance(config, DPOConfig)
    if config.reference_mode == "none":
        return None
    if config.reference_mode == "live" and parts.model.lora is not None:
        return LiveReference(Adapted(None, weights))  # nothing changes them, so they need no copy
    if config.reference_mode == "live":
        dtype = None if config.reference.dtype == "auto" else config.reference.dtype
        return LiveReference(copy_weights(weights, dtype))
    tail = config.loss.ld_alpha is not None
    made_by = {
        "format": 2,
        "tail": tail,
        "weights": weights_id(weights),
        "decoder": asdict(parts.model.config),
        "dtype": parts.model.dtype,
        "matmul_precision": parts.model.matmul_precision,
        "platform": jax.default_backend(),
    }
    logps_fn = make_logps_fn(parts.model.hidden, parts.model.unembedding, chunk=config.batch.target_chunk, tail=tail,
                             precision=parts.model.precision)  # fmt: skip
    logps_step = make_logps_step(logps_fn, replicated(parts.mesh))  # without the statistics that metrics want

    def compute(batches: Batches, steps: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        ids, logps = dataset_logps(logps_step, weights, batches, parts.place, steps)
        return ids, {name: getattr(logps, name) for name in ("sum", "tail_sum") if getattr(logps, name) is not None}

    stores = {batches.store.key: batches.store for batches in (parts.batches, *parts.evals.values())}
    spread = row_devices(parts.mesh), own_shares(parts.mesh)
    every = {key: set_batches(config, store, np.arange(len(store)), *spread) for key, store in stores.items()}
    return CachedReference({key: cached_logps(batches, made_by, compute) for key, batches in every.items()})


class Start(NamedTuple):
    """What a run begins with."""

    trained: Params  # all weights, or the adapters
    base: Params | None  # the frozen weights, where adapters are trained
    reference: Reference | None
    ids: dict[str, str]  # of the weights, of the reference's, of given adapters


def starting_weights(parts: Parts) -> Start:
    """Load them; on resume, too, because the reference is made of them, never of a restored policy."""
    config, lora = parts.config, parts.model.lora
    weights = load_weights(parts.source, parts.model, config.model, parts.mesh)
    reference, ids = None, {"weights": weights_id(weights)}
    if isinstance(config, DPOConfig):
        reference_params = reference_weights(parts, weights)
        reference, ids["reference"] = make_reference(parts, reference_params), weights_id(reference_params)
        del reference_params
    if lora is None:
        return Start(weights, None, reference, ids)
    adapters = load_start(config.lora, parts.model, config.run.seed, parts.mesh)
    if config.lora.path is not None:
        ids["adapters"] = weights_id(adapters)
    return Start(adapters, weights, reference, ids)


def abstract_state(model: Model, mesh: Mesh | AbstractMesh, optimizer: optax.GradientTransformation) -> TrainState:
    """The state's shapes, types and places."""
    shapes = jax.eval_shape(lambda params: init_state(params, optimizer), trained_shapes(model, mesh))
    shardings = state_shardings(shapes, trained_shardings(model, mesh), replicated(mesh), optimizer)
    return placed(shapes, shardings)


def make_step(
    config: DPOConfig | SFTConfig,
    logps_fn: LogpsFn,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    compiler_options: Mapping[str, str],
) -> TrainStep:
    """The compiled train step of a config: the one that runs, and the one that a plan compiles.

    ``state`` is the shapes and places of `abstract_state`.
    """
    return make_train_step(
        logps_fn=logps_fn,
        loss=loss_of(config),
        optimizer=optimizer,
        accumulation=config.batch.accumulation,
        shardings=jax.tree.map(lambda x: x.sharding, state),
        metrics_sharding=replicated(mesh),
        compiler_options=compiler_options,
    )


def initial_state(
    parts: Parts, optimizer: optax.GradientTransformation
) -> tuple[Callable[[Params], TrainState], TrainState]:
    """A function from what is trained, which it takes over, to the first state; and that state's shapes and places."""
    abstract = abstract_state(parts.model, parts.mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda params: init_state(params, optimizer), out_shardings=shardings, donate_argnums=0), abstract


def step_reference(reference: Reference | None, base: Params | None, data: StepData, store: Store) -> Any:
    """The ``reference`` argument of a train step; ``base``: the frozen weights, where adapters are trained."""
    if base is not None and not isinstance(reference, CachedReference):
        return Base(base)
    argument = None if reference is None else reference.of(data, store)
    return argument if base is None else Base(base, argument)


class Scored(NamedTuple):
    """An evaluation set and its log-probs."""

    name: str
    store: Store
    ids: np.ndarray  # [N] examples
    policy: PairLogps  # of these N
    reference_logps: PairLogps | None


def score_sets(parts: Parts, params: Params, reference: Reference | None) -> Iterator[Scored]:
    """Every evaluation set, scored, one after another."""
    for name, batches in parts.evals.items():
        ids, policy = dataset_logps(parts.logps_step, params, batches, parts.place)
        reference_logps = None if reference is None else reference.dataset(parts.logps_step, batches, parts.place)
        yield Scored(name, batches.store, ids, policy, reference_logps)


def evaluate_sets(
    parts: Parts, params: Params, reference: Reference | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of every evaluation set, as ``eval_NAME_METRIC``: means over all its pairs, exact for any batch size.

    With them what these means are of, an object a set: none when fine-tuning, which has no rewards.
    """
    metrics, distributions = {}, []
    for scored in score_sets(parts, params, reference):
        values = jax.device_get(preference_metrics(scored.policy, scored.reference_logps, parts.loss))
        metrics |= {f"eval_{scored.name}_{key}": float(value) for key, value in values.items()}
        if isinstance(parts.config, DPOConfig):
            distribution = reward_distributions(scored.policy, scored.reference_logps, parts.loss)
            distributions.append({"set": scored.name, "pairs": len(scored.ids), **distribution})
    return metrics, distributions
