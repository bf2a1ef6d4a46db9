"""Estimators of the policy gradient against their equations, and the step against what a wrong one would do."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.commands import inn
from dpo_jax.commands.inn_policies import table_policy
from dpo_jax.commands.inn_runs import sampled
from dpo_jax.config.online import PolicyGradientConfig
from dpo_jax.policy_gradient import (
    ActorCritic,
    Rollout,
    clipped_surrogate,
    clipped_value_loss,
    gae,
    leave_one_out,
    make_targets,
    policy_gradient_step,
    separate_outputs,
    token_rewards,
    whiten,
)
from dpo_jax.step import Frozen, init_state

TABLE = table_policy()
LANGUAGE = TABLE.start
LENGTHS = np.array([[4, 1], [2, 5]])
MASK = np.arange(5) < LENGTHS[..., None]
PPO = PolicyGradientConfig(kl_coef=0.2)
RLOO = PolicyGradientConfig(estimator="rloo", answers=4, epochs=2, kl_coef=0.2)
SGD = optax.sgd(0.1)


@cache
def policy_gradient_start(options, optimizer=SGD):
    """The initial state of a table, and its compiled step from a state and a rollout."""
    value = TABLE.start_value if options.estimator == "gae" else None
    outputs_fn = separate_outputs(TABLE.logps_fn, None if value is None else TABLE.values_fn)
    functions = {"outputs_fn": outputs_fn, "logps_fn": TABLE.logps_fn}
    step = jax.jit(partial(policy_gradient_step, options=options, optimizer=optimizer, **functions))
    start = init_state(ActorCritic(LANGUAGE, value), optimizer)
    return start, lambda state, rollout: step(state, Frozen(reference=LANGUAGE), rollout)


@partial(jax.jit, static_argnums=(1, 2))
def sampled_rollout(table, num_prompts, options, key):
    """A rollout of one microbatch, scored by the rule."""
    meals, logps = sampled(TABLE, table, num_prompts, options.answers, key)
    fields = TABLE.inputs(meals), meals.mask, meals.ended, meals.rewards, logps
    return Rollout(*jax.tree.map(lambda x: x[None], fields))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_advantages_are_the_double_sum_of_their_definition():
    """A_t = sum over l of lambda^l d_{t+l} (eq. 16), on answers whose padding holds numbers that must not leak."""
    rewards, values, gae_lambda = random(2, 2, 5), random(2, 2, 5, seed=1), 0.7
    expected = np.zeros(MASK.shape)
    for b, k in np.ndindex(2, 2):
        length = LENGTHS[b, k]
        v = np.append(values[b, k, :length], 0)
        deltas = rewards[b, k, :length] + v[1:] - v[:-1]
        for t in range(length):
            expected[b, k, t] = sum(gae_lambda**i * deltas[t + i] for i in range(length - t))
    np.testing.assert_allclose(gae(rewards, values, MASK, gae_lambda), expected, atol=1e-6)


def test_scores_are_placed_at_the_last_token_and_keep_their_fractions():
    scores = np.array([[0.7, -0.6], [0.25, 0.01]], np.float32)
    rewards = np.asarray(token_rewards(scores, random(2, 2, 5), MASK, kl_coef=0.1))
    penalties = np.where(MASK, -0.1 * random(2, 2, 5), 0)
    last = np.take_along_axis(rewards - penalties, LENGTHS[..., None] - 1, axis=-1)[..., 0]
    np.testing.assert_allclose(last, scores, atol=1e-6)
    np.testing.assert_allclose((rewards - penalties).sum(-1), scores, atol=1e-6)


def test_whitened_values_have_mean_0_and_variance_1_over_the_real_tokens():
    values = np.where(MASK, random(2, 2, 5) * 3 + 7, 1e6)
    actual = np.asarray(whiten(values, MASK))
    real = actual[MASK]
    np.testing.assert_allclose([real.mean(), real.var()], [0, 1], atol=1e-5)
    assert not actual[~MASK].any()


def test_the_baseline_of_an_answer_is_the_mean_of_the_others():
    rewards = random(3, 4)
    expected = [[r[k] - np.delete(r, k).mean() for k in range(4)] for r in rewards]
    np.testing.assert_allclose(leave_one_out(rewards), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"), [(1, 1, -1), (1.3, 1, 0), (0.7, 1, -1), (1.3, -1, 1), (0.7, -1, 0)]
)
def test_the_surrogate_earns_nothing_beyond_the_clip(ratio, advantage, slope):
    actual = jax.grad(lambda r: clipped_surrogate(r, jnp.float32(advantage), 0.2))(jnp.float32(ratio))
    assert actual == slope


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [(0.1, 1, 0.81, -0.9), (0.5, 1, 0.64, 0), (-0.5, 1, 2.25, -1.5), (0.5, -1, 2.25, 1.5), (-0.5, -1, 0.64, 0)],
)
def test_a_value_earns_nothing_by_a_move_beyond_the_clip(value, target, loss, slope):
    """The value was 0 when the answers were sampled."""
    loss_of = lambda v: clipped_value_loss(v, jnp.float32(0), jnp.float32(target), 0.2)  # noqa: E731
    actual = jax.value_and_grad(loss_of)(jnp.float32(value))
    np.testing.assert_allclose(actual, (loss / 2, slope), atol=1e-6)


def test_targets_are_the_whitened_advantages_of_all_microbatches_and_the_returns():
    shape = 2, 2, 2, 5
    mask = np.broadcast_to(MASK, shape)
    scores = random(*shape[:-1]) + np.array([0, 4])[:, None, None]  # another mean in each microbatch
    rollout = Rollout(None, mask, np.ones(shape[:-1], bool), scores, random(*shape))
    logps, reference_logps, values = (random(*shape, seed=seed) for seed in (1, 2, 3))
    targets, _ = make_targets(rollout, logps, reference_logps, values, PPO)
    rewards = token_rewards(scores, logps - reference_logps, mask, PPO.kl_coef)
    advantages = np.asarray(gae(rewards, values, mask, PPO.gae_lambda))
    real = advantages[mask]
    np.testing.assert_allclose(targets.advantages[mask], (real - real.mean()) / real.std(), atol=1e-5)
    np.testing.assert_allclose(targets.values.returns[mask], (advantages + values)[mask], atol=1e-6)
    np.testing.assert_array_equal(targets.values.old_values, values)


def objective(table, options):
    """E[r] - kl_coef KL of a policy, by sums over all answers, differentiable."""
    tree, reference, policy = inn.Tree(), jax.nn.log_softmax(LANGUAGE), jax.nn.log_softmax(table)
    courses = slice(inn.FIRST_COURSE, inn.FIRST_COURSE + inn.NUM_COURSES)
    logps, log_ratios = jnp.zeros((8, 1)), jnp.zeros((8, 1))
    leaves = []
    for depth, meals in enumerate(tree.meals[:-1]):
        previous = meals[:, -1] if depth else np.array([inn.NUM_COURSES])
        logps = logps[:, :, None] + policy[:, depth, previous]
        log_ratios = log_ratios[:, :, None] + (policy - reference)[:, depth, previous]
        leaves.append([x[:, :, inn.STOPS].reshape(8, -1) for x in (logps, log_ratios)])
        logps, log_ratios = (x[:, :, courses].reshape(8, -1) for x in (logps, log_ratios))
    logps, log_ratios = (jnp.concatenate(x, axis=1) for x in zip(*leaves, [logps, log_ratios], strict=True))
    return (jnp.exp(logps) * (tree.rewards - options.kl_coef * log_ratios)).sum(1).mean()


def test_the_mean_gradient_of_rollouts_is_that_of_the_objective():
    """The first update of RLOO, whose baseline is independent of the answer, is unbiased: k1 in the reward is right.

    With k1 in the loss, or with k3 in the reward, the mean would be another one.
    """
    options, num_rollouts = replace(RLOO, epochs=1), 64
    policy = LANGUAGE + 0.5 * random(*LANGUAGE.shape)
    expected = jax.grad(objective)(policy, options)
    start, step = policy_gradient_start(options, optax.sgd(1.0))  # its update is the gradient
    start = replace(start, params=start.params._replace(policy=policy))

    def update(key):
        return step(start, sampled_rollout(policy, 128, options, key))[0].params.policy - policy

    updates = jax.jit(partial(jax.lax.map, update))(jax.random.split(jax.random.key(0), num_rollouts))
    direction = np.asarray(expected)
    projections = (np.asarray(updates) * direction).sum((1, 2, 3, 4)) / (direction**2).sum()
    assert abs(projections.mean() - 1) < 4 * projections.std() / num_rollouts**0.5
    assert projections.std() / num_rollouts**0.5 < 0.05  # so that a bias would show


def assert_same(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


@pytest.mark.parametrize("options", [PPO, RLOO])
def test_microbatches_change_nothing(options):
    """Whitening, baselines and means are those of the whole step."""
    start, step = policy_gradient_start(options)
    whole = sampled_rollout(LANGUAGE, 32 // options.answers, options, jax.random.key(0))
    split = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[2:]), whole)
    (state, metrics), (split_state, split_metrics) = (step(start, answers) for answers in (whole, split))
    assert_same(split_state.params, state.params, atol=1e-6)
    assert_same(split_metrics, metrics, atol=1e-5)
    assert metrics["grad_norm"] > 0.01


def test_a_model_that_trains_on_other_positions_than_it_sampled_from_is_noticed():
    start, step = policy_gradient_start(PPO)
    policy = LANGUAGE + 0.2 * random(*LANGUAGE.shape)
    start = replace(start, params=start.params._replace(policy=policy))
    answers = sampled_rollout(policy, 32, PPO, jax.random.key(0))
    assert step(start, answers)[1]["sampler_error"] < 1e-5
    meals = answers.inputs.meals
    shifted = answers.inputs._replace(meals=meals._replace(guests=(meals.guests + 1) % 8))
    assert step(start, replace(answers, inputs=shifted))[1]["sampler_error"] > 0.1


def test_an_update_that_is_not_finite_leaves_the_state_as_it_was():
    start, step = policy_gradient_start(PPO, optax.adam(0.1))
    answers = sampled_rollout(LANGUAGE, 32, PPO, jax.random.key(0))
    state, metrics = step(start, replace(answers, scores=answers.scores.at[0, 3, 0].set(jnp.nan)))
    assert not np.isfinite(metrics["loss"])
    assert not state.healthy
    assert_same(replace(state, healthy=start.healthy), start)


def test_an_answer_without_end_is_penalized():
    """With a penalty, the reward of a step falls by it times the share of answers that did not end."""
    start, step = policy_gradient_start(PPO)
    _, penalized = policy_gradient_start(replace(PPO, missing_eos_penalty=3.0))
    answers = sampled_rollout(LANGUAGE.at[:, :, :, inn.EOS].add(-8), 32, PPO, jax.random.key(0))
    share = 1 - answers.ended.mean()
    assert share > 0.2
    difference = step(start, answers)[1]["rlhf_reward"] - penalized(start, answers)[1]["rlhf_reward"]
    np.testing.assert_allclose(difference, 3 * share, rtol=1e-5)
