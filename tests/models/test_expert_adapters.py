"""Training the adapters of experts: a step alone and on a mesh, merged weights, and what the compiled program holds."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_models import save_hf_model
from parity import router_gap
from small import pack

from dpo_jax.batch import Adapted
from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.config import LoraConfig, LossConfig, MeshConfig
from dpo_jax.logprobs import make_logps_fn
from dpo_jax.losses import mean_loss, preference_loss
from dpo_jax.models.adapters import make_lora, merge
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.parallel.sharding import make_mesh, replicated
from dpo_jax.step import Frozen, init_state, make_train_step, state_shardings
from dpo_jax.weights.hub import read_hf_config
from dpo_jax.weights.huggingface import load_params
from dpo_jax.weights.open import param_shardings, trained_shardings

pytestmark = pytest.mark.usefixtures("torch")
LOSS = LossConfig(beta=0.3)
LORA = LoraConfig(rank=4, alpha=2.0, targets=("*", "mlp.experts.*"))


def pairs() -> list:
    draw = np.random.default_rng(3)
    ids = lambda n: draw.integers(1, 125, n).astype(np.int32)  # noqa: E731
    return [(ids(p), (ids(c), ids(r)), None) for p, c, r in [(30, 9, 5), (1, 1, 12), (12, 20, 20), (45, 3, 8)] * 2]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @cache
    def load(name: str):
        """Return the model with adapters, host weights, and random host adapters, small ones: they route as nothing."""
        folder = tmp_path_factory.mktemp(name)
        theirs = save_hf_model(name, folder)
        sequences = [np.concatenate([p, a])[None] for p, answers, _ in pairs() for a in answers]
        assert min(router_gap(theirs, x) for x in sequences) > 1e-3
        config = decoder_config(read_hf_config(folder))
        model = Model(config=config, lora=make_lora(LORA, config))
        params = jax.tree.map(np.array, load_params(folder, model, shardings=None, dtype="float32"))
        draw = np.random.default_rng(3)
        adapters = jax.tree.map(lambda x: draw.normal(0, 0.02, x.shape).astype(np.float32), model.adapter_shapes())
        return model, params, adapters

    return load


def logps_fn(model: Model):
    return make_logps_fn(model.hidden, model.unembedding, chunk=64)


def one_step(model, params, adapters, mesh, batch):
    """(log-probs [B, K], loss, gradient of the adapters), through a step of plain gradient descent."""
    optimizer = optax.sgd(1.0)
    with jax.set_mesh(mesh):
        shardings = trained_shardings(model, mesh)
        on_mesh, base = jax.device_put(adapters, shardings), jax.device_put(params, param_shardings(model, mesh))
        batch = make_to_devices(mesh)(batch)
        abstract = jax.eval_shape(lambda params: init_state(params, optimizer), on_mesh)
        state = state_shardings(abstract, shardings, replicated(mesh), optimizer)
        step = make_train_step(logps_fn=logps_fn(model), loss=LOSS, optimizer=optimizer, accumulation=1,
                               shardings=state, metrics_sharding=replicated(mesh))  # fmt: skip
        sums = jax.jit(logps_fn(model), out_shardings=replicated(mesh))(Adapted(on_mesh, base), batch).sum
        after, metrics = step(init_state(on_mesh, optimizer), Frozen(base), batch)
    jax.tree.map(np.testing.assert_array_equal, base, params)  # nothing but adapters has moved
    return sums, metrics["loss"], jax.tree.map(lambda before, now: before - np.asarray(now), adapters, after.params)


def by_merging(model, params, adapters, batch):
    """The same by the chain rule through merged weights."""
    fn, base = logps_fn(model), jax.tree.map(jnp.asarray, params)

    def objective(adapters):
        policy = fn(merge(Adapted(adapters, base), model), batch)
        return mean_loss(preference_loss(policy, fn(base, batch), LOSS), policy), policy.sum

    (value, sums), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(adapters)
    return sums, value, grads


def assert_equal(actual, expected):
    (sums, value, grads), (sums_0, value_0, grads_0) = jax.device_get((actual, expected))
    np.testing.assert_allclose(sums, sums_0, rtol=2e-6)
    assert abs(value - value_0) <= 2e-5
    for name, pair in grads_0["layers"].items():
        for factor, expected_grad in pair.items():
            norm = np.linalg.norm(expected_grad)
            assert norm > 1e-3
            assert np.linalg.norm(grads["layers"][name][factor] - expected_grad) <= 3e-5 * norm, (name, factor)


@pytest.mark.parametrize(
    "name",
    [pytest.param("qwen3_moe", marks=pytest.mark.slow), pytest.param("gpt_oss", marks=pytest.mark.weekly)],
)
def test_a_step_on_a_mesh_and_alone_is_that_of_merged_weights(load, name):
    model, params, adapters = load(name)
    expected = by_merging(model, params, adapters, pack(pairs()))
    alone = partial(one_step, model, params, adapters)
    assert_equal(alone(make_mesh(MeshConfig(), jax.devices()[:1]), pack(pairs())), expected)
    assert_equal(alone(make_mesh(MeshConfig(expert=2, tensor=2)), pack(pairs(), rows=4)), expected)
