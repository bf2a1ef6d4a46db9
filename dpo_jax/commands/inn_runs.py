"""Training runs of each method on the inn, for both kinds of policy.

The runs use the functions that the commands run on models: `train_step`, `policy_gradient_step` and `labeled_pairs`. A
run is one compiled program, in which answers are sampled, too; it serves all seeds and learning rates.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from dpo_jax.batch import Params
from dpo_jax.commands.inn import NUM_GUESTS, Meals
from dpo_jax.commands.inn_policies import PolicyKind, decoder_policy, decoder_start, table_policy
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig
from dpo_jax.logprobs import LogpsFn
from dpo_jax.methods.online_dpo import labeled_pairs
from dpo_jax.policy_gradient import ActorCritic, Rollout, policy_gradient_step, separate_outputs
from dpo_jax.step import Frozen, TrainState, init_state, train_step

REWARD_LOSS = LossConfig(beta=1.0, reference_free=True, center=0.01)  # as `RewardConfig.objective`
SFT_LOSS = LossConfig(type="sft")
SFT_STEPS, SFT_BATCH, SFT_SIZE = 600, 256, 65_536  # of the decoder's supervised model


class Cost(NamedTuple):
    """The cost of a method's runs on all seeds."""

    seconds: float  # of CPU time, without compilation
    compile_seconds: float  # of the one program of all seeds
    num_bytes: int  # of a run's inputs, outputs and temporary arrays, as its program was compiled


class Trained(NamedTuple):
    """The results of a method's runs on all seeds."""

    weights: list[Params]  # of each seed
    metrics: list[dict[str, np.ndarray]]  # of each seed: a value for every step
    cost: Cost


def make_optimizer(learning_rate: Any, num_updates: int) -> optax.GradientTransformation:
    """Return the optimizer of all runs: Adam with clipped gradients and a cosine schedule."""
    rate = optax.cosine_decay_schedule(learning_rate, num_updates, 0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99, eps=1e-5))


def trained(run: Callable[..., tuple[Params, Any]], arguments: Sequence[tuple[Any, ...]]) -> Trained:
    """Compile ``run(*arguments) -> (weights, metrics)``, unless cached, and call it with each tuple of arguments."""
    arguments = [jax.tree.map(jnp.asarray, each) for each in arguments]
    leaves, structure = jax.tree.flatten(arguments[0])
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    compiled, compile_seconds = _compiled(run, structure, shapes)
    start_time = time.process_time()
    results = jax.block_until_ready([compiled(*each) for each in arguments])
    memory = compiled.memory_analysis()
    num_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    cost = Cost(time.process_time() - start_time, compile_seconds, num_bytes)
    return Trained([weights for weights, _ in results], jax.device_get([metrics for _, metrics in results]), cost)


@cache
def _compiled(run: Callable[..., Any], structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[Any, float]:
    """Return the compiled program, and the CPU seconds that its compilation took."""
    start_time = time.process_time()
    compiled = jax.jit(run).lower(*jax.tree.unflatten(structure, shapes)).compile()
    return compiled, time.process_time() - start_time


def sampled(
    policy: PolicyKind, weights: Params, num_prompts: int, num_answers: int, key: Key[Array, ""]
) -> tuple[Meals, Float[Array, "B K N"]]:
    """Sample answers [B, K, N] to B prompts, cycling through the guests; return them and each token's log-prob."""
    guests = jnp.repeat(jnp.arange(num_prompts) % NUM_GUESTS, num_answers)
    answers = policy.answers(weights, guests, key)
    return jax.tree.map(lambda x: x.reshape(num_prompts, num_answers, *x.shape[1:]), answers)


def preferences(policy: PolicyKind, size: int, seeds: Sequence[int], sampler: Params | None = None) -> list[Meals]:
    """Return pairs [size, 2] for each seed, the chosen answer first, labeled by Bradley-Terry with the rule's rewards.

    ``sampler``: the weights of the policy that answers; None: those that the runs start from.
    """

    @jax.jit
    def pairs(weights: Params, seed: Array) -> Meals:
        answers_key, label_key = jax.random.split(jax.random.key(seed))
        meals, _ = sampled(policy, weights, size, 2, answers_key)
        rewards = meals.rewards
        second_wins = jax.random.bernoulli(label_key, jax.nn.sigmoid(rewards[:, 1] - rewards[:, 0])).astype(int)
        return _reordered(meals, jnp.arange(size), jnp.stack([second_wins, 1 - second_wins], axis=1))

    weights = policy.start if sampler is None else sampler
    return [pairs(weights, seed) for seed in seeds]


def _reordered(meals: Meals, rows: Array, order: Array) -> Meals:
    """Return pairs of answers: for P prompts with indices ``rows`` [P], the answers with indices ``order`` [P, 2]."""
    return jax.tree.map(lambda x: x[rows[:, None], order], meals)


def offline(
    policy: PolicyKind,
    loss: LossConfig,
    data: Sequence[Meals],
    seeds: Sequence[int],
    *,
    num_steps: int,
    batch_size: int,
    logps_fn: LogpsFn | None = None,
    start: Params | None = None,
    learning_rates: Sequence[float] | None = None,
) -> Trained:
    """Train a policy (DPO, fine-tuning) or a reward model on a fixed set of answers for each seed.

    ``logps_fn`` and ``start``: the policy's, unless another model is trained; the reference, if the loss has one, is
    the policy's start. ``learning_rates``: of each seed.
    """
    run = _offline_run(policy, loss, logps_fn or policy.pair_logps_fn, num_steps, batch_size)
    start = policy.start if start is None else start
    reference = policy.start if loss.needs_reference else None
    rates = learning_rates or [policy.learning_rate] * len(seeds)
    return trained(run, [(start, reference, *each) for each in zip(data, seeds, rates, strict=True)])


@cache
def _offline_run(
    policy: PolicyKind, loss: LossConfig, logps_fn: LogpsFn, num_steps: int, batch_size: int
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    def run(
        start: Params, reference: Params, meals: Meals, seed: Array, rate: Array
    ) -> tuple[Params, dict[str, Array]]:
        size = len(meals.guests)
        optimizer = make_optimizer(rate, num_steps)
        shuffled = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), 1), size)

        def step(state: TrainState, k: Array) -> tuple[TrainState, dict[str, Array]]:
            rows = shuffled[(k * batch_size + jnp.arange(batch_size)) % size]
            batch = policy.inputs(jax.tree.map(lambda x: x[rows], meals))
            return train_step(state, reference, batch, logps_fn=logps_fn, loss=loss, optimizer=optimizer)

        state, metrics = jax.lax.scan(step, init_state(start, optimizer), jnp.arange(num_steps))
        return state.params, metrics

    return run


def online_dpo(policy: PolicyKind, beta: float, seeds: Sequence[int], *, num_steps: int, num_pairs: int) -> Trained:
    """Run online DPO on pairs of sampled answers that the rule labels."""
    options: dict[str, Any] = {"logps_fn": policy.pair_logps_fn, "loss": LossConfig(beta=beta)}

    def run(reference: Params, seed: Array) -> tuple[Params, dict[str, Array]]:
        optimizer = make_optimizer(policy.learning_rate, num_steps)

        def step(state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
            meals, _ = sampled(policy, state.params, num_pairs, 2, key)
            order, label = labeled_pairs(meals.rewards)
            batch = policy.inputs(_reordered(meals, jnp.arange(num_pairs), order), label)
            return train_step(state, reference, batch, optimizer=optimizer, **options)

        state, metrics = jax.lax.scan(step, init_state(reference, optimizer), _step_keys(seed, num_steps))
        return state.params, metrics

    return trained(run, [(policy.start, seed) for seed in seeds])


def policy_gradient(
    policy: PolicyKind,
    options: PolicyGradientConfig,
    seeds: Sequence[int],
    *,
    num_steps: int,
    num_answers: int,
    rewards: Sequence[Params] | None = None,
) -> Trained:
    """Run PPO or RLOO with ``num_answers`` per step, scored by the rule or by each seed's reward model in ``rewards``.

    Metrics are those of `policy_gradient_step` and ``rule``, the mean reward of the step's answers by the rule.
    """
    run = _policy_gradient_run(policy, options, num_steps, num_answers // options.answers)
    value = None if options.trained_value is None else policy.start_value
    each_reward = [None] * len(seeds) if rewards is None else rewards
    return trained(run, [(policy.start, value, *each) for each in zip(each_reward, seeds, strict=True)])


@cache
def _policy_gradient_run(
    policy: PolicyKind, options: PolicyGradientConfig, num_steps: int, num_prompts: int
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    def run(
        reference: Params, value: Params | None, reward: Params | None, seed: Array
    ) -> tuple[Params, dict[str, Array]]:
        optimizer = make_optimizer(policy.learning_rate, num_steps * options.epochs)
        outputs_fn = separate_outputs(policy.logps_fn, None if value is None else policy.values_fn)
        update = partial(policy_gradient_step, outputs_fn=outputs_fn, logps_fn=policy.logps_fn, options=options)

        def step(state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
            meals, logps = sampled(policy, state.params.policy, num_prompts, options.answers, key)
            inputs = policy.inputs(meals)
            scores = meals.rewards if reward is None else policy.scores_fn(reward, inputs).sum
            fields = jax.tree.map(lambda x: x[None], (inputs, meals.mask, meals.ended, scores, logps))
            state, metrics = update(state, Frozen(reference=reference), Rollout(*fields), optimizer=optimizer)
            return state, metrics | {"rule": meals.rewards.mean()}

        start = init_state(ActorCritic(reference, value), optimizer)
        state, metrics = jax.lax.scan(step, start, _step_keys(seed, num_steps))
        return state.params.policy, metrics

    return run


def _step_keys(seed: Array, num_steps: int) -> Key[Array, " steps"]:
    """Return a key for each step, folded from (seed, step)."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(num_steps))


def supervised_decoder() -> PolicyKind:
    """Return the decoder policy, fine-tuned on the table policy's answers; every run starts from it."""
    untrained_policy = decoder_policy(decoder_start(0))
    language_policy = table_policy()
    meals, _ = jax.jit(lambda key: sampled(language_policy, language_policy.start, SFT_SIZE, 1, key))(jax.random.key(0))
    result = offline(untrained_policy, SFT_LOSS, [meals], [0], num_steps=SFT_STEPS, batch_size=SFT_BATCH)
    return decoder_policy(result.weights[0])
