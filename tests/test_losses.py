"""Every loss against its equation worked by hand, its gradient, its extremes, and what a mean is taken over."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpo_jax.batch import PairLogps, TokenStats
from dpo_jax.config import LossConfig, LossType
from dpo_jax.losses import LOSSES, mean_loss, preference_loss, preference_metrics
from dpo_jax.methods.start_check import loss_at_start

NEEDS = {"exo_pair": {"label_smoothing": 0.1}}


def config_of(name: str, **options) -> LossConfig:
    return LossConfig(**{"type": name, "beta": 0.3, **NEEDS.get(name, {}), **options})


SMOOTH = LossConfig(beta=0.3, label_smoothing=0.2)
CONFIGS = {name: config_of(name) for name in LOSSES} | {
    "cDPO": SMOOTH,
    "robust, smoothed": config_of("robust", label_smoothing=0.2),
    "aot, smoothed": config_of("aot", label_smoothing=0.2),
    "ipo of sums": config_of("ipo", ipo_average=False),
    "forward_kl": LossConfig(beta=0.3, f_divergence="forward_kl"),
    "js": LossConfig(beta=0.3, f_divergence="js"),
    "alpha": LossConfig(beta=0.3, f_divergence="alpha"),
    "alpha 1": LossConfig(beta=0.3, f_divergence="alpha", f_alpha=1.0),
    "hinge, js": config_of("hinge", f_divergence="js"),
    "ld": LossConfig(beta=0.3, ld_alpha=0.5),
    "wpo": LossConfig(beta=0.3, weighting="wpo"),
    "wpo, gradient": LossConfig(beta=0.3, weighting="wpo", wpo_gradient=True),
    "mpo": LossConfig(types=("sigmoid", "bco_pair", "sft"), weights=(0.8, 0.2, 1.0), beta=0.3),
    "reference-free": LossConfig(beta=0.3, reference_free=True),
}
each_loss = pytest.mark.parametrize("loss", CONFIGS.values(), ids=CONFIGS)


def logps(sums, counts=None, weight=None, valid=None, stats=None) -> PairLogps:
    """Tails of a quarter of the sums, and squares just below the sums: of tokens that are nearly all equally likely."""
    sums = np.asarray(sums)
    return PairLogps(
        tail_sum=jnp.asarray(sums / 4, jnp.float32),
        log_sum_sq=jnp.asarray(sums * 1.01, jnp.float32),
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


def nls(z):
    """-log sigma(z)."""
    return math.log(1 + math.exp(-z))


def sigma(z):
    """The logistic function."""
    return 1 / (1 + math.exp(-z))


def odds(logp):
    return math.exp(logp) / (1 - math.exp(logp))


BY_HAND = {
    # z = beta D = 0.5 * 3 and 0.5 * -1.5
    "sigmoid": ({}, [nls(1.5), nls(-0.75)]),
    # the same at both signs of z, in the shares 0.9 and 0.1
    "sigmoid, smoothed": (
        {"label_smoothing": 0.1},
        [0.9 * nls(1.5) + 0.1 * nls(-1.5), 0.9 * nls(-0.75) + 0.1 * nls(0.75)],
    ),
    # 1 - 0.1 * 3, 1 + 0.1 * 1.5
    "hinge": ({"beta": 0.1}, [0.7, 1.15]),
    # 1 - 3 is below 0
    "hinge, satisfied": ({"beta": 1.0}, [0.0, 2.5]),
    # (1/4 - -2/8 - 1)^2 = (-0.5)^2; (0.5/1 - 2/2 - 1)^2 = (-1.5)^2, with 1/(2 beta) = 1
    "ipo": ({}, [0.25, 2.25]),
    # without lengths: (3 - 1)^2, (-1.5 - 1)^2
    "ipo, of sums": ({"ipo_average": False}, [4.0, 6.25]),
    # sum of p log(p/q) over p = (sigma(z), sigma(-z)), q = (0.9, 0.1)
    "exo_pair": (
        {"label_smoothing": 0.1},
        [sigma(z) * math.log(sigma(z) / 0.9) + sigma(-z) * math.log(sigma(-z) / 0.1) for z in (1.5, -0.75)],
    ),
    # rewards 0.5 and -1; 0.25 and 1
    "nca_pair": ({}, [nls(0.5) + (nls(-0.5) + nls(1.0)) / 2, nls(0.25) + (nls(-0.25) + nls(-1.0)) / 2]),
    "robust": (
        {"label_smoothing": 0.1},
        [(0.9 * nls(1.5) - 0.1 * nls(-1.5)) / 0.8, (0.9 * nls(-0.75) - 0.1 * nls(0.75)) / 0.8],
    ),
    "bco_pair": ({}, [nls(0.5) + nls(1.0), nls(0.25) + nls(-1.0)]),
    # with 1/(2 beta) = 1: (1 - 1)^2 + (-2 + 1)^2; (0.5 - 1)^2 + (2 + 1)^2
    "sppo_hard": ({}, [1.0, 9.25]),
    # policy margins 4 and -6, the reference's 1 and -4.5 stand in the same order
    "aot": ({}, [nls(1.5), nls(-0.75)]),
    # chosen 1 and 0.5, rejected -2 and 2: the larger meets the larger, 1 - 2 and 0.5 + 2
    "aot_unpaired": ({}, [nls(-0.5), nls(1.25)]),
    "apo_zero": ({}, [1 - sigma(0.5) + sigma(-1.0), 1 - sigma(0.25) + sigma(1.0)]),
    "apo_down": ({}, [sigma(0.5) + 1 - sigma(1.5), sigma(0.25) + 1 - sigma(-0.75)]),
    # where m is sigma(z / 0.5)
    "discopop": (
        {"discopop_tau": 0.5},
        [
            (1 - sigma(3)) * nls(1.5) + sigma(3) * math.exp(-1.5),
            (1 - sigma(-1.5)) * nls(-0.75) + sigma(-1.5) * math.exp(0.75),
        ],
    ),
    # beta times means: 0.5 * (1/4 + 2/8), 0.5 * (0.5/1 - 2/2)
    "sigmoid_norm": ({}, [nls(0.25), nls(-0.25)]),
    # neither chosen answer fell: as sigmoid
    "dpop": ({}, [nls(1.5), nls(-0.75)]),
    # beta times means, less gamma: 0.5 * (-10/4 + 14/8) - 0.3, 0.5 * (-9/1 + 3/2) - 0.3
    "simpo": ({"simpo_gamma": 0.3}, [nls(-0.675), nls(-4.05)]),
    "orpo": (
        {},
        [2.5 + 0.5 * nls(math.log(odds(-2.5) / odds(-1.75))), 9 + 0.5 * nls(math.log(odds(-9.0) / odds(-1.5)))],
    ),
    # 0.5 * (-10 + 14), 0.5 * (-9 + 3); 2.5 and 9 nats a token
    "cpo": ({"cpo_weight": 2.0}, [nls(2.0) + 5.0, nls(-3.0) + 18.0]),
    # 10 + 9 nats over 4 + 1 tokens; each pair's part counts 2/5, so that their mean is 19/5
    "sft": ({}, [10 * 2 / 5, 9 * 2 / 5]),
    # f(s) = -exp(-s): D = -e^-1 + e^2; -e^-0.5 + e^-2
    "sigmoid, forward_kl": (
        {"f_divergence": "forward_kl"},
        [nls(0.5 * (math.exp(2) - math.exp(-1))), nls(0.5 * (math.exp(-2) - math.exp(-0.5)))],
    ),
    # f(s) = log sigma(s)
    "sigmoid, js": ({"f_divergence": "js"}, [nls(0.5 * (nls(-2) - nls(1))), nls(0.5 * (nls(2) - nls(0.5)))]),
    # f(s) = exp((0.5 - 1) s) / (0.5 - 1)
    "sigmoid, alpha": (
        {"f_divergence": "alpha", "f_alpha": 0.5},
        [nls(0.5 * -2 * (math.exp(-0.5) - math.exp(1))), nls(0.5 * -2 * (math.exp(-0.25) - math.exp(-1)))],
    ),
    "sigmoid, alpha 1": ({"f_divergence": "alpha", "f_alpha": 1.0}, [nls(1.5), nls(-0.75)]),
    # a quarter of every log-prob is tail, of which half is left: log-ratios times 7/8
    "sigmoid, ld": ({"ld_alpha": 0.5}, [nls(1.5 * 7 / 8), nls(-0.75 * 7 / 8)]),
    # (-10 + 10.1)/4 + (-14 + 14.14)/8 = 0.0425; (-9 + 9.09)/1 + (-3 + 3.03)/2 = 0.105
    "sigmoid, wpo": ({"weighting": "wpo"}, [math.exp(0.0425) * nls(1.5), math.exp(0.105) * nls(-0.75)]),
    # log-probs in place of log-ratios
    "sigmoid, reference_free": ({"reference_free": True}, [nls(2.0), nls(-3.0)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_worked_by_hand(name):
    options, expected = BY_HAND[name]
    loss = LossConfig(**{"type": name.split(",")[0], "beta": 0.5, **options})
    found = preference_loss(POLICY, None if loss.reference_free else REFERENCE, loss)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_every_loss_has_its_values():
    assert {name.split(",")[0] for name in BY_HAND} == set(LOSSES) == set(get_args(LossType))


def test_dpop_weighs_what_the_chosen_answer_fell():
    """s_w = -2, s_l = 1: 0.5 (-3 - 4 * 2)."""
    loss = LossConfig(type="dpop", beta=0.5, dpop_lambda=4.0)
    found = preference_loss(logps([[-12, -9]]), logps([[-10, -10]]), loss)
    np.testing.assert_allclose(found, [nls(-5.5)], rtol=1e-6)


def test_aot_compares_margins_of_one_rank():
    """Policy margins 5, -1, 2 and the reference's 0, 3, -4: ranks 2, 0, 1, so they meet 3, -4, 0."""
    policy, reference = logps([[5, 0], [-1, 0], [2, 0]]), logps([[0, 0], [3, 0], [-4, 0]])
    found = preference_loss(policy, reference, LossConfig(type="aot", beta=1.0))
    np.testing.assert_allclose(found, [nls(5 - 3), nls(-1 + 4), nls(2 - 0)], rtol=1e-6)


def test_several_losses_are_added_by_their_weights():
    mpo = CONFIGS["mpo"]
    parts = [weight * preference_loss(POLICY, REFERENCE, config_of(name)) for name, weight in mpo.terms]
    np.testing.assert_allclose(preference_loss(POLICY, REFERENCE, mpo), sum(parts), rtol=1e-6)
    rpo = LossConfig(types=("sigmoid", "sft"))
    assert rpo.terms == (("sigmoid", 1.0), ("sft", 1.0))


def test_what_the_log_probs_lack_is_named():
    bare = POLICY.replace(tail_sum=None, log_sum_sq=None)
    with pytest.raises(ValueError, match=r"loss\.ld_alpha: .* tail=True"):
        preference_loss(bare, REFERENCE, CONFIGS["ld"])
    with pytest.raises(ValueError, match=r"loss\.weighting wpo: .* squares=True"):
        preference_loss(bare, REFERENCE, CONFIGS["wpo"])


def test_without_a_reference_the_ratio_is_the_log_prob():
    for loss in CONFIGS.values():
        nothing = logps(np.zeros((2, 2)))
        np.testing.assert_array_equal(preference_loss(POLICY, None, loss), preference_loss(POLICY, nothing, loss))


def test_beta_scales_the_margin_of_the_sigmoid():
    """A larger beta asks for a smaller move: at the margin found by one beta, the loss of twice it is lower."""
    assert float(preference_loss(POLICY, REFERENCE, LossConfig(beta=1.0))[0]) == pytest.approx(
        math.log(1 + math.exp(-3.0)), rel=1e-6
    )


MIRRORED = {  # losses l(z) with l(z) - l(-z) = -slope * z, z = beta * (s_w - s_l): slope
    "sigmoid": 1.0,
    "cDPO": 1 - 2 * 0.2,
    "robust": 1.0,
    "robust, smoothed": 1 / (1 - 2 * 0.2),
    "alpha 1": 1.0,
}


@pytest.mark.parametrize("name", MIRRORED)
def test_swapped_answers_have_the_negative_margin(name):
    policy, reference = random_logps()
    margin = np.asarray((policy.sum - reference.sum) @ np.array([1.0, -1.0]), np.float64)
    found = preference_loss(swap(policy), swap(reference), CONFIGS[name])
    expected = preference_loss(policy, reference, CONFIGS[name]) + MIRRORED[name] * 0.3 * margin
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def swap(x: PairLogps) -> PairLogps:
    return jax.tree.map(lambda leaf: leaf[:, ::-1] if leaf.ndim == 2 else leaf, x)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "discopop"])  # has a bump near margin 0
def test_a_better_pair_costs_less(name):
    """Where the chosen answer gains what the rejected loses, the loss falls, and rises when they are swapped."""
    loss = CONFIGS[name]
    start = logps([[-20, -20]], [[4, 4]])
    better, worse = logps([[-19.9, -20.1]], [[4, 4]]), logps([[-20.1, -19.9]], [[4, 4]])
    if loss.weighting == "wpo":
        better, worse = (x.replace(log_sum_sq=start.log_sum_sq) for x in (better, worse))
    values = [float(preference_loss(x, start, loss)[0]) for x in (better, start, worse)]
    assert values == sorted(set(values))


def test_smoothing_has_its_minimum_where_the_label_is_as_sure_as_the_model():
    """d/dz vanishes at sigma(z) = 1 - e."""
    z = math.log((1 - SMOOTH.label_smoothing) / SMOOTH.label_smoothing)
    pair = logps(np.zeros((1, 2)))
    slope = jax.grad(lambda sums: preference_loss(pair.replace(sum=sums), None, SMOOTH).sum())
    np.testing.assert_allclose(slope(jnp.array([[z / SMOOTH.beta, 0.0]])), 0, atol=1e-7)
    assert slope(jnp.array([[0.0, 0.0]]))[0, 0] == pytest.approx(-SMOOTH.beta * (0.8 - 0.5), rel=1e-6)


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "wpo"])  # its weights are constants
def test_gradients_are_those_of_differences_in_float64(name):
    loss = CONFIGS[name]
    with jax.enable_x64(True):
        policy, reference = random_logps()
        sums = jnp.asarray(policy.sum, jnp.float64)
        fn = lambda sums: mean_loss(preference_loss(policy.replace(sum=sums), reference, loss), policy)  # noqa: E731
        assert fn(sums).dtype == jnp.float64
        check_grads(fn, (sums,), order=1, modes=["rev"], rtol=1e-5)


def test_wpo_weighs_the_gradient():
    policy, reference = random_logps()
    of = lambda sums, loss: preference_loss(policy.replace(sum=sums), reference, loss).sum()  # noqa: E731
    plain, weighed = (jax.grad(of)(policy.sum, CONFIGS[name]) for name in ("sigmoid", "wpo"))
    weight = np.exp(((policy.sum - policy.log_sum_sq) / policy.count).sum(1, keepdims=True))
    np.testing.assert_allclose(weighed, weight * plain, rtol=1e-5)


@each_loss
def test_no_gradient_reaches_the_reference(loss):
    policy, reference = random_logps()
    fn = lambda sums: preference_loss(policy, reference.replace(sum=sums), loss).sum()  # noqa: E731
    assert not np.any(jax.grad(fn)(reference.sum))


EXTREMES = np.array([[1e30, -1e30], [-1e30, 1e30], [-1e30, -1e30], [0, 0], [-1e30, 0], [0, -1e30]])


@each_loss
def test_extremes_are_finite(loss):
    """One-token answers at +-1e30 nats; squares leave float32 there, so ipo and sppo_hard are held at +-1e15."""
    sums = EXTREMES * (1e-15 if loss.type in ("ipo", "sppo_hard") else 1)
    for fixed in (sums, -sums, np.zeros_like(sums)):
        policy = logps(sums).replace(log_sum_sq=jnp.asarray(sums, jnp.float32))
        fn = lambda x, p=policy, fixed=fixed: preference_loss(p.replace(sum=x), logps(fixed), loss)  # noqa: E731
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
    run = jax.value_and_grad(total)
    value, slope = run(plain[0].sum, *plain)
    value_of_slots, slope_of_slots = run(filled[0].sum, *filled)
    np.testing.assert_allclose(value_of_slots, value, rtol=1e-6)
    np.testing.assert_allclose(slope_of_slots[:5], slope, rtol=1e-6)
    assert not np.any(slope_of_slots[5:])
    assert not np.any(preference_loss(*filled, loss)[5:])
    losses = np.asarray(preference_loss(*plain, loss), np.float64)
    np.testing.assert_allclose(value, (losses * weight).sum() / 5, rtol=1e-6)
    expected = preference_metrics(*plain, loss)
    for name, metric in preference_metrics(*filled, loss).items():
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
    assert np.allclose(alone, among, rtol=1e-6) == (not loss.coupled)


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
        "displacement": 1 / 3,
        "gradient_weight": (1 / (1 + math.exp(1.5)) + 1 / (1 + math.exp(-0.75)) + 0.5) / 3,
        "kl": (1 + 4 + 0.25 + 4 + 1 + 1) / 2 / 6,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-6), name
        assert found[name].dtype == jnp.float32
        assert found[name].shape == ()


def test_rewards_are_of_log_ratios_whatever_the_loss():
    found = [preference_metrics(POLICY, REFERENCE, config_of(name)) for name in LOSSES]
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


LN2 = math.log(2)
START = {  # beta 0.3
    "sigmoid": LN2, "hinge": 1.0, "ipo": 1 / (4 * 0.09), "exo_pair": -LN2 - math.log(0.9 * 0.1) / 2,
    "nca_pair": 2 * LN2, "robust": LN2, "bco_pair": 2 * LN2, "sppo_hard": 1 / (2 * 0.09), "aot": LN2,
    "aot_unpaired": LN2, "apo_zero": 1.0, "apo_down": 1.0, "discopop": (LN2 + 1) / 2, "sigmoid_norm": LN2, "dpop": LN2,
    "simpo": None, "orpo": None, "cpo": None, "sft": None, "wpo": None, "wpo, gradient": None, "mpo": None,
    "reference-free": None, "cDPO": LN2, "robust, smoothed": LN2, "aot, smoothed": LN2, "ipo of sums": 1 / (4 * 0.09),
    "forward_kl": LN2, "js": LN2, "alpha": LN2, "alpha 1": LN2, "hinge, js": 1.0, "ld": LN2,
}  # fmt: skip


def test_the_slope_at_the_start_is_the_steeper_side_of_a_kink():
    """Where the chosen answer falls, dpop's margin falls by 1 + lambda, by the rejected answer's rise by 1."""
    assert loss_at_start(LossConfig(type="dpop")).slope == pytest.approx(0.1 * (51 + 1) / 2, rel=1e-3)


@pytest.mark.parametrize("f_alpha", [1.0001, 1.00001, 1.000002, 0.99999])
def test_alpha_near_1_is_the_reverse_kl(f_alpha):
    policy, reference = logps([[-10, -10.2]]), logps([[-10, -10]])
    near, plain = (preference_loss(policy, reference, LossConfig(f_divergence="alpha", f_alpha=f, beta=1.0))
                   for f in (f_alpha, 1.0))  # fmt: skip
    np.testing.assert_allclose(near, plain, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_at_the_start(name):
    loss, expected = CONFIGS[name], START[name]
    start = loss_at_start(loss)
    if expected is None:
        assert start is None
        return
    assert start.loss == pytest.approx(expected, rel=1e-6)
    policy, _ = random_logps()
    np.testing.assert_allclose(preference_loss(policy, policy, loss), expected, rtol=1e-6)
    moved = policy.replace(sum=policy.sum + jnp.array([1e-3, -1e-3]), tail_sum=policy.tail_sum)
    assert abs(float(preference_loss(moved, policy, loss)[0]) - expected) <= 1.02e-3 * start.slope


def swapped(sides: PairLogps) -> PairLogps:
    """The same pairs with chosen and rejected swapped."""
    names = ("sum", "count", "tail_sum", "log_sum_sq")
    return sides.replace(**{name: getattr(sides, name)[:, ::-1] for name in names})


def test_the_gradient_weight_of_a_labeled_pair_is_that_of_its_loss():
    """|q - sigma(margin)|, the gradient of q L(y_w, y_l) + (1-q) L(y_l, y_w) with respect to the reward margin."""
    policy, reference = random_logps()
    loss, label = LossConfig(beta=0.3), jnp.linspace(0.0, 1.0, len(policy.sum))

    def labeled_loss(shift):
        moved = policy.replace(sum=policy.sum.at[:, 0].add(shift / loss.beta), label=label)
        return preference_loss(moved, reference, loss).sum()

    weights = jnp.abs(jax.grad(labeled_loss)(jnp.zeros(len(label)))) * policy.valid
    actual = preference_metrics(policy.replace(label=label), reference, loss)["gradient_weight"]
    np.testing.assert_allclose(actual, weights.sum() / policy.valid.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, loss in CONFIGS.items() if not loss.coupled])
def test_a_label_mixes_the_losses_of_both_orders(name):
    policy, reference = random_logps()
    label = jnp.linspace(0.0, 1.0, len(policy.sum))
    actual = preference_loss(policy.replace(label=label), reference, CONFIGS[name])
    given = preference_loss(policy, reference, CONFIGS[name])
    other = preference_loss(swapped(policy), swapped(reference), CONFIGS[name])
    np.testing.assert_allclose(actual, label * given + (1 - label) * other, rtol=1e-5, atol=1e-6)
