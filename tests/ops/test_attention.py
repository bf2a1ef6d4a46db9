"""Both attentions against the rule token by token in float64: grouped heads, windows, soft caps, padding, gradients."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from small import pack, random_pairs

from dpo_jax.models.decoder import REMAT
from dpo_jax.ops import blocks
from dpo_jax.ops.attention import attend, make_inputs

HEAD = 8
BATCH = pack(random_pairs(5), rows=2)
PADDING = BATCH.segments == 0
CASES = {
    "plain": (4, 4, {}),
    "grouped": (4, 2, {}),
    "one key head, window": (4, 1, {"window": 23}),
    "grouped, soft cap, window": (4, 2, {"softcap": 2.0, "window": 70}),
}


def random_inputs(num_heads, num_kv_heads, seed=0):
    draw = np.random.Generator(np.random.Philox(seed))
    make = lambda n: draw.normal(0, 1, (*BATCH.tokens.shape, n, HEAD)).astype(np.float32)  # noqa: E731
    return make(num_heads), make(num_kv_heads), make(num_kv_heads)


def attention(implementation, **options):
    """``attend`` of the batch as a function of q, k and v."""
    inputs = make_inputs(BATCH, implementation)
    return partial(attend, inputs=inputs, implementation=implementation, longest=BATCH.longest, **options)


def oracle(q, k, v, window=None, softcap=None):
    """softmax(q . k / sqrt(H)) v over what each token sees, by places in the row."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for row in range(len(q)):
        for place in np.flatnonzero(~PADDING[row]):
            at = lambda grid, row=row, place=place: (grid[row], grid[row, place])  # noqa: E731
            (segments, segment), (branches, branch), (positions, position) = map(
                at, (BATCH.segments, BATCH.branches, BATCH.positions)
            )
            seen = (segments == segment) & (np.arange(len(segments)) <= place)
            seen &= (branches == 0) | (branches == branch)
            if window is not None:
                seen &= positions > position - window
            for head in range(q.shape[2]):
                scores = k[row, seen, head // group] @ q[row, place, head] / np.sqrt(HEAD)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[row, place, head] = weights @ v[row, seen, head // group] / weights.sum()
    return out


@cache
def computed(name, implementation):
    """Attention and the gradients of a random weighting of it, padding's included."""
    num_heads, num_kv_heads, options = CASES[name]
    inputs = random_inputs(num_heads, num_kv_heads)
    weighting = np.random.Generator(np.random.Philox(9)).normal(0, 1, inputs[0].shape).astype(np.float32)
    fn = attention(implementation, scale=HEAD**-0.5, **options)

    def weighted(q, k, v):
        out = fn(q, k, v)
        return (out * weighting).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return jax.device_get((out, grads))


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_rule(name, implementation):
    num_heads, num_kv_heads, options = CASES[name]
    out, _ = computed(name, implementation)
    np.testing.assert_allclose(out, oracle(*random_inputs(num_heads, num_kv_heads), **options), atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_blocks_are_those_of_the_dense_mask(name):
    _, found = computed(name, "blocks")
    _, expected = computed(name, "xla")
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
        assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_pairs_all_at_once_are_those_of_the_loop(name, monkeypatch):
    """As on GPUs; a CPU visits one pair after another."""
    monkeypatch.setattr(blocks, "_fold_each", blocks._fold_all)
    (out, grads), (expected_out, expected) = computed.__wrapped__(name, "blocks"), computed(name, "xla")
    for ours, theirs in zip((out, *grads), (expected_out, *expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("implementation", ["xla", "blocks"])
def test_padding_yields_nothing_and_gets_nothing(implementation):
    assert PADDING.any(axis=1).all()  # every row has some
    for name in CASES:
        out, grads = computed(name, implementation)
        for array in (out, *grads):
            assert not np.any(array[PADDING])


def test_bfloat16_sums_over_blocks_as_closely_as_over_the_row():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in random_inputs(4, 2)]
    exact = oracle(*map(np.asarray, inputs))
    error = {}
    for implementation in ("xla", "blocks"):
        fn = attention(implementation, scale=HEAD**-0.5)
        out = jax.jit(fn)(*inputs)
        assert out.dtype == jnp.bfloat16
        error[implementation] = np.abs(np.asarray(out, np.float64) - exact).mean()
    assert error["blocks"] < 1.1 * error["xla"]


def test_extreme_scores_stay_finite():
    for implementation in ("xla", "blocks"):
        fn = attention(implementation, scale=1e6)
        grads = jax.jit(jax.grad(lambda *x, fn=fn: (fn(*x) ** 2).sum(), argnums=(0, 1, 2)))(*random_inputs(4, 4))
        assert all(np.isfinite(grad).all() for grad in grads)


def num_loops(jaxpr) -> int:
    """The loops of data-dependent length in a program, in whatever they are nested."""
    nested = (inner for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))
    return sum(eqn.primitive.name == "while" for eqn in jaxpr.eqns) + sum(map(num_loops, nested))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_rematerialized_layer_does_not_attend_again(remat):
    """A loop in the forward pass, and one in the backward pass."""
    layer = jax.checkpoint(attention("blocks", scale=1.0), policy=REMAT[remat])
    gradient = jax.grad(lambda *inputs: layer(*inputs).sum(), argnums=(0, 1, 2))
    assert num_loops(jax.make_jaxpr(gradient)(*random_inputs(4, 4)).jaxpr) == 2
