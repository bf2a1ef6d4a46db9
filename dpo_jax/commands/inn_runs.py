"""Whole runs of each method on the inn, with a policy that is a table of next-token logits.

A table can hold the optimum exactly and costs next to nothing, so what a method misses is the method's own. The runs
use the functions that the commands run on models: `train_step`, `policy_gradient_step` and `labeled_pairs`. A run is
one compiled program over all of its seeds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from dpo_jax.commands import inn
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig
from dpo_jax.methods.online_dpo import labeled_pairs
from dpo_jax.policy_gradient import ActorCritic, Rollout, policy_gradient_step
from dpo_jax.step import Frozen, TrainState, init_state, train_step

LEARNING_RATE = 0.05
LANGUAGE = inn.language()  # the table that every run starts from, and its reference
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]


def make_optimizer(num_updates: int) -> optax.GradientTransformation:
    """Return the optimizer of all runs."""
    rate = optax.cosine_decay_schedule(LEARNING_RATE, num_updates, 0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99, eps=1e-5))


def sampled(
    table: Float[Array, "..."], num_prompts: int, num_answers: int, key: Key[Array, ""]
) -> tuple[inn.Meals, Float[Array, "B K"]]:
    """Sample answers [B, K, N] to guests in turn; return them and the rule's reward of each."""
    guests = jnp.repeat(jnp.arange(num_prompts) % inn.NUM_GUESTS, num_answers)
    meals = inn.table_answers(table, guests, key)
    meals = jax.tree.map(lambda x: x.reshape(num_prompts, num_answers, *x.shape[1:]), meals)
    return meals, inn.answer_rewards(*meals)


def sampled_rollout(
    table: Float[Array, "..."], num_prompts: int, options: PolicyGradientConfig, key: Key[Array, ""]
) -> Rollout:
    """Sample a rollout of one microbatch."""
    meals, scores = sampled(table, num_prompts, options.answers, key)
    ended = (meals.mask & (meals.tokens == inn.EOS)).any(-1)
    fields = meals, meals.mask, ended, scores, inn.table_logps(table, meals)
    return Rollout(*jax.tree.map(lambda x: x[None], fields))


def policy_gradient_start(
    options: PolicyGradientConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Step]:
    """Return the initial state, and the step from a state and a rollout to the next state and metrics."""
    table = jnp.asarray(LANGUAGE, jnp.float32)
    value = None if options.estimator == "rloo" else jnp.zeros(table.shape[:-1])
    step = partial(
        policy_gradient_step,
        logps_fn=inn.table_logps,
        values_fn=None if value is None else inn.table_values,
        options=options,
        optimizer=optimizer,
    )
    frozen = Frozen(reference=table)
    start = init_state(ActorCritic(table, value), optimizer)
    return start, lambda state, rollout: step(state, frozen, rollout)


def policy_gradient(
    options: PolicyGradientConfig, *, num_steps: int, num_answers: int, seeds: Sequence[int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run PPO or RLOO on the exact rule; return each seed's final table, and metrics [seeds, steps]."""
    start, update = policy_gradient_start(options, make_optimizer(num_steps * options.epochs))
    num_prompts = num_answers // options.answers

    def step(state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        return update(state, sampled_rollout(state.params.policy, num_prompts, options, key))

    state, metrics = _over_seeds(start, step, num_steps, seeds)
    return np.asarray(state.params.policy), jax.device_get(metrics)


def _pairs(
    meals: inn.Meals, rows: Int[Array, " P"], order: Int[Array, "P 2"], label: Float[Array, " P"] | None = None
) -> inn.Pairs:
    """Return the pairs whose answers are those of ``order`` to the prompts ``rows``."""
    return inn.Pairs(jax.tree.map(lambda x: x[rows[:, None], order], meals), label)


def online_dpo(beta: float, *, num_steps: int, num_pairs: int, seeds: Sequence[int]) -> np.ndarray:
    """Run online DPO on the exact rule; return each seed's final table."""
    table, optimizer = jnp.asarray(LANGUAGE, jnp.float32), make_optimizer(num_steps)
    options: dict[str, Any] = {
        "logps_fn": inn.table_pair_logps,
        "loss": LossConfig(beta=beta),
        "optimizer": optimizer,
    }
    rows = jnp.arange(num_pairs)

    def step(state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        meals, scores = sampled(state.params, num_pairs, 2, key)
        return train_step(state, table, _pairs(meals, rows, *labeled_pairs(scores)), **options)

    return np.asarray(_over_seeds(init_state(table, optimizer), step, num_steps, seeds)[0].params)


def dpo(
    loss: LossConfig,
    *,
    num_steps: int,
    num_pairs: int,
    data_size: int,
    seeds: Sequence[int],
    sampler: np.ndarray = LANGUAGE,
) -> np.ndarray:
    """Run DPO on ``data_size`` pairs of answers of the table ``sampler``, labeled by Bradley-Terry of the rule.

    Returns each seed's final table.
    """
    table, optimizer = jnp.asarray(LANGUAGE, jnp.float32), make_optimizer(num_steps)
    options: dict[str, Any] = {"logps_fn": inn.table_pair_logps, "loss": loss, "optimizer": optimizer}

    def run(seed: Int[Array, ""]) -> Float[Array, "..."]:
        answers_key, label_key, order_key = jax.random.split(jax.random.key(seed), 3)
        meals, scores = sampled(jnp.asarray(sampler, jnp.float32), data_size, 2, answers_key)
        second_wins = jax.random.bernoulli(label_key, jax.nn.sigmoid(scores[:, 1] - scores[:, 0])).astype(int)
        order = jnp.stack([second_wins, 1 - second_wins], axis=1)
        drawn = jax.random.permutation(order_key, data_size)

        def step(state: TrainState, k: Int[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
            rows = drawn[(k * num_pairs + jnp.arange(num_pairs)) % data_size]
            return train_step(state, table, _pairs(meals, rows, order[rows]), **options)

        return jax.lax.scan(step, init_state(table, optimizer), jnp.arange(num_steps))[0].params

    return np.asarray(jax.jit(jax.vmap(run))(jnp.array(seeds)))


def _over_seeds(
    start: TrainState, step: Step, num_steps: int, seeds: Sequence[int]
) -> tuple[TrainState, dict[str, Array]]:
    """Run ``step(state, key)`` from ``start`` for every seed, with keys folded from (seed, step)."""

    def run(seed: Int[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(num_steps))
        return jax.lax.scan(step, start, keys)

    return jax.jit(jax.vmap(run))(jnp.array(seeds))
