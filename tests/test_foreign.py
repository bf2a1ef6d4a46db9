"""The step drives models that this program knows nothing of: two plain functions, and a Flax NNX module."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_model import Recurrent
from plain_model import VOCABULARY, WIDTH, init, plain_logps_fn, random_batch

from dpo_jax import make_train_step
from dpo_jax.config import LossConfig
from dpo_jax.logprobs import make_padded_logps_fn
from dpo_jax.step import init_state


def plain():
    return init(), plain_logps_fn


def recurrent():
    return Recurrent(VOCABULARY, WIDTH, nnx.Rngs(0))


def of_nnx():
    graph, params = nnx.split(recurrent(), nnx.Param)
    return params, make_padded_logps_fn(lambda params, tokens: nnx.merge(graph, params)(tokens))


@pytest.mark.parametrize("model", [plain, of_nnx])
def test_preferences_are_learned_from_ln_2(model):
    params, logps_fn = model()
    reference = jax.tree.map(jnp.copy, params)
    optimizer = optax.adam(0.01)
    step = make_train_step(logps_fn=logps_fn, loss=LossConfig(beta=0.5), optimizer=optimizer)
    state, batch = init_state(params, optimizer), random_batch(6)
    losses = []
    for _ in range(12):
        state, metrics = step(state, reference, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=3e-6)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.75 * losses[0]
    assert type(state.params) is type(params)
    assert metrics["rewards/margins"] > 0


def test_a_trained_nnx_model_is_put_together_again():
    params, logps_fn = of_nnx()
    model = recurrent()
    optimizer = optax.sgd(0.5)
    step = make_train_step(logps_fn=logps_fn, loss=LossConfig(type="sft"), optimizer=optimizer)
    batch = random_batch(3)
    state, _ = step(init_state(params, optimizer), None, batch)
    nnx.update(model, state.params)
    tokens = jnp.asarray(batch.tokens[:, 0])
    graph, fresh = nnx.split(recurrent(), nnx.Param)
    np.testing.assert_array_equal(model(tokens), nnx.merge(graph, state.params)(tokens))
    assert np.abs(model(tokens) - nnx.merge(graph, fresh)(tokens)).max() > 0.01
