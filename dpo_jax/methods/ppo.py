"""PPO and RLOO: the policy is updated on its own answers, by the scores that a judge gives them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.batch import Adapted, Params
from dpo_jax.batching.to_devices import ToDevices, make_to_devices
from dpo_jax.config import PPOConfig
from dpo_jax.data.store import Store
from dpo_jax.errors import UserError
from dpo_jax.inference.reference import copy_weights
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
from dpo_jax.methods.setup import Setup, describe, load_policy
from dpo_jax.methods.start_check import starts_equal
from dpo_jax.methods.value_model import (
    ValueModel,
    make_answer_logps_fn,
    make_outputs_fn,
    open_value_source,
    start_value,
    value_model_of,
)
from dpo_jax.models.decoder import Model
from dpo_jax.parallel.sharding import replicated, sharded_structs
from dpo_jax.policy_gradient import ActorCritic, Rollout, policy_gradient_step
from dpo_jax.runs.logs import Evaluation
from dpo_jax.runs.session import Metrics, StepFacts
from dpo_jax.step import Frozen, TrainState, init_state, state_shardings
from dpo_jax.weights.open import trained_shapes, trained_shardings

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
    """Check what must hold in every rollout: sampler and training program agree, and the first update's ratios are 1.

    ``is_first``: policy and reference have the same weights, so the KL is 0, too.

    Raises:
        UserError: a value differs, so a position, an adapter or a mask differs between sampling and training.
    """
    check_sampler(setup, metrics)
    ratio_error = "ratio_error" if setup.model.config.experts is None else "mean_ratio_error"  # see MIXTURE_AGREEMENT
    refuse_difference(setup, metrics, ratio_error, "the ratios of the first update are not 1")
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
    value_source = open_value_source(setup)
    value_model = value_model_of(config, setup.model, value_source)
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
        step=make_policy_step(config, setup.model, value_model, mesh, optimizer, abstract, flags),
        schedule=make_schedule(config.optimizer, num_steps),
        base=policy.weights if has_adapters else None,
        reference=None if has_adapters else reference,
        starts_equal=starts_equal(config, ids),
        sampler=sampler,
        evaluation=make_evaluation(setup, sampler, reference),
        samples=make_samples(setup, "reference", reference, sampler.judge),
        to_devices=make_to_devices(mesh, leading=1),
    )
    value = None if value_model is None else start_value(setup, policy, value_model, value_source)
    return method, PPOStart(ActorCritic(policy.adapters if has_adapters else policy.weights, value))


def refuse_prompt_weights(store: Store) -> None:
    """Raise ``UserError`` if the prompts have weights, which the loss of a rollout does not support."""
    weighted_rows = np.flatnonzero(store.weights != 1)
    if len(weighted_rows):
        row = f"row {store.rows[weighted_rows[0]]} has weight {store.weights[weighted_rows[0]]:g}"
        raise UserError(f"data.train: {row}, but ppo weights all prompts equally; remove the column `weight`")


def make_policy_step(
    config: PPOConfig,
    model: Model,
    value_model: ValueModel | None,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    compiler_options: Mapping[str, str],
) -> PolicyStep:
    """Return the config's jitted step on a rollout, which a run executes and a plan compiles ahead of time.

    ``state`` holds shapes and shardings, as `abstract_policy_state` returns them.
    """
    max_tokens, chunk = config.sampling.max_tokens, config.batch.target_chunk
    step = partial(
        policy_gradient_step,
        outputs_fn=make_outputs_fn(model, value_model, max_tokens, chunk=chunk),
        logps_fn=make_answer_logps_fn(model, max_tokens, chunk=chunk),
        options=config.ppo,
        optimizer=optimizer,
    )
    shardings = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=dict(compiler_options))


def abstract_policy_state(
    model: Model, value_model: ValueModel | None, mesh: Mesh | AbstractMesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the shapes, dtypes and shardings of the train state; ``value_model`` is None if none is trained."""
    shapes = ActorCritic(trained_shapes(model, mesh))
    shardings = ActorCritic(trained_shardings(model, mesh))
    if value_model is not None:
        shapes = shapes._replace(value=value_model.trained(trained_shapes(value_model.model, mesh)))
        shardings = shardings._replace(value=value_model.trained(trained_shardings(value_model.model, mesh)))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), shapes)
    return sharded_structs(state, state_shardings(state, shardings, replicated(mesh), optimizer))
