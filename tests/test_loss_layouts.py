"""Every loss and modifier under every layout: the same loss and the same gradient of all weights.

A loss sees log-probs of pairs only, so a layout is compiled once, as a function that pulls a gradient with respect to
these back to the weights, and serves all losses.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import logps_fn, pack, random_pairs, small_model, small_params
from test_losses import CONFIGS as EVERY
from test_losses import config_of

from dpo_jax.batch import pad_pairs
from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.config import MeshConfig
from dpo_jax.logprobs import make_padded_logps_fn
from dpo_jax.losses import mean_loss, preference_loss
from dpo_jax.models.decoder import plain_batch
from dpo_jax.parallel.sharding import make_mesh, replicated, row_devices
from dpo_jax.step import Frozen, _sums, init_state, pair_gradient, train_step
from dpo_jax.weights.open import param_shardings

# Short answers: a unit in the last place of a log-prob of 350 nats, times beta, is more than the tolerance by itself.
PAIRS = [(prompt, (chosen[:9], rejected[:14]), None) for prompt, (chosen, rejected), _ in random_pairs()]
# At its default temperature, discopop turns a difference of one nat into twenty.
CONFIGS = EVERY | {"discopop": config_of("discopop", discopop_tau=0.5)}
WANTED = {"tail": True, "squares": True}


@cache
def reference_params():
    """A model near the policy, so that no log-ratio is beyond what training sees."""
    return jax.tree.map(lambda x, y: 0.97 * x + 0.03 * y, small_params(0), small_params(1))


def apply(params, tokens):
    """The small model as a function from tokens to next-token scores."""
    model = small_model(attention="xla")
    hidden = model.hidden(params, plain_batch(tokens, jnp.full(len(tokens), tokens.shape[1])))
    return hidden @ model.unembedding(params).T


def padded_arrays():
    prompts, answers, _ = zip(*PAIRS, strict=True)
    chosen, rejected = zip(*answers, strict=True)
    return pad_pairs([list(x) for x in prompts], [list(x) for x in chosen], [list(x) for x in rejected])


LAYOUTS = {
    "oracle": (partial(logps_fn, small_model(attention="xla"), chunk=4096), lambda: pack(PAIRS, layout="padded"), None),
    "shared": (logps_fn, lambda: pack(PAIRS), None),
    "padded": (logps_fn, lambda: pack(PAIRS, layout="padded"), None),
    "padded arrays, full scores": (partial(make_padded_logps_fn, apply), padded_arrays, None),
    "eight devices": (logps_fn, None, MeshConfig(fsdp=4, tensor=2)),
}


@cache
def computed(layout: str):
    """(policy's log-probs, the reference's, pull-back from the policy's sums to the weights)."""
    make, make_batch, mesh_config = LAYOUTS[layout]
    fn = make(**WANTED)
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices() if mesh_config else jax.devices()[:1])
    with jax.set_mesh(mesh):
        params, reference = small_params(), reference_params()
        if mesh_config is None:
            batch = jax.tree.map(jnp.asarray, make_batch())
        else:
            params, reference = (jax.device_put(x, param_shardings(small_model(), mesh)) for x in (params, reference))
            batch = make_to_devices(mesh)(pack(PAIRS, rows=row_devices(mesh)))
        forward = jax.jit(fn, out_shardings=replicated(mesh))
        pull = jax.jit(lambda params, cotangent: jax.vjp(lambda p: _sums(fn(p, batch)), params)[1](cotangent)[0])
        policy, fixed = jax.device_get((forward(params, batch), forward(reference, batch)))

    def pulled(cotangent):
        with jax.set_mesh(mesh):
            return jax.device_get(pull(params, jax.device_put(cotangent, replicated(mesh))))

    return policy, fixed, pulled


def gradient(policy, fixed, pulled, loss):
    """Loss and gradient of all weights."""

    def value_of(sums):
        here = policy.replace(**sums)
        return mean_loss(preference_loss(here, fixed, loss), here)

    value, cotangent = jax.value_and_grad(value_of)(jax.tree.map(jnp.asarray, _sums(policy)))
    return float(value), pulled(jax.device_get(cotangent))


@cache
def oracle(name: str):
    return gradient(*computed("oracle"), CONFIGS[name])


QUICK = {"sigmoid", "mpo"}  # the others run with -m slow
each_loss = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)


def assert_equal(found, expected):
    (value, grads), (value_0, grads_0) = found, expected
    assert abs(value - value_0) <= 2e-5 * max(1, abs(value_0))
    change = optax.tree.norm(jax.tree.map(jnp.subtract, grads, grads_0)) / optax.tree.norm(grads_0)
    assert float(change) <= 2e-5


# Meshes compute the same sums, as test_meshes_agree of test_layout.py has it, and a loss sees no more than these.
each_layout = pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow) if name == "eight devices" else name for name in LAYOUTS][1:],
)


@each_layout
def test_log_probs_agree(layout):
    found, expected = computed(layout)[0], computed("oracle")[0]
    for key, values in _sums(expected).items():
        np.testing.assert_allclose(_sums(found)[key], values, rtol=2e-6, atol=1e-5, err_msg=key)
    assert np.abs(expected.tail_sum).max() > 1


@each_layout
@each_loss
def test_losses_agree(name, layout):
    assert_equal(gradient(*computed(layout), CONFIGS[name]), oracle(name))


@each_loss
def test_a_cached_reference_is_the_live_one(name):
    """Its log-probs were made by another layout's program."""
    policy, _, pulled = computed("shared")
    assert_equal(gradient(policy, computed("padded")[1], pulled, CONFIGS[name]), oracle(name))


# Slow: one of each way that a step has: without a reference, pairs compared with pairs, one length, weights.
ACCUMULATED = {"mpo": (), **dict.fromkeys(("aot", "simpo", "ld", "wpo, gradient"), pytest.mark.slow)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=ACCUMULATED.get(name, pytest.mark.weekly)) for name in CONFIGS]
)
def test_accumulated_is_the_whole(name):
    loss = CONFIGS[name]
    fn = logps_fn(**WANTED)
    reference = None if loss.reference_free else reference_params()
    gradient_of = partial(pair_gradient, logps_fn=fn, loss=loss, accumulation=2)
    batch = pack(PAIRS, accumulation=2)
    grads, policy, fixed = jax.jit(gradient_of)(small_params(), Frozen(reference=reference), batch)
    value = float(mean_loss(preference_loss(policy, fixed, loss), policy))
    assert_equal((value, jax.device_get(grads)), oracle(name))


@pytest.mark.parametrize(
    ("accumulation", "kind"),
    [
        (2, "run"),
        *(pytest.param(*row, marks=pytest.mark.slow)
          for row in ((1, "run"), (1, "cached"), (2, "cached"), (1, "not needed"), (2, "not needed"))),
    ],
)  # fmt: skip
def test_adapters_beside_a_frozen_base(kind, accumulation):
    """The simplest adapter, a difference of weights: base + 0 is the base, and its gradient that of the weights."""
    loss = CONFIGS["simpo" if kind == "not needed" else "sigmoid"]
    plain = logps_fn(**WANTED)

    def fn(weights, batch):
        base, difference = weights.base, weights.adapters
        return plain(base if difference is None else jax.tree.map(jnp.add, base, difference), batch)

    base, batch = reference_params(), pack(PAIRS, accumulation=accumulation)
    difference = jax.tree.map(jnp.subtract, small_params(), base)
    cached = None
    if kind == "cached":
        cached = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), computed("shared")[1])
        cached = cached if accumulation > 1 else jax.tree.map(lambda x: x[0], cached)
    optimizer = optax.sgd(1.0)
    step = jax.jit(partial(train_step, logps_fn=fn, loss=loss, optimizer=optimizer, accumulation=accumulation))
    after, metrics = step(init_state(difference, optimizer), Frozen(base, cached), batch)
    grads = jax.tree.map(jnp.subtract, difference, after.params)
    assert_equal((float(metrics["loss"]), grads), oracle("simpo" if kind == "not needed" else "sigmoid"))
    assert ("kl" in metrics) == (kind != "not needed")
