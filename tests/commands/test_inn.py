"""The inn: its answers are enumerated, its optimum is exact, and each method reaches what theory says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.commands import inn
from dpo_jax.commands.compare import Task
from dpo_jax.commands.inn_runs import LANGUAGE, dpo, online_dpo, policy_gradient, sampled
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig

SEEDS = range(3)
TASK = Task()
TREE, REFERENCE, START = TASK.tree, TASK.reference, TASK.start


def shares(table: np.ndarray, beta: float) -> tuple[inn.Exact, float, float]:
    """What a policy reaches, its share of the best reward at its KL, and its share of the best objective at beta."""
    reached, best = TASK.reached(table), TREE.optimum(REFERENCE, beta)
    objective = (reached.reward - beta * reached.kl - START.reward) / (best.reward - beta * best.kl - START.reward)
    return reached, TASK.share(reached), objective


def test_the_answers_to_a_guest_have_all_of_the_mass():
    np.testing.assert_allclose(np.exp(REFERENCE).sum(1), 1, atol=1e-6)
    assert REFERENCE.shape == (8, 26_436)


def test_sampled_rewards_and_kl_agree_with_the_exact_ones():
    table = jnp.asarray(LANGUAGE, jnp.float32) + 0.3 * jax.random.normal(jax.random.key(1), LANGUAGE.shape)
    meals, scores = sampled(table, 4096, 8, jax.random.key(0))
    ratios = (inn.table_logps(table, meals) - inn.table_logps(jnp.asarray(LANGUAGE), meals)).sum(-1)
    exact = TASK.reached(np.asarray(table))
    for sample, expected in ((scores, exact.reward), (ratios, exact.kl)):
        values = np.asarray(sample, np.float64)
        assert abs(values.mean() - expected) < 3.5 * values.std() / values.size**0.5


def test_rewards_of_answers_are_those_of_the_leaves():
    """Every list of courses that the tree has, ended by its stop, gets the tree's reward from the sampled side too."""
    start = 0
    for depth, meals in enumerate(TREE.meals[:-1]):
        tokens = np.zeros((len(meals), inn.MAX_TOKENS), np.int32)
        tokens[:, :depth], tokens[:, depth] = meals + inn.FIRST_COURSE, inn.EOS
        mask = np.broadcast_to(np.arange(inn.MAX_TOKENS) <= depth, tokens.shape)
        actual = [inn.answer_rewards(jnp.full(len(meals), guest), tokens, mask) for guest in range(inn.NUM_GUESTS)]
        leaves = start + np.arange(len(meals)) * len(inn.STOPS) + list(inn.STOPS).index(inn.EOS)
        np.testing.assert_allclose(actual, TREE.rewards[:, leaves], atol=1e-6)
        start += len(meals) * len(inn.STOPS)
    tokens = TREE.meals[-1] + inn.FIRST_COURSE
    actual = inn.answer_rewards(jnp.zeros(len(tokens), int), tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(actual, TREE.rewards[0, start:], atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_no_tilt_of_the_optimum_is_better(beta):
    """The optimum's objective is log Z, and steps away from it, toward the reference or random ones, lose."""
    best = TREE.optimum(REFERENCE, beta)
    log_z = np.logaddexp.reduce(REFERENCE + TREE.rewards / beta, axis=1).mean()
    np.testing.assert_allclose(best.reward - beta * best.kl, beta * log_z, rtol=1e-9)
    assert TREE.optimum(REFERENCE, 1.1 * beta).reward < best.reward
    np.testing.assert_allclose(TREE.best_reward(REFERENCE, best.kl), best.reward, rtol=1e-6)
    for other in (TREE.optimum(REFERENCE, 1.1 * beta), TREE.optimum(REFERENCE, 0.9 * beta), START):
        assert other.reward - beta * other.kl < best.reward - beta * best.kl


def test_ppo_reaches_the_optimum():
    options = PolicyGradientConfig(kl_coef=0.2)
    tables, metrics = policy_gradient(options, num_steps=100, num_answers=256, seeds=SEEDS)
    theory = TREE.optimum(REFERENCE, 0.2)
    for table in tables:
        reached, share, objective = shares(table, 0.2)
        assert share > 0.97
        assert objective > 0.96
        assert abs(reached.kl - theory.kl) < 0.4
    assert metrics["ratio_error"].max() < 1e-5
    assert metrics["sampler_error"].max() < 1e-5
    np.testing.assert_allclose(metrics["sampled_kl"][:, 0], 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", [1.0, 0.5, 0.1])
def test_the_kl_coefficient_of_ppo_is_the_beta_of_the_optimum(kl_coef):
    options = PolicyGradientConfig(kl_coef=kl_coef)
    for table in policy_gradient(options, num_steps=100, num_answers=256, seeds=SEEDS)[0]:
        np.testing.assert_allclose(shares(table, kl_coef)[0].kl, TREE.optimum(REFERENCE, kl_coef).kl, rtol=0.1)


@pytest.mark.slow
def test_rloo_reaches_the_optimum():
    options = PolicyGradientConfig(estimator="rloo", answers=4, epochs=2, kl_coef=0.2)
    tables, metrics = policy_gradient(options, num_steps=100, num_answers=256, seeds=SEEDS)
    for table in tables:
        assert shares(table, 0.2)[1] > 0.94
    assert metrics["ratio_error"].max() < 1e-5


@pytest.mark.slow
def test_online_dpo_reaches_the_optimum():
    for table in online_dpo(0.2, num_steps=300, num_pairs=128, seeds=SEEDS):
        _, share, objective = shares(table, 0.2)
        assert share > 0.965
        assert objective > 0.95


@pytest.mark.slow
def test_dpo_on_pairs_of_the_reference_reaches_most_of_the_optimum():
    for table in dpo(LossConfig(beta=0.5), num_steps=600, num_pairs=256, data_size=131_072, seeds=SEEDS):
        assert shares(table, 0.5)[1] > 0.92
