"""Layout changes nothing: the same pairs at equal weights, however they are laid out and computed."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import logps_fn, pack, random_pairs, small_model, small_params

from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.config import LossConfig, MeshConfig
from dpo_jax.errors import UserError
from dpo_jax.losses import mean_loss, preference_loss
from dpo_jax.models.options import LayerKind
from dpo_jax.parallel.sharding import make_mesh, replicated, row_devices
from dpo_jax.step import Frozen, init_state, pair_gradient, state_shardings, train_step
from dpo_jax.weights.open import param_shardings

PAIRS = random_pairs()
LOSS = LossConfig(beta=0.3)


def gradient(model, batch, reference=None, chunk=64, accumulation=1, loss=LOSS):
    """(log-probs [B, K], loss, gradient) with another model's weights as the reference."""
    fn = logps_fn(model, chunk=chunk)
    params, other = (small_params(seed, model.config.kv_heads) for seed in (0, 1))
    reference = other if reference is None else reference
    if accumulation > 1:
        gradient_of = jax.jit(partial(pair_gradient, logps_fn=fn, loss=loss, accumulation=accumulation))
        grads, policy, fixed = gradient_of(params, Frozen(reference=reference), batch)
        return policy.sum, mean_loss(preference_loss(policy, fixed, loss), policy), grads

    def objective(params, reference, batch):
        policy = fn(params, batch)
        fixed = reference if not isinstance(reference, dict) else fn(reference, batch)
        return mean_loss(preference_loss(policy, fixed, loss), policy), policy.sum

    (value, sums), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params, reference, batch)
    return sums, value, grads


@cache
def oracle(loss=LOSS):
    """Every sequence alone in its row, under a dense mask, scores of all targets at once."""
    return gradient(small_model(attention="xla"), pack(PAIRS, layout="padded"), chunk=4096, loss=loss)


def assert_equal(found, expected):
    (sums, value, grads), (sums_0, value_0, grads_0) = jax.device_get((found, expected))
    np.testing.assert_allclose(sums, sums_0, rtol=2e-6)
    assert abs(value - value_0) <= 2e-5
    change = optax.tree.norm(jax.tree.map(jnp.subtract, grads, grads_0)) / optax.tree.norm(grads_0)
    assert float(change) <= 2e-5


LAYOUTS = {
    "shared in one row": ({}, {}),
    "shared in three rows": ({}, {"rows": 3}),
    "shared in short rows": ({}, {"row_length": 192}),
    "repeated": ({}, {"layout": "repeated", "rows": 2}),
    "padded, blocks": ({}, {"layout": "padded"}),
    "shared, dense mask": ({"attention": "xla"}, {}),
    "full remat": ({"remat": "full"}, {}),
    "dots kept, unrolled": ({"remat": "dots", "scan": False}, {}),
}


# Compared by default with the same oracle elsewhere: rows of several devices by test_meshes_agree, padded rows by
# test_loss_layouts.py, and the dense mask by the oracle itself.
RARER = {"shared in three rows", "shared in short rows", "padded, blocks", "shared, dense mask", "full remat",
         "dots kept, unrolled"}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in RARER else name for name in LAYOUTS]
)
def test_layouts_agree(name):
    model, packing = LAYOUTS[name]
    assert_equal(gradient(small_model(**model), pack(PAIRS, **packing)), oracle())


@pytest.mark.parametrize("chunk", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_chunks_agree(chunk):
    assert_equal(gradient(small_model(), pack(PAIRS), chunk=chunk), oracle())


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        pytest.param(LOSS, 2, marks=pytest.mark.slow),  # by default a step of adapters in test_loss_layouts.py
        pytest.param(LOSS, 4, marks=pytest.mark.slow),
        pytest.param(LossConfig(type="sft"), 4, marks=pytest.mark.slow),
    ],
    ids=["with a reference-2", "with a reference-4", "without-4"],
)
def test_accumulated_is_the_whole(loss, parts):
    found = gradient(small_model(), pack(PAIRS, accumulation=parts), accumulation=parts, loss=loss)
    assert_equal(found, oracle(loss))


def test_cached_reference_is_the_live_one():
    fixed = jax.jit(logps_fn())(small_params(1), pack(PAIRS, layout="repeated"))
    assert_equal(gradient(small_model(), pack(PAIRS), reference=fixed), oracle())


def test_empty_slots_change_nothing():
    sums, value, grads = gradient(small_model(), pack(PAIRS + random_pairs(4, seed=5), valid=8))
    assert_equal((sums[:8], value, grads), oracle())
    assert not np.any(sums[8:])


MESHES = [
    MeshConfig(data=2, fsdp=2, tensor=2),
    pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=4, tensor=2), marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=1, tensor=8), marks=pytest.mark.slow),
]


def mesh_gradient(model, mesh):
    """As ``gradient``, of a train step on a mesh; where the weights lie is checked on the way."""
    optimizer = optax.sgd(1.0)
    start, other = (small_params(seed, model.config.kv_heads) for seed in (0, 1))
    with jax.set_mesh(mesh):
        own = param_shardings(model, mesh)
        params, reference = (jax.device_put(weights, own) for weights in (start, other))
        abstract = jax.eval_shape(lambda params: init_state(params, optimizer), params)
        shardings = state_shardings(abstract, own, replicated(mesh), optimizer)
        batch = make_to_devices(mesh)(pack(PAIRS, rows=row_devices(mesh)))

        def step(state, reference, batch):
            return train_step(state, reference, batch, logps_fn=logps_fn(model), loss=LOSS, optimizer=optimizer)

        state = init_state(params, optimizer)
        after, metrics = jax.jit(step, out_shardings=(shardings, replicated(mesh)))(state, reference, batch)
        sums = jax.jit(logps_fn(model), out_shardings=replicated(mesh))(params, batch).sum
    for leaf, wanted in zip(jax.tree.leaves(after.params), jax.tree.leaves(own), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    return sums, metrics["loss"], jax.tree.map(lambda before, now: before - np.asarray(now), start, after.params)


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("order", ["as they come", pytest.param("permuted", marks=pytest.mark.slow)])
def test_meshes_agree(config, order):
    devices = np.array(jax.devices())
    mesh = make_mesh(config, list(devices if order == "as they come" else devices[[5, 2, 7, 0, 3, 6, 1, 4]]))
    assert_equal(mesh_gradient(small_model(), mesh), oracle())


FEW_HEADS, FEW_HEADS_MESH = small_model(kv_heads=2), MeshConfig(fsdp=2, tensor=4)


def test_key_heads_that_tensor_does_not_divide_are_held_whole():
    layers = param_shardings(FEW_HEADS, make_mesh(FEW_HEADS_MESH))["layers"]
    assert ["tensor" in layers[name].spec for name in ("query", "key", "value")] == [True, False, False]


@pytest.mark.slow
def test_key_heads_that_are_held_whole_change_nothing():
    found = mesh_gradient(FEW_HEADS, make_mesh(FEW_HEADS_MESH))
    assert_equal(found, gradient(FEW_HEADS, pack(PAIRS)))


def test_a_size_that_tensor_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"^mesh.tensor: 3 cannot be used: use a divisor of 160, the vocab size of "):
        param_shardings(small_model(), make_mesh(MeshConfig(fsdp=2, tensor=3), jax.devices()[:6]))


def test_windows_count_positions_not_places():
    """A window of 40 positions: what an answer sees does not depend on where its prompt lies in the row."""
    windowed = lambda model: replace(model, config=replace(model.config, pattern=(LayerKind(window=40),)))  # noqa: E731
    alone = jax.jit(logps_fn(windowed(small_model(attention="xla"))))(small_params(), pack(PAIRS, layout="padded"))
    shared = jax.jit(logps_fn(windowed(small_model())))(small_params(), pack(PAIRS))
    np.testing.assert_allclose(shared.sum, alone.sum, rtol=2e-6)
    assert np.abs(alone.sum - oracle()[0]).max() > 1e-2  # the window does something
