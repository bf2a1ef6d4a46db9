"""Whole runs of each method on the inn's table policy, as one compiled program over all seeds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.commands import inn
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig
from dpo_jax.methods.online_dpo import labeled_pairs
from dpo_jax.policy_gradient import ActorCritic, Rollout, policy_gradient_step
from dpo_jax.step import Frozen, TrainState, init_state, train_step

TREE = inn.Tree()
LANGUAGE = jnp.asarray(inn.language(), jnp.float32)
REFERENCE = TREE.leaf_logps(inn.table_next_logps(LANGUAGE))
START = TREE.exact(REFERENCE, REFERENCE)
LEARNING_RATE = 0.05


def optimizer(num_updates: int) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(LEARNING_RATE, num_updates, 0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99, eps=1e-5))


def sampled(table: Any, num_prompts: int, num_answers: int, key: Any) -> tuple[inn.Meals, Any]:
    """Answers [B, K, N] to guests in turn, and the rule's reward of each [B, K]."""
    guests = jnp.repeat(jnp.arange(num_prompts) % inn.NUM_GUESTS, num_answers)
    meals = inn.table_answers(table, guests, key)
    meals = jax.tree.map(lambda x: x.reshape(num_prompts, num_answers, *x.shape[1:]), meals)
    return meals, inn.answer_rewards(*meals)


def rollout(table: Any, num_prompts: int, options: PolicyGradientConfig, key: Any) -> Rollout:
    """One microbatch of answers."""
    meals, scores = sampled(table, num_prompts, options.answers, key)
    ended = (meals.mask & (meals.tokens == inn.EOS)).any(-1)
    parts = meals, meals.mask, ended, scores, inn.table_logps(table, meals)
    return Rollout(*jax.tree.map(lambda x: x[None], parts))


def policy_gradient_start(
    options: PolicyGradientConfig, update: optax.GradientTransformation
) -> tuple[TrainState, Callable]:
    """The initial state, and the step: state and rollout -> state and metrics."""
    value = None if options.estimator == "rloo" else jnp.zeros(LANGUAGE.shape[:-1])
    step = partial(
        policy_gradient_step,
        logps_fn=inn.table_logps,
        values_fn=None if value is None else inn.table_values,
        options=options,
        optimizer=update,
    )
    frozen = Frozen(reference=LANGUAGE)
    return init_state(ActorCritic(LANGUAGE, value), update), lambda state, rollout: step(state, frozen, rollout)


def policy_gradient(
    options: PolicyGradientConfig, *, num_steps: int, num_answers: int, seeds: range
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The final policy of each seed, and metrics [seeds, steps]."""
    start, update = policy_gradient_start(options, optimizer(num_steps * options.epochs))

    def step(state: TrainState, key: Any) -> tuple[TrainState, Any]:
        return update(state, rollout(state.params.policy, num_answers // options.answers, options, key))

    state, metrics = over_seeds(start, step, num_steps, seeds)
    return list(np.asarray(state.params.policy)), jax.device_get(metrics)


def pairs_of(meals: inn.Meals, rows: Any, order: Any, weight: Any) -> inn.Pairs:
    """The pairs whose answers are those of ``order`` [P, 2] to the prompts ``rows`` [P]."""
    return inn.Pairs(jax.tree.map(lambda x: x[rows[:, None], order], meals), weight)


def online_dpo(beta: float, *, num_steps: int, num_pairs: int, seeds: range) -> list[np.ndarray]:
    """The final policy of each seed."""
    update, loss = optimizer(num_steps), LossConfig(beta=beta)
    options: dict[str, Any] = {"logps_fn": inn.table_pair_logps, "loss": loss, "optimizer": update}

    def step(state: TrainState, key: Any) -> tuple[TrainState, Any]:
        meals, scores = sampled(state.params, num_pairs, 2, key)
        order, weight = labeled_pairs(scores)
        rows = jnp.tile(jnp.arange(num_pairs), 2)
        return train_step(state, LANGUAGE, pairs_of(meals, rows, order, weight), **options)

    return list(np.asarray(over_seeds(init_state(LANGUAGE, update), step, num_steps, seeds)[0].params))


def dpo(beta: float, *, num_steps: int, num_pairs: int, data_size: int, seeds: range) -> list[np.ndarray]:
    """The final policy of each seed: DPO on pairs of the reference's answers, labeled by Bradley-Terry."""
    update, loss = optimizer(num_steps), LossConfig(beta=beta)
    options: dict[str, Any] = {"logps_fn": inn.table_pair_logps, "loss": loss, "optimizer": update}

    def run(seed: Any) -> Any:
        answers_key, label_key, order_key = jax.random.split(jax.random.key(seed), 3)
        meals, scores = sampled(LANGUAGE, data_size, 2, answers_key)
        second_wins = jax.random.bernoulli(label_key, jax.nn.sigmoid(scores[:, 1] - scores[:, 0])).astype(int)
        order = jnp.stack([second_wins, 1 - second_wins], axis=1)
        drawn = jax.random.permutation(order_key, data_size)

        def step(state: TrainState, k: Any) -> tuple[TrainState, Any]:
            rows = drawn[(k * num_pairs + jnp.arange(num_pairs)) % data_size]
            return train_step(state, LANGUAGE, pairs_of(meals, rows, order[rows], jnp.ones(num_pairs)), **options)

        return jax.lax.scan(step, init_state(LANGUAGE, update), jnp.arange(num_steps))[0].params

    return list(np.asarray(jax.jit(jax.vmap(run))(jnp.array(seeds))))


def over_seeds(start: TrainState, step: Callable, num_steps: int, seeds: range) -> tuple[TrainState, Any]:
    """Run ``step(state, key)`` from ``start`` for every seed, with keys folded from (seed, step)."""

    def run(seed: Any) -> tuple[TrainState, Any]:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(num_steps))
        return jax.lax.scan(step, start, keys)

    return jax.jit(jax.vmap(run))(jnp.array(seeds))


def shares(table: np.ndarray, beta: float) -> tuple[inn.Exact, float, float]:
    """What a policy reaches, its share of the best reward at its KL, and its share of the best objective at beta."""
    reached = TREE.exact(TREE.leaf_logps(inn.table_next_logps(table)), REFERENCE)
    best = TREE.optimum(REFERENCE, beta)
    share = (reached.reward - START.reward) / (TREE.best_reward(REFERENCE, reached.kl) - START.reward)
    objective = (reached.reward - beta * reached.kl - START.reward) / (best.reward - beta * best.kl - START.reward)
    return reached, share, objective
