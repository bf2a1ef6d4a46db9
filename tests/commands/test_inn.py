"""The inn: its answers are enumerated, its optimum is exact, and each method reaches what theory says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.commands import inn
from dpo_jax.commands.inn_experiment import Task
from dpo_jax.commands.inn_policies import PolicyKind, decoder_policy, decoder_start, table_logps, table_policy
from dpo_jax.commands.inn_runs import (
    offline,
    online_dpo,
    policy_gradient,
    preferences,
    sampled,
    supervised_decoder,
)
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig

SEEDS = range(3)
TABLE = table_policy()
TASK = Task(TABLE)
TREE, REFERENCE, START = TASK.tree, TASK.reference, TASK.start


def shares(weights: np.ndarray, beta: float) -> tuple[inn.Exact, float, float]:
    """What a table reaches, its share of the best reward at its KL, and its share of the best objective at beta."""
    reached, best = TASK.reached(weights), TREE.optimum(REFERENCE, beta)
    objective = (reached.reward - beta * reached.kl - START.reward) / (best.reward - beta * best.kl - START.reward)
    return reached, TASK.share(reached), objective


def test_the_answers_to_a_guest_have_all_of_the_mass():
    np.testing.assert_allclose(np.exp(REFERENCE).sum(1), 1, atol=1e-6)
    assert REFERENCE.shape == (8, 26_436)


def test_sampled_rewards_and_kl_agree_with_the_exact_ones():
    table = TABLE.start + 0.3 * jax.random.normal(jax.random.key(1), TABLE.start.shape)
    meals, _ = sampled(TABLE, table, 4096, 8, jax.random.key(0))
    answers, scores = TABLE.inputs(meals), meals.rewards
    ratios = (table_logps(table, answers) - table_logps(TABLE.start, answers)).sum(-1)
    exact = TASK.reached(table)
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
    runs = policy_gradient(TABLE, PolicyGradientConfig(kl_coef=0.2), SEEDS, num_steps=100, num_answers=256)
    theory = TREE.optimum(REFERENCE, 0.2)
    for table, metrics in zip(runs.weights, runs.metrics, strict=True):
        reached, share, objective = shares(table, 0.2)
        assert share > 0.97
        assert objective > 0.96
        assert abs(reached.kl - theory.kl) < 0.4
        assert metrics["ratio_error"].max() < 1e-5
        assert metrics["sampler_error"].max() < 1e-5
        assert abs(metrics["sampled_kl"][0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", [1.0, 0.5, 0.1])
def test_the_kl_coefficient_of_ppo_is_the_beta_of_the_optimum(kl_coef):
    runs = policy_gradient(TABLE, PolicyGradientConfig(kl_coef=kl_coef), SEEDS, num_steps=100, num_answers=256)
    for table in runs.weights:
        np.testing.assert_allclose(shares(table, kl_coef)[0].kl, TREE.optimum(REFERENCE, kl_coef).kl, rtol=0.1)


@pytest.mark.slow
def test_rloo_reaches_the_optimum():
    options = PolicyGradientConfig(estimator="rloo", answers=4, epochs=2, kl_coef=0.2)
    runs = policy_gradient(TABLE, options, SEEDS, num_steps=100, num_answers=256)
    for table, metrics in zip(runs.weights, runs.metrics, strict=True):
        assert shares(table, 0.2)[1] > 0.94
        assert metrics["ratio_error"].max() < 1e-5


@pytest.mark.slow
def test_online_dpo_reaches_the_optimum():
    for table in online_dpo(TABLE, 0.2, SEEDS, num_steps=300, num_pairs=128).weights:
        _, share, objective = shares(table, 0.2)
        assert share > 0.965
        assert objective > 0.95


@pytest.mark.slow
def test_dpo_on_pairs_of_the_reference_reaches_most_of_the_optimum():
    pairs = preferences(TABLE, 131_072, SEEDS)
    for table in offline(TABLE, LossConfig(beta=0.5), pairs, SEEDS, num_steps=600, batch_size=256).weights:
        assert shares(table, 0.5)[1] > 0.92


def test_the_tree_of_a_decoder_has_the_log_probs_that_are_trained():
    """Two programs: one forward pass over all lists of 4 courses, and packed rows as in training."""
    policy = decoder_policy(jax.tree.map(lambda x: 3 * x, decoder_start(0)))
    leaves = inn.Tree().leaf_logps(policy.next_logps(policy.start))
    np.testing.assert_allclose(np.exp(leaves).sum(1), 1, atol=1e-5)
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((8, 8, 5)) < 0.3, rng.choice(inn.STOPS, (8, 8, 5)), rng.integers(4, 10, (8, 8, 5)))
    is_stop = np.isin(tokens, inn.STOPS)
    meals = inn.Meals(rng.integers(0, 8, (8, 8)), tokens, np.cumsum(is_stop, axis=-1) - is_stop == 0)
    logps = jax.jit(lambda meals: policy.logps_fn(policy.start, policy.inputs(meals)).sum(-1))(meals)
    expected = [leaves[meals.guests[i], leaf_of(tokens[i], meals.mask[i])] for i in np.ndindex(8, 8)]
    np.testing.assert_allclose(np.ravel(logps), expected, atol=5e-5)
    assert len(np.unique(meals.mask.sum(-1))) == 5


def leaf_of(tokens: np.ndarray, mask: np.ndarray) -> int:
    """The index of an answer among the tree's leaves."""
    *courses, last = np.asarray(tokens)[np.asarray(mask)].tolist()
    before = sum(inn.NUM_COURSES**depth for depth in range(len(courses))) * len(inn.STOPS)
    index = 0  # of the node among those of its depth
    for course in courses:
        index = index * inn.NUM_COURSES + course - inn.FIRST_COURSE
    if last in inn.STOPS:
        return before + index * len(inn.STOPS) + inn.STOPS.tolist().index(last)
    num_stopped = before + inn.NUM_COURSES ** len(courses) * len(inn.STOPS)
    return num_stopped + index * inn.NUM_COURSES + last - inn.FIRST_COURSE


@pytest.fixture(scope="module")
def decoder() -> PolicyKind:
    return supervised_decoder()


def decoder_shares(decoder: PolicyKind, weights: list) -> list[float]:
    task = Task(decoder)
    return [task.share(task.reached(each)) for each in weights]


@pytest.mark.slow
def test_a_decoder_reaches_most_of_the_optimum_by_ppo(decoder):
    runs = policy_gradient(decoder, PolicyGradientConfig(kl_coef=0.2), SEEDS, num_steps=60, num_answers=256)
    assert min(decoder_shares(decoder, runs.weights)) > 0.88
    assert max(metrics["ratio_error"].max() for metrics in runs.metrics) < 1e-5
    assert max(metrics["sampler_error"].max() for metrics in runs.metrics) < 1e-5


@pytest.mark.slow
def test_a_decoder_reaches_most_of_the_optimum_by_online_dpo(decoder):
    runs = online_dpo(decoder, 0.2, SEEDS, num_steps=150, num_pairs=128)
    assert min(decoder_shares(decoder, runs.weights)) > 0.80


@pytest.mark.slow
def test_a_decoder_reaches_most_of_the_optimum_by_dpo_tuned_on_another_seed(decoder):
    rates = [1e-3, 1.5e-3]
    options = {"num_steps": 200, "batch_size": 256}
    pairs = preferences(decoder, 16_384, range(4))
    loss = LossConfig(beta=0.5)
    tried = offline(decoder, loss, pairs[:1] * len(rates), [0] * len(rates), learning_rates=rates, **options)
    best = rates[int(np.argmax(decoder_shares(decoder, tried.weights)))]
    runs = offline(decoder, loss, pairs[1:], range(1, 4), learning_rates=[best] * 3, **options)
    assert np.median(decoder_shares(decoder, runs.weights)) > 0.65
