"""Build what a run needs from its config: model, tokenizer, data, and the programs that score and train."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.batch import Adapted, Params
from dpo_jax.batching.batches import Batches, StepData, set_batches, train_batches
from dpo_jax.batching.sets import DataSets, open_sets
from dpo_jax.batching.to_devices import ToDevices, make_to_devices
from dpo_jax.bucket import is_remote
from dpo_jax.config import LOSS_TRAITS, AnyConfig, LossConfig, TrainConfig
from dpo_jax.config.idle import Facts, idle_options
from dpo_jax.console import say
from dpo_jax.data.store import AnySource, Store
from dpo_jax.data.template import reads_clock
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.errors import UserError
from dpo_jax.inference.score import LogpsStep
from dpo_jax.logprobs import LogpsFn, make_logps_fn
from dpo_jax.models.decoder import Model, count_adapters, count_params, gathers_all_experts, refuse_expert_axis
from dpo_jax.models.families import context_length, refuse_positions
from dpo_jax.models.heads import make_scores_fn
from dpo_jax.parallel import hosts
from dpo_jax.parallel.compiler import platform_flags
from dpo_jax.parallel.sharding import local_row_shards, platform_of, replicated, row_devices, sharded_structs
from dpo_jax.runs.checksums import weights_id
from dpo_jax.runs.directory import RunDir, log_event
from dpo_jax.runs.logs import clipped
from dpo_jax.runs.manifest import make_manifest
from dpo_jax.runs.session import Metrics
from dpo_jax.step import Follow, TrainState, TrainStep, init_state, make_train_step, state_shardings
from dpo_jax.weights.open import (
    ModelSource,
    keep_model_files,
    load_start,
    load_weights,
    open_model,
    trained_shapes,
    trained_shardings,
)
from dpo_jax.weights.reward_model import refuse_reward_model

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Setup:
    """Model, tokenizer, data and scoring programs of a run, before any weights are loaded."""

    config: AnyConfig
    mesh: Mesh
    source: ModelSource
    hf_config: Mapping[str, Any]  # config.json of the trained model
    model: Model
    tokenizer: Any
    batches: Batches  # one per train step
    evals: dict[str, Batches]
    sources: Mapping[str, Sequence[AnySource]]  # of each store, by its key
    logps_fn: LogpsFn
    logps_step: LogpsStep  # compiled, without gradient
    to_devices: ToDevices


def assemble(
    config: AnyConfig,
    mesh: Mesh,
    train_set: "Dataset | None" = None,
    eval_sets: "Mapping[str, Dataset] | None" = None,
) -> Setup:
    """Find the model, tokenize the data and assign it to steps; nothing is compiled and no weights are loaded."""
    opened = open_model(config.model, platform_of(mesh), config.lora)
    model, tokenizer = trained_model(opened.model, config), opened.tokenizer(config.data.chat_template)
    refuse_expert_axis(model.config, mesh)
    sets = hosts.writer_first(partial(sets_of, config, tokenizer, train_set, eval_sets), "tokenized data")
    _refuse_different_inputs(config, opened.source, sets)
    sets = sets.with_answers(config.planned)
    for store in (sets.train, *(eval_set.store for eval_set in sets.evals.values())):
        refuse_weights(config.objective, store)
        refuse_margins(config, store)
    if config.run.samples and sets.evals:
        sample_length = longest_sample(config, [eval_set.store for eval_set in sets.evals.values()])
        refuse_positions(model.config, sample_length, "sampling.max_tokens", config.sampling.max_tokens)
    row_split = row_devices(mesh), local_row_shards(mesh)
    batches = train_batches(sets, config.batch, *row_split)
    logps_fn = train_logps_fn(config, model)
    return Setup(
        config=config,
        mesh=mesh,
        source=opened.source,
        hf_config=opened.source.hf_config,
        model=model,
        tokenizer=tokenizer,
        batches=batches,
        evals={name: set_batches(s.store, s.ids, config.batch, *row_split) for name, s in sets.evals.items()},
        sources=sets.sources,
        logps_fn=logps_fn,
        logps_step=jax.jit(logps_fn, out_shardings=replicated(mesh)),  # every process gets all pairs' log-probs
        to_devices=make_to_devices(mesh),
    )


def _refuse_different_inputs(config: AnyConfig, source: ModelSource, sets: DataSets) -> None:
    """Raise ``UserError`` if hosts read different data, or different generations of a model in a bucket."""
    copy = source.folder.name if source.folder is not None and is_remote(config.model.path) else None
    stores = [store.key for store in (sets.train, *(eval_set.store for eval_set in sets.evals.values()))]
    for name, value in (("data", stores), ("model.path", copy)):
        values = hosts.gather(value, name)
        others = [process for process, other in enumerate(values) if other != values[0]]
        if others:
            raise UserError(f"{name}: process {others[0]} reads other files than process 0: give all hosts the same")


def longest_sample(config: AnyConfig, stores: Sequence[Store]) -> int:
    """Return the maximum length in tokens of a prompt of these evaluation sets plus its sampled answer."""
    return max(int(store.lengths[:, 0].max()) for store in stores) + config.sampling.max_tokens


def trained_model(model: Model, config: TrainConfig) -> Model:
    """Return the model of ``model.path`` with the head that the config trains.

    Raises:
        UserError: the config needs a language model, but ``model.path`` is a reward model, or the model has fewer
            positions than ``data.max_length``.
    """
    if not config.scores:
        refuse_reward_model(model, config.model.path)
    max_length = config.data.max_length
    refuse_positions(model.config, max_length, "data.max_length", max_length)
    return replace(model, config=replace(model.config, scores=config.scores))


def sets_of(
    config: AnyConfig,
    tokenizer: Any,
    train: "Dataset | None" = None,
    evals: "Mapping[str, Dataset] | None" = None,
) -> DataSets:
    """Return the data as token stores on disk; ``train`` and ``evals`` replace the sets named in the config."""
    data = replace(config.data, max_length=config.data.max_length - config.planned.num_tokens)
    return open_sets(data, config.run, tokenizer, config.stage, config.batch.size, train, evals)


def refuse_weights(loss: LossConfig, store: Store) -> None:
    """Raise ``UserError`` for weighted rows under a loss that sorts a step's pairs and so has no term per pair."""
    sorting_losses = [name for name, _ in loss.terms if LOSS_TRAITS[name].sorts]
    weighted_rows = np.flatnonzero(store.weights != 1)
    if sorting_losses and len(weighted_rows):
        weight_note = f"row {store.rows[weighted_rows[0]]} of the data has weight {store.weights[weighted_rows[0]]:g}"
        remedy = f"it sorts the pairs of a step, but {weight_note}; remove the weight column or choose another loss"
        raise UserError("loss.type", sorting_losses[0], remedy)


def refuse_margins(config: TrainConfig, store: Store) -> None:
    """Raise ``UserError`` if a reward model is to be trained or evaluated on a margin that is not a number."""
    unusable_rows = np.flatnonzero(np.isnan(store.margins))
    if config.scores and len(unusable_rows):
        row = f"row {store.rows[unusable_rows[0]]} of {store.report[store.sources[unusable_rows[0]]]['source']}"
        raise UserError(f"{row}: margin is not a number: fix the column margin, or remove it from all rows")


def announce(setup: Setup, run: RunDir) -> None:
    """Print the sizes of model, mesh and data; record dropped rows and notes in events.jsonl."""
    model, batches, order = setup.model, setup.batches, setup.batches.order
    eval_sizes = {name: len(eval_batches.order.groups[0]) for name, eval_batches in setup.evals.items()}
    notes = notes_of(setup)
    causes: Counter[str] = Counter()
    for source in batches.store.report:
        causes.update({cause: entry["count"] for cause, entry in source["dropped"].items()})
    if hosts.is_writer():
        num_rows = sum(source["rows"] for source in batches.store.report)
        log_event(
            run, "data", rows=num_rows, train=order.epoch_draws, evals=eval_sizes, dropped=dict(causes), notes=notes
        )
    evals_note = "".join(f", {count} in {name}" for name, count in eval_sizes.items())
    dropped_note = ", ".join(f"{count} rows dropped: {cause}" for cause, count in causes.items()) or "no rows dropped"
    shapes_text = " or ".join(f"{shape.rows} x {shape.length}" for shape in batches.packer.shapes)
    mesh_text = " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    adapters_note = f", {count_adapters(model):,} more in adapters" if model.lora is not None else ""
    for line in (
        f"model: {count_params(model):,} parameters{adapters_note}, {model.dtype}; mesh: {mesh_text}",
        f"data: {order.epoch_draws} training examples{evals_note}; {dropped_note}",
        f"steps: {order.num_steps} of {order.batch} each, in rows of {shapes_text} tokens",
        *(f"note: {note}" for note in notes),
    ):
        say(setup.config.run.progress, line)


def notes_of(setup: Setup) -> list[str]:
    """Return one-line notes on options without effect and on lengths or batch sizes that do not fit model or data."""
    stores = [batches.store for batches in (setup.batches, *setup.evals.values())]
    reports = [source for store in stores for source in store.report]
    device = setup.mesh.devices.flat[0]
    num_rendered = sum(source["rendered"] for source in reports)
    facts = Facts(
        steps=setup.batches.order.num_steps,
        eval_sets=len(setup.evals),
        examples=sum(source["kept"] for source in reports),
        messages=num_rendered,
        dated=num_rendered > 0 and reads_clock(setup.tokenizer.chat_template),
        platform=device.platform,
        flags=frozenset(platform_flags(device.platform, device.device_kind, {})),
    )
    notes, order, lengths = idle_options(setup.config, facts), setup.batches.order, setup.batches.store.lengths
    longest = int((lengths[:, 0] + lengths[:, 1:].max(1)).max())
    max_positions = context_length(setup.source.hf_config) or longest
    if longest > max_positions:
        limit_note = f"but the model supports {max_positions} (max_position_embeddings)"
        notes.append(f"a prompt with its answer has up to {longest} tokens, {limit_note}: lower data.max_length")
    if setup.config.run.samples and setup.evals:
        sample_length = longest_sample(setup.config, [batches.store for batches in setup.evals.values()])
        if sample_length > max(longest, max_positions):
            limit_note = f"but the model supports {max_positions} (max_position_embeddings)"
            notes.append(
                f"a prompt with its sample has up to {sample_length} tokens, {limit_note}: lower sampling.max_tokens"
            )
    if setup.config.scores and setup.batches.store.margins.any():
        notes.append("the loss subtracts the data's column margin from the score differences")
    if gathers_all_experts(setup.model.config, setup.mesh):
        notes.append("every device gathers all experts of each layer: set mesh.expert to keep them where they are")
    if order.batch > order.epoch_draws:
        excess_note = f"more than the {order.epoch_draws} of an epoch, so some appear twice in a step"
        notes.append(f"a batch has {order.batch} examples, {excess_note}: use a smaller batch")
    return notes


def describe(setup: Setup, ids: Mapping[str, str]) -> dict[str, Any]:
    """Return the run's manifest; ``ids`` are the hashes of its initial weights, adapters and reference."""
    template = getattr(setup.tokenizer, "chat_template", None)
    identity = {
        **ids,
        "decoder": asdict(setup.model.config),
        "tokenizer": tokenizer_hash(setup.tokenizer),
        "template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
        "store": setup.batches.store.key,
        "dtype": setup.model.dtype,
    }
    environment = {
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
    }
    return make_manifest(asdict(setup.config), identity, environment)


def logged_row(
    setup: Setup, schedule: optax.Schedule, data: StepData, metrics: Metrics, counts: Mapping[str, int]
) -> Metrics:
    """Return a step's line of metrics.jsonl: its metrics, and values that depend on the step and the data alone."""
    max_norm = setup.config.optimizer.max_grad_norm
    largest = {"grad_norm": metrics.get("max_grad_norm", metrics["grad_norm"])}  # of the step's updates
    return {
        **metrics,
        "learning_rate": float(np.float32(jax.device_get(schedule(data.step)))),
        "epoch": setup.batches.order.epoch(data.step + 1),
        **counts,
        "fill": data.fill,
        **clipped(largest, max_norm),
    }


def keep_files(setup: Setup, run: RunDir) -> None:
    """Write the model's config.json and the tokenizer to the directory of a new run."""
    if hosts.is_writer():
        keep_model_files(run, setup.source, setup.hf_config, setup.tokenizer)


def data_report(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """Return the row counts of each data set by source, and why rows were dropped or changed."""
    train = setup.batches.store
    evals = {name: batches.store for name, batches in setup.evals.items()}
    return {"train": train.report} | {name: store.report for name, store in evals.items() if store.key != train.key}


class Policy(NamedTuple):
    """Initial weights of the trained model, and the adapters if those are trained instead."""

    weights: Params  # of the model
    adapters: Params | None
    ids: dict[str, str]  # hashes, for the manifest

    @property
    def start(self) -> Params | Adapted:
        """The initial weights of the policy: the model's, with the adapters if there are any."""
        return self.weights if self.adapters is None else Adapted(self.adapters, self.weights)


def load_policy(setup: Setup) -> Policy:
    """Load the weights of ``model.path`` and, with LoRA, initialize or load the adapters."""
    config, model = setup.config, setup.model
    weights = load_weights(setup.source, model, config.model, setup.mesh)
    ids = {"weights": weights_id(weights)}
    if model.lora is None:
        return Policy(weights, None, ids)
    adapters = load_start(config.lora, model, weights, config.run.seed, setup.mesh)
    if config.lora.path is not None:
        ids["adapters"] = weights_id(adapters)
    return Policy(weights, adapters, ids)


def train_logps_fn(config: AnyConfig, model: Model) -> LogpsFn:
    """Return the function that computes the log-probs of a train step, or the scores of a reward model."""
    if model.config.scores:
        return make_scores_fn(model)
    return make_logps_fn(
        model.routed_hidden,
        model.unembedding,
        chunk=config.batch.target_chunk,
        stats=config.run.token_stats,
        tail=config.objective.ld_alpha is not None,
        squares=config.objective.weighting == "wpo",
        **model.logit_options,
    )


def abstract_state(
    config: AnyConfig, model: Model, mesh: Mesh | AbstractMesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the shapes, dtypes and shardings of the train state."""
    weights = trained_shapes(model, mesh)
    dtype = config.reference.dtype

    def initial_state(params: Params) -> TrainState:
        cast = lambda x: x if dtype == "auto" else x.astype(dtype)  # noqa: E731
        return init_state(params, optimizer, None if follow_of(config) is None else jax.tree.map(cast, params))

    shapes = jax.eval_shape(initial_state, weights)
    shardings = state_shardings(shapes, trained_shardings(model, mesh), replicated(mesh), optimizer)
    return sharded_structs(shapes, shardings)


def follow_of(config: AnyConfig) -> Follow | None:
    """Return how often and how much the reference moves toward the policy, or None if it is fixed."""
    sync_every = config.reference.sync_every
    return Follow(sync_every, config.reference.sync_mix) if sync_every else None


def make_step(
    config: AnyConfig,
    logps_fn: LogpsFn,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    compiler_options: Mapping[str, str],
) -> TrainStep:
    """Return the config's jitted train step, which a run executes and a plan compiles ahead of time.

    ``state`` holds shapes and shardings, as `abstract_state` returns them.
    """
    return make_train_step(
        logps_fn=logps_fn,
        loss=config.objective,
        optimizer=optimizer,
        accumulation=config.batch.accumulation,
        follow=follow_of(config),
        shardings=jax.tree.map(lambda x: x.sharding, state),
        metrics_sharding=replicated(mesh),
        compiler_options=compiler_options,
    )
