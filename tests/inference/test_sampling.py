"""Draws against exact next-token probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.errors import UserError
from dpo_jax.inference.sampling import cut, row_keys, sample

DRAWS, VOCAB = 20_000, 64


def exact(logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Probabilities by definition, in float64."""
    probs = np.exp(logits / temperature - (logits / temperature).max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    kept = np.cumsum(probs[order]) - probs[order] < top_p
    probs[order[~kept]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.5},
                {"temperature": 1.3, "top_k": 10, "top_p": 0.9}], ids=str,
)  # fmt: skip
def test_draws_have_the_exact_probabilities(options):
    logits = np.random.default_rng(0).normal(0, 1.5, VOCAB)
    expected = exact(logits, **options)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, VOCAB))
    tokens = jax.jit(sample, static_argnums=3)(rows, row_keys(3, 0, jnp.arange(DRAWS)), 5, SamplingConfig(**options))
    actual = np.bincount(tokens, minlength=VOCAB) / DRAWS
    assert not actual[expected == 0].any()
    # a count's mean absolute deviation is that of a normal distribution: sqrt(2 / pi) sigma
    noise = np.sqrt(2 / np.pi) * np.sqrt(expected * (1 - expected) / DRAWS).sum() / 2
    assert np.abs(actual - expected).sum() / 2 < 1.15 * noise


def test_temperature_0_takes_the_most_likely_token():
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 9, (5, VOCAB)), jnp.float32)  # of several, the first
    options = SamplingConfig(temperature=0)
    np.testing.assert_array_equal(sample(logits, row_keys(0, 0, jnp.arange(5)), 0, options), logits.argmax(-1))


def test_the_nucleus_is_the_smallest_set_with_its_mass():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    finite = lambda **options: np.isfinite(cut(logits, SamplingConfig(**options)))[0].tolist()  # noqa: E731
    assert finite(top_p=0.5) == [True, False, False, False]
    assert finite(top_p=0.51) == [True, True, False, False]
    assert finite(top_k=3) == [True, True, True, False]
    assert finite(top_k=3, top_p=0.85) == [True, True, True, False]  # 0.842 without the third
    assert finite(top_k=100) == [True] * 4


@pytest.mark.parametrize("option", ["top_k", "top_p"])
def test_cuts_are_refused_where_nothing_is_sampled(option):
    with pytest.raises(UserError, match=f"sampling.{option}: .*at temperature 0 nothing is sampled"):
        SamplingConfig(temperature=0, **{option: 0.5 if option == "top_p" else 5})
