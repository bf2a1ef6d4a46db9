"""PPO and RLOO: the policy is updated on its own answers, by the scores that a judge gives them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.batch import Adapted, Params, PreferenceBatch
from dpo_jax.batching.to_devices import ToDevices, make_to_devices
from dpo_jax.config import PPOConfig
from dpo_jax.data.store import Store
from dpo_jax.errors import UserError
from dpo_jax.inference.reference import copy_weights
from dpo_jax.logprobs import make_token_logps_fn
from dpo_jax.methods.dpo import reference_ids, reference_weights
from dpo_jax.methods.on_policy import (
    AnswerEvaluation,
    check_sampler,
    make_evaluation,
    refuse_difference,
    sampled_answers,
    sampled_facts,
)
from dpo_jax.methods.optimizer import make_optimizer, make_schedule
from dpo_jax.methods.rollouts import Sampler, make_rollout, make_sampler, pack_answers
from dpo_jax.methods.samples import Samples, make_samples
from dpo_jax.methods.setup import Policy, Setup, describe, load_policy
from dpo_jax.methods.start_check import starts_equal
from dpo_jax.models.decoder import Model
from dpo_jax.models.heads import without_unembedding
from dpo_jax.parallel.sharding import replicated, sharded_structs
from dpo_jax.policy_gradient import ActorCritic, Rollout, TokensFn, policy_gradient_step
from dpo_jax.runs.logs import Evaluation
from dpo_jax.runs.session import Metrics, StepFacts
from dpo_jax.step import Frozen, TrainState, init_state, state_shardings
from dpo_jax.weights.open import load_start, param_shardings, trained_shapes, trained_shardings

PolicyStep = Callable[[TrainState, Frozen, Rollout], tuple[TrainState, dict[str, jax.Array]]]


class PPOStart(NamedTuple):
    """Arrays of the initial state, which a resumed run frees by dropping its only reference to this object."""

    trained: ActorCritic


class PPOInput(NamedTuple):
    """Inputs of one step on the devices, and the `StepFacts` to log with its metrics."""

    frozen: Frozen
    rollout: Rollout
    facts: StepFacts


@dataclass(frozen=True)
class PPO:
    """The methods PPO and RLOO: step k samples a rollout with the policy after k steps, and runs all updates on it."""

    setup: Setup
    config: PPOConfig
    num_steps: int
    evaluates: bool
    manifest: dict[str, Any]
    abstract_state: TrainState
    first_state: Callable[[Any], TrainState]  # compiled, of a `PPOStart`; donates the arrays
    step: PolicyStep
    schedule: optax.Schedule
    base: Params | None  # frozen base weights if adapters are trained
    reference: Params | None  # None: the base
    starts_equal: bool  # the reference has the weights that the policy starts from
    sampler: Sampler
    evaluation: AnswerEvaluation
    samples: Samples | None
    to_devices: ToDevices

    def weights(self, state: TrainState) -> Any:
        """Return the weights of the policy: the trained parameters, or the adapters with their base model."""
        return state.params.policy if self.base is None else Adapted(state.params.policy, self.base)

    def check_start(self, state: TrainState) -> None:
        """Do nothing: `check_rollout` checks the first rollout when its metrics are read."""

    def resumed(self, state: TrainState) -> None:
        """Do nothing: `check_rollout` checks every rollout when its metrics are read."""

    def batch(self, step: int, state: TrainState) -> PPOInput:
        """Sample and score answers to the prompts of ``step``, and put them on the devices."""
        setup, batches = self.setup, self.setup.batches
        ids, graded = sampled_answers(setup, self.sampler, self.weights(state), step)
        data, accumulation = pack_answers(batches, step, ids, graded), batches.packer.accumulation
        rollout = make_rollout(ids, graded, self.config.sampling.max_tokens, accumulation)
        packed = data.batch if accumulation > 1 else jax.tree.map(lambda x: x[None], data.batch)
        put = partial(jax.device_put, device=replicated(setup.mesh))
        rollout = replace(jax.tree.map(put, rollout), inputs=self.to_devices(packed))
        facts = sampled_facts(
            setup,
            self.manifest,
            self.schedule,
            data,
            graded,
            extra={},
            check=lambda metrics: check_rollout(setup, metrics, is_first=self.starts_equal and step == 0),
            keeps_reference=self.base is None,
        )
        return PPOInput(Frozen(self.base, self.reference), rollout, facts)

    def update(self, state: TrainState, data: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Run the compiled step: all updates on one rollout."""
        return self.step(state, data.frozen, data.rollout)

    def evaluate(self, state: TrainState) -> Evaluation:
        """Return the metrics of answers to the evaluation prompts, and samples of them."""
        weights = self.weights(state)
        reference = Adapted(None, self.base) if self.reference is None else self.reference
        samples = [] if self.samples is None else self.samples.evaluate(weights)[1]
        return Evaluation(self.evaluation(weights, reference), samples=samples)


def check_rollout(setup: Setup, metrics: Metrics, is_first: bool) -> None:
    """Check what is known of every rollout: sampler and training program agree, and the first update's ratios are 1.

    ``is_first``: policy and reference have the same weights, so the KL is 0, too.

    Raises:
        UserError: a value differs, so a position, an adapter or a mask differs between sampling and training.
    """
    check_sampler(setup, metrics)
    refuse_difference(setup, metrics, "ratio_error", "the ratios of the first update are not 1")
    if is_first:
        meaning = "policy and reference have the same weights, but differ"
        refuse_difference(setup, metrics, "sampled_kl", meaning, scale=metrics["length"])


def ppo(setup: Setup, flags: Mapping[str, str]) -> tuple[PPO, PPOStart]:
    """Build the policy-gradient method and the arrays it starts from; ``flags`` are compiler options of its step."""
    config, mesh, num_steps = setup.config, setup.mesh, setup.batches.order.num_steps
    assert isinstance(config, PPOConfig)
    refuse_prompt_weights(setup.batches.store)
    policy = load_policy(setup)
    reference = reference_weights(setup, policy.weights)
    sampler, sampler_ids = make_sampler(setup, config.ppo.answers, config.reward)
    ids = policy.ids | sampler_ids | reference_ids(policy, reference)
    optimizer = make_optimizer(config.optimizer, num_steps, config.ppo.epochs)
    value_model = value_model_of(config, setup.model)
    abstract = abstract_policy_state(setup.model, value_model, mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    has_adapters = policy.adapters is not None
    dtype = None if config.reference.dtype == "auto" else config.reference.dtype
    reference = reference if has_adapters else copy_weights(reference, dtype)
    method = PPO(
        setup=setup,
        config=config,
        num_steps=num_steps,
        evaluates=bool(setup.evals),
        manifest=describe(setup, ids),
        abstract_state=abstract,
        first_state=jax.jit(
            lambda start: init_state(start.trained, optimizer), out_shardings=shardings, donate_argnums=0
        ),
        step=make_policy_step(config, setup.model, mesh, optimizer, abstract, flags),
        schedule=make_schedule(config.optimizer, num_steps),
        base=policy.weights if has_adapters else None,
        reference=None if has_adapters else reference,
        starts_equal=starts_equal(config, ids),
        sampler=sampler,
        evaluation=make_evaluation(setup, sampler, reference),
        samples=make_samples(setup, "reference", reference, sampler.judge),
        to_devices=make_to_devices(mesh, leading=1),
    )
    value = None if value_model is None else start_value(setup, policy, value_model)
    return method, PPOStart(ActorCritic(policy.adapters if has_adapters else policy.weights, value))


def refuse_prompt_weights(store: Store) -> None:
    """Raise ``UserError`` if the prompts have weights, which the loss of a rollout does not support."""
    weighted_rows = np.flatnonzero(store.weights != 1)
    if len(weighted_rows):
        row = f"row {store.rows[weighted_rows[0]]} has weight {store.weights[weighted_rows[0]]:g}"
        raise UserError(f"data.train: {row}, but ppo weights all prompts equally; remove the column `weight`")


def value_model_of(config: PPOConfig, model: Model) -> Model | None:
    """Return the value model, which is the policy's decoder with a head, or None if the estimator has none."""
    return replace(model, config=replace(model.config, scores=1)) if config.ppo.estimator == "gae" else None


def make_policy_step(
    config: PPOConfig,
    model: Model,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    compiler_options: Mapping[str, str],
) -> PolicyStep:
    """Return the config's jitted step on a rollout, which a run executes and a plan compiles ahead of time.

    ``state`` holds shapes and shardings, as `abstract_policy_state` returns them.
    """
    value_model, max_tokens = value_model_of(config, model), config.sampling.max_tokens
    step = partial(
        policy_gradient_step,
        logps_fn=make_answer_logps_fn(model, max_tokens, chunk=config.batch.target_chunk),
        values_fn=None if value_model is None else make_values_fn(value_model, max_tokens),
        options=config.ppo,
        optimizer=optimizer,
    )
    shardings = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=dict(compiler_options))


def start_value(setup: Setup, policy: Policy, value_model: Model) -> Params:
    """Return the value model that the run starts from: the policy's layers, or new adapters, and a head of zeros."""
    head, sharding = value_model.param_shapes()["score"], param_shardings(value_model, setup.mesh)["score"]
    score = {"score": jnp.zeros(head.shape, head.dtype, device=sharding)}
    if policy.adapters is not None:
        config = replace(setup.config.lora, path=None)
        return load_start(config, value_model, score, setup.config.run.seed + 1, setup.mesh)
    return copy_weights(without_unembedding(policy.weights), None) | score


def make_answer_logps_fn(model: Model, max_tokens: int, *, chunk: int) -> TokensFn:
    """Return a function that computes the log-prob of each token of the answers in packed rows, [B, K, N].

    ``max_tokens``: N; ``chunk``: targets per device whose logits are in memory at a time.
    """
    logps_fn = make_token_logps_fn(model.hidden, model.unembedding, chunk=chunk, **model.logit_options)
    return lambda weights, batch: batch.gather_tokens(logps_fn(weights, batch), max_tokens)


def make_values_fn(model: Model, max_tokens: int) -> TokensFn:
    """Return a function that computes the value before each token of the answers in packed rows, [B, K, N]."""

    def values_fn(weights: Params | Adapted, batch: PreferenceBatch) -> jax.Array:
        head = model.head(weights)
        if isinstance(weights, Adapted):  # to the policy's base, which has no head
            weights = Adapted(weights.adapters, without_unembedding(weights.base) | {"score": head})
        states = jnp.take_along_axis(model.hidden(weights, batch), batch.target_sources[..., None], axis=1)
        values = jnp.einsum(
            "RMD,D->RM", states.astype(jnp.float32), head[0].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return batch.gather_tokens(values, max_tokens)

    return values_fn


def abstract_policy_state(
    model: Model, value_model: Model | None, mesh: Mesh | AbstractMesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the shapes, dtypes and shardings of the train state; ``value_model`` is None if none is trained."""
    shapes = ActorCritic(trained_shapes(model, mesh))
    shardings = ActorCritic(trained_shardings(model, mesh))
    if value_model is not None:
        shapes = shapes._replace(value=trained_shapes(value_model, mesh))
        shardings = shardings._replace(value=trained_shardings(value_model, mesh))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), shapes)
    return sharded_structs(state, state_shardings(state, shardings, replicated(mesh), optimizer))
