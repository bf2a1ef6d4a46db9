"""The step: pure, exact in what it averages, and careful with what it is given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_model import init, plain_logps_fn, random_batch

from dpo_jax.batch import PairLogps
from dpo_jax.config import LossConfig, OptimizerConfig
from dpo_jax.inference.agreement import AGREEMENT, tied
from dpo_jax.losses import mean_loss, preference_loss
from dpo_jax.methods.optimizer import make_optimizer
from dpo_jax.step import init_state, make_train_step, train_step

LOSS = LossConfig(beta=0.3)
ADAMW = optax.adamw(0.05)
SGD = optax.sgd(1.0)
BATCH = random_batch()


def start(optimizer=ADAMW, seed=0):
    return init_state(init(seed), optimizer)


def compiled(optimizer=ADAMW, loss=LOSS, accumulation=1):
    """The step compiled as it is, nothing donated."""
    return jax.jit(partial(train_step, logps_fn=plain_logps_fn, loss=loss, optimizer=optimizer,
                           accumulation=accumulation))  # fmt: skip


STEP, SGD_STEP = compiled(), compiled(SGD)


def copied(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, rtol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), found, expected)


def gradient(found, before):
    """Of a step of SGD at rate 1."""
    return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), before.params, found.params)


def in_parts(tree, parts):
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)


# ----------------------------------------------------------------------------------------------------------- purity


def test_equal_inputs_give_equal_outputs_and_stay_as_they_were():
    state, reference = start(), init(1)
    before = copied((state, reference, BATCH))
    first = copied(STEP(state, reference, BATCH))
    assert_equal(copied(STEP(state, reference, BATCH)), first)
    assert_equal((state, reference, BATCH), before)
    assert int(first[0].step) == 1
    assert first[0].healthy


def test_the_compiled_step_takes_the_old_state_and_never_the_reference():
    """The reference's arrays are alive and the same, bit for bit, however many steps were made."""
    reference = init(0)
    state = init_state(jax.tree.map(jnp.copy, reference), ADAMW)
    before = copied(reference)
    step = make_train_step(logps_fn=plain_logps_fn, loss=LOSS, optimizer=ADAMW)
    for _ in range(3):
        old = state
        state, _ = step(old, reference, BATCH)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state)))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((reference, state)))
    assert_equal(reference, before)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.params, before)
    assert min(jax.tree.leaves(moved)) > 0.01


def test_the_state_holds_one_model_and_its_moments_only():
    """Nothing in the optimizer's state belongs to the reference."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(init()))
    assert sum(leaf.size for leaf in jax.tree.leaves(start().opt_state)) == 2 * num_params + 1
    after, _ = STEP(start(), init(1), BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(start())


# ---------------------------------------------------------------------------------------------------------- numbers


def test_the_first_step_from_the_reference_is_at_margin_0():
    _, metrics = STEP(start(), init(), BATCH)
    assert float(metrics["loss"]) == pytest.approx(np.log(2), abs=3e-6)
    assert tied(metrics, AGREEMENT["float32"])


def test_a_cached_reference_is_the_live_one():
    cached = jax.jit(plain_logps_fn)(init(1), BATCH)
    live, kept = (STEP(start(), reference, BATCH) for reference in (init(1), cached))
    assert_close(kept, live)
    assert abs(float(live[1]["rewards/margins"])) > 0.01


def test_the_gradient_is_the_weighted_sum_over_pairs_divided_by_their_number():
    """Each pair alone, then together by its weight; an empty slot is no pair."""
    weights = np.array([2.0, 0.5, 1.0], np.float32)
    state, reference = start(SGD), init(1)
    total = jax.tree.map(np.zeros_like, copied(state.params))
    losses = []
    for i, weight in enumerate(weights):
        only = BATCH.replace(valid=np.arange(4) == i, weight=np.ones(4, np.float32))
        after, metrics = SGD_STEP(state, reference, only)
        losses.append(float(metrics["loss"]))
        total = jax.tree.map(lambda x, own, w=weight: x + w * own / 3, total, gradient(after, state))
    batch = BATCH.replace(weight=np.array([*weights, 0], np.float32), valid=np.arange(4) < 3)
    after, metrics = SGD_STEP(state, reference, batch)
    assert_close(gradient(after, state), total)
    assert float(metrics["loss"]) == pytest.approx((weights @ losses) / 3, rel=1e-6)


@pytest.mark.parametrize("loss", [LOSS, LossConfig(type="sft")], ids=["separable", "coupled"])
@pytest.mark.parametrize("kind", ["live", "cached"])
def test_a_ragged_step_in_parts_is_the_whole(loss, kind):
    """Divided by the real pairs of the step, not of a part, nor by its slots; one part is half empty, one is empty."""
    valid = np.arange(8) < 5
    batch = random_batch(8, seed=3, valid=valid, weight=np.where(valid, 0.5 + np.arange(8) % 3, 0).astype(np.float32))
    reference = init(1) if kind == "live" else jax.jit(plain_logps_fn)(init(1), batch)
    state = start(SGD)
    whole, metrics = compiled(SGD, loss)(state, reference, batch)
    parts = in_parts(batch, 4)
    fixed = in_parts(reference, 4) if kind == "cached" else reference
    found, metrics_of_parts = compiled(SGD, loss, accumulation=4)(state, fixed, parts)
    assert_close(gradient(found, state), gradient(whole, state))
    assert_close(metrics_of_parts, metrics)


def test_the_gradient_norm_is_that_before_clipping():
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), SGD)
    state, reference = start(optimizer), init(1)
    after, metrics = compiled(optimizer)(state, reference, BATCH)

    def objective(params):
        policy = plain_logps_fn(params, BATCH)
        return mean_loss(preference_loss(policy, plain_logps_fn(reference, BATCH), LOSS), policy)

    expected = optax.tree.norm(jax.jit(jax.grad(objective))(state.params))
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 0.1
    assert float(optax.tree.norm(gradient(after, state))) == pytest.approx(1e-3, rel=1e-3)


def test_fine_tuning_needs_no_reference():
    one = jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x, BATCH)
    step = compiled(loss=LossConfig(type="sft"))
    state, losses = start(), []
    for _ in range(20):
        state, metrics = step(state, None, one)
        losses.append(float(metrics["loss"]))
    assert set(metrics) == {"loss", "grad_norm"}
    assert losses[-1] < 0.7 * losses[0]


OPTIMIZERS = [OptimizerConfig(name="adamw", moment_dtype="bfloat16"), OptimizerConfig(name="lion"),
              OptimizerConfig(name="adafactor", weight_decay=0.1), OptimizerConfig(name="rmsprop")]  # fmt: skip


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.name)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_keeps_every_type_also_of_bfloat16_weights(config, parts):
    optimizer = make_optimizer(config, 10)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init())
    batch = BATCH if parts == 1 else in_parts(BATCH, parts)
    state = init_state(params, optimizer)
    after, metrics = jax.eval_shape(compiled(optimizer, accumulation=parts), state, params, batch)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert kinds(after) == kinds(state)
    assert {(value.shape, value.dtype) for value in metrics.values()} == {((), jnp.dtype("float32"))}


# ------------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_leaves_the_state_and_holds_it(bad):
    """Weights, moments and counter stay as they were, in that step and in good ones after it, until it is cleared."""
    state, _ = STEP(start(), init(1), BATCH)
    before = copied(state)
    harmed, metrics = STEP(state, init(1), BATCH.replace(weight=np.array([1, 1, bad, 1], np.float32)))
    assert not np.isfinite(metrics["loss"])
    later, metrics = STEP(harmed, init(1), BATCH)
    assert np.isfinite(metrics["loss"])
    for found in (harmed, later):
        assert not found.healthy
        assert_equal(found.replace(healthy=np.array(True)), before)
    cleared, _ = STEP(later.replace(healthy=jnp.array(True)), init(1), BATCH)
    assert_equal(copied(cleared), copied(STEP(state, init(1), BATCH)[0]))


def test_a_gradient_that_is_not_finite_is_one_though_the_loss_is():
    """The root has the value 0 and an infinite slope at 0."""

    def logps_fn(params, batch):
        ones = jnp.ones(2)
        return PairLogps(jnp.sqrt(params) * jnp.array([[1.0, 0.0]] * 2), jnp.ones((2, 2)), ones, ones > 0)

    step = jax.jit(partial(train_step, logps_fn=logps_fn, loss=LOSS, optimizer=SGD))
    after, metrics = step(init_state(jnp.zeros(()), SGD), None, None)
    assert float(metrics["loss"]) == pytest.approx(np.log(2))
    assert np.isinf(metrics["grad_norm"])
    assert not after.healthy
    assert after.params == 0
    assert after.step == 0
