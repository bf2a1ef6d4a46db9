"""Every loss against its equation worked by hand, its gradient, its extremes, and what a mean is taken over."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpo_jax.batch import PairLogps, TokenStats
from dpo_jax.config import LossConfig
from dpo_jax.losses import COUPLED, LOSSES, loss_at_start, mean_loss, preference_loss, preference_metrics

SMOOTH = LossConfig(beta=0.3, label_smoothing=0.2)
CONFIGS = [*(LossConfig(type=name, beta=0.3) for name in LOSSES), SMOOTH]
each_loss = pytest.mark.parametrize("loss", CONFIGS, ids=[*LOSSES, "cDPO"])


def logps(sums, counts=None, weight=None, valid=None, stats=None) -> PairLogps:
    sums = np.asarray(sums)
    return PairLogps(
        sum=jnp.asarray(sums, jnp.float32),
        count=jnp.asarray(np.ones(sums.shape) if counts is None else counts, jnp.float32),
        weight=jnp.asarray(np.ones(len(sums)) if weight is None else weight, jnp.float32),
        valid=jnp.asarray(np.ones(len(sums)) if valid is None else valid, bool),
        stats=stats,
    )


def random_logps(count=6, seed=0):
    """Policy and reference of pairs with margins of either sign, away from hinge's corner."""
    draw = np.random.Generator(np.random.Philox(seed))
    counts = draw.integers(1, 9, (count, 2))
    return logps(draw.normal(-20, 5, (count, 2)), counts), logps(draw.normal(-20, 5, (count, 2)), counts)


# ---------------------------------------------------------------------------------------------------------- values

# Two pairs. log pi: chosen -10, rejected -14, of 4 and 8 tokens; then -9 and -3, of 1 and 2 tokens.
POLICY = logps([[-10, -14], [-9, -3]], [[4, 8], [1, 2]])
# log ref: -11 and -12, so s(y_w) = 1, s(y_l) = -2, D = 3; then -9.5 and -5, so s(y_w) = 0.5, s(y_l) = 2, D = -1.5.
REFERENCE = logps([[-11, -12], [-9.5, -5]], [[4, 8], [1, 2]])
BY_HAND = {
    # -log sigma(z) = log(1 + exp(-z)) at z = beta D = 0.5 * 3 and 0.5 * -1.5
    "sigmoid": (LossConfig(beta=0.5), [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(0.75))]),
    # the same at both signs of z, in the shares 0.9 and 0.1
    "cDPO": (
        LossConfig(beta=0.5, label_smoothing=0.1),
        [0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5)),
         0.9 * math.log(1 + math.exp(0.75)) + 0.1 * math.log(1 + math.exp(-0.75))],
    ),
    # 1 - 0.1 * 3, 1 + 0.1 * 1.5
    "hinge": (LossConfig(type="hinge", beta=0.1), [0.7, 1.15]),
    # 1 - 3 is below 0
    "hinge, satisfied": (LossConfig(type="hinge", beta=1.0), [0.0, 2.5]),
    # (1/4 - -2/8 - 1)^2 = (-0.5)^2; (0.5/1 - 2/2 - 1)^2 = (-1.5)^2, with 1/(2 beta) = 1
    "ipo": (LossConfig(type="ipo", beta=0.5), [0.25, 2.25]),
    # 10 + 9 nats over 4 + 1 tokens; each pair's part counts 2/5, so that their mean is 19/5
    "sft": (LossConfig(type="sft"), [10 * 2 / 5, 9 * 2 / 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_values_worked_by_hand(name):
    loss, expected = BY_HAND[name]
    found = preference_loss(POLICY, REFERENCE, loss)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_every_loss_has_its_values():
    assert {loss.type for loss, _ in BY_HAND.values()} == set(LOSSES)


def test_without_a_reference_the_ratio_is_the_log_prob():
    for loss in CONFIGS:
        nothing = logps(np.zeros((2, 2)))
        np.testing.assert_array_equal(preference_loss(POLICY, None, loss), preference_loss(POLICY, nothing, loss))


def test_beta_scales_the_margin_of_the_sigmoid():
    """A larger beta asks for a smaller move: at the margin found by one beta, the loss of twice it is lower."""
    assert float(preference_loss(POLICY, REFERENCE, LossConfig(beta=1.0))[0]) == pytest.approx(
        math.log(1 + math.exp(-3.0)), rel=1e-6
    )


@each_loss
def test_swapped_answers_have_the_negative_margin(loss):
    """With z = beta D: L(z) - L(-z) = -(1 - 2e) z for the sigmoid; hinge and ipo by their squares and corners."""
    policy, reference = random_logps()
    swap = lambda x: x.replace(sum=x.sum[:, ::-1], count=x.count[:, ::-1])  # noqa: E731
    found = preference_loss(swap(policy), swap(reference), loss)
    s = np.asarray(policy.sum - reference.sum, np.float64)
    margin, mean = s[:, 0] - s[:, 1], s[:, 0] / policy.count[:, 0] - s[:, 1] / policy.count[:, 1]
    if loss.type == "sigmoid":
        expected = preference_loss(policy, reference, loss) + (1 - 2 * loss.label_smoothing) * loss.beta * margin
    else:
        chosen_after = policy.count[:, 1]
        expected = {
            "hinge": np.maximum(1 + loss.beta * margin, 0),
            "ipo": (mean + 1 / (2 * loss.beta)) ** 2,
            "sft": -policy.sum[:, 1] * len(mean) / chosen_after.sum(),
        }[loss.type]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_smoothing_has_its_minimum_where_the_label_is_as_sure_as_the_model():
    """d/dz vanishes at sigma(z) = 1 - e."""
    z = math.log((1 - SMOOTH.label_smoothing) / SMOOTH.label_smoothing)
    pair = logps(np.zeros((1, 2)))
    slope = jax.grad(lambda sums: preference_loss(pair.replace(sum=sums), None, SMOOTH).sum())
    np.testing.assert_allclose(slope(jnp.array([[z / SMOOTH.beta, 0.0]])), 0, atol=1e-7)
    assert slope(jnp.array([[0.0, 0.0]]))[0, 0] == pytest.approx(-SMOOTH.beta * (0.8 - 0.5), rel=1e-6)


# -------------------------------------------------------------------------------------------------------- gradients


@each_loss
def test_gradients_are_those_of_differences_in_float64(loss):
    with jax.enable_x64(True):
        policy, reference = random_logps()
        sums = jnp.asarray(policy.sum, jnp.float64)
        fn = lambda sums: mean_loss(preference_loss(policy.replace(sum=sums), reference, loss), policy)  # noqa: E731
        assert fn(sums).dtype == jnp.float64
        check_grads(jax.jit(fn), (sums,), order=1, modes=["rev"], rtol=1e-5)


@each_loss
def test_no_gradient_reaches_the_reference(loss):
    policy, reference = random_logps()
    fn = lambda sums: preference_loss(policy, reference.replace(sum=sums), loss).sum()  # noqa: E731
    assert not np.any(jax.grad(fn)(reference.sum))


EXTREMES = np.array([[1e30, -1e30], [-1e30, 1e30], [-1e30, -1e30], [0, 0], [-1e30, 0], [0, -1e30]])


@each_loss
def test_extremes_are_finite(loss):
    """One-token answers at +-1e30 nats; the square of ipo leaves float32 there, so it is held at +-1e15."""
    sums = EXTREMES * (1e-15 if loss.type == "ipo" else 1)
    for fixed in (sums, -sums, np.zeros_like(sums)):
        fn = lambda x, fixed=fixed: preference_loss(logps(sums).replace(sum=x), logps(fixed), loss)  # noqa: E731
        values, pull = jax.vjp(fn, logps(sums).sum)
        assert np.isfinite(values).all()
        assert np.isfinite(pull(jnp.ones(len(sums)))[0]).all()


def test_sigmoid_is_linear_far_out():
    found = preference_loss(logps([[-1e30, 1e30], [1e30, -1e30]]), None, LossConfig(beta=0.5))
    np.testing.assert_allclose(found, [1e30, 0], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ means


@each_loss
def test_empty_slots_count_for_nothing(loss):
    """Whatever stands in them; the mean is over real pairs, each by its weight."""
    policy, reference = random_logps(5)
    weight = np.array([1, 0.5, 2, 1, 0.25])
    pad = lambda x: np.concatenate([x, np.full((3, 2), 7.0)])  # noqa: E731
    slots = {"weight": [*weight, 0, 0, 0], "valid": [1] * 5 + [0] * 3}
    filled = [logps(pad(x.sum), pad(x.count), **slots) for x in (policy, reference)]

    def total(sums, policy, reference):
        policy = policy.replace(sum=sums)
        return mean_loss(preference_loss(policy, reference, loss), policy)

    plain = [x.replace(weight=jnp.asarray(weight, jnp.float32)) for x in (policy, reference)]
    run = jax.jit(jax.value_and_grad(total))
    value, slope = run(plain[0].sum, *plain)
    value_of_slots, slope_of_slots = run(filled[0].sum, *filled)
    np.testing.assert_allclose(value_of_slots, value, rtol=1e-6)
    np.testing.assert_allclose(slope_of_slots[:5], slope, rtol=1e-6)
    assert not np.any(slope_of_slots[5:])
    assert not np.any(preference_loss(*filled, loss)[5:])
    losses = np.asarray(preference_loss(*plain, loss), np.float64)
    np.testing.assert_allclose(value, (losses * weight).sum() / 5, rtol=1e-6)
    metrics = jax.jit(preference_metrics, static_argnums=2)
    expected = metrics(*plain, loss)
    for name, metric in metrics(*filled, loss).items():
        np.testing.assert_allclose(metric, expected[name], rtol=1e-6, err_msg=name)


@each_loss
def test_a_step_of_empty_slots_is_zero(loss):
    nothing = logps(np.zeros((2, 2)), np.zeros((2, 2)), weight=[0, 0], valid=[0, 0])
    for value in preference_metrics(nothing, nothing, loss).values():
        assert float(value) == 0


@each_loss
def test_coupled_losses_are_marked_as_such(loss):
    policy, reference = random_logps()
    fewer = [jax.tree.map(lambda leaf: leaf[:3], x) for x in (policy, reference)]
    alone, among = preference_loss(*fewer, loss), preference_loss(policy, reference, loss)[:3]
    assert np.allclose(alone, among, rtol=1e-6) == (loss.type not in COUPLED)


def test_fine_tuning_needs_one_answer():
    one = logps([[-10], [-9]], [[4], [1]])
    np.testing.assert_allclose(preference_loss(one, None, LossConfig(type="sft")), [4, 3.6], rtol=1e-6)
    assert set(preference_metrics(one, None, LossConfig(type="sft"))) == {"loss"}


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_worked_by_hand():
    """Pairs of margins 3, -1.5 and 0: a tie of rewards is wrong, and so is one of log-probs."""
    policy = logps([[-10, -14], [-9, -3], [-6, -6]], [[4, 8], [1, 2], [3, 3]])
    reference = logps([[-11, -12], [-9.5, -5], [-5, -5]])
    found = preference_metrics(policy, reference, LossConfig(beta=0.5))
    expected = {
        "loss": (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(0.75)) + math.log(2)) / 3,
        "rewards/chosen": 0.5 * (1 + 0.5 - 1) / 3,
        "rewards/rejected": 0.5 * (-2 + 2 - 1) / 3,
        "rewards/margins": 0.5 * (3 - 1.5 + 0) / 3,
        "rewards/accuracies": 1 / 3,
        "logps/chosen": -25 / 3,
        "logps/rejected": -23 / 3,
        "logps/accuracies": 1 / 3,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-6), name
        assert found[name].dtype == jnp.float32
        assert found[name].shape == ()


def test_rewards_are_of_log_ratios_whatever_the_loss():
    found = [preference_metrics(POLICY, REFERENCE, LossConfig(type=name, beta=0.5)) for name in LOSSES]
    for key in found[0]:
        if key != "loss":
            assert len({float(metrics[key]) for metrics in found}) == 1, key


def test_token_statistics_are_means_over_tokens():
    """Sums over 4 + 1 chosen and 8 + 2 rejected tokens."""
    stats = TokenStats(
        entropy=jnp.array([[8.0, 4.0], [1.0, 2.0]]),
        mean_logit=jnp.array([[4.0, 8.0], [-1.0, 12.0]]),
        top1=jnp.array([[3.0, 1.0], [1.0, 0.0]]),
    )
    found = preference_metrics(POLICY.replace(stats=stats), REFERENCE, LossConfig())
    assert float(found["entropy"]) == pytest.approx(15 / 15)
    assert float(found["logits/chosen"]) == pytest.approx(3 / 5)
    assert float(found["logits/rejected"]) == pytest.approx(20 / 10)
    assert float(found["mean_token_accuracy"]) == pytest.approx(4 / 5)
    one = jax.tree.map(lambda x: x[:, :1] if x.ndim == 2 else x, POLICY.replace(stats=stats))
    assert set(preference_metrics(one, None, LossConfig(type="sft"))) == {
        "loss", "entropy", "mean_token_accuracy", "logits/chosen"
    }  # fmt: skip


START = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * 0.3**2), "sft": None}


@each_loss
def test_loss_at_the_start(loss):
    expected = START[loss.type]
    assert loss_at_start(loss) == (None if expected is None else pytest.approx(expected, rel=1e-6))
    if expected is not None:
        policy, _ = random_logps()
        np.testing.assert_allclose(preference_loss(policy, policy, loss), expected, rtol=1e-6)
