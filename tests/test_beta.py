"""What beta does, where it can be computed: DPO finds pi* = ref exp(r / beta) / Z; a larger beta stays closer to ref.

Four prompts with five answers of one token each, a table as the model, and preferences drawn by Bradley and Terry's
rule from known rewards. Rafailov et al. 2023, arXiv 2305.18290, eq. 4 and 6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import make_train_step
from dpo_jax.batch import pad_pairs
from dpo_jax.config import LossConfig
from dpo_jax.logprobs import make_padded_logps_fn
from dpo_jax.step import init_state

PROMPTS, ANSWERS, DRAWS = 4, 5, 4_000_000
DRAW = np.random.Generator(np.random.Philox(0))
REWARDS = DRAW.normal(size=(PROMPTS, ANSWERS))
REFERENCE = DRAW.normal(size=(PROMPTS, ANSWERS))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def apply(params, tokens):
    """Scores of the answers, tokens 0 to 4, after each prompt, tokens 5 to 8; nothing else can be said."""
    return params["table"][jnp.maximum(tokens - ANSWERS, 0)]


def kl(policy, reference):
    return (policy * np.log(policy / reference)).sum(-1).mean()


@pytest.fixture(scope="module")
def batch():
    """Every ordered pair of answers, weighed by how often the first was preferred in the draws."""
    pairs = [(x, won, lost) for x in range(PROMPTS) for won in range(ANSWERS) for lost in range(ANSWERS) if won != lost]
    x, won, lost = np.array(pairs).T
    preferred = 1 / (1 + np.exp(REWARDS[x, lost] - REWARDS[x, won]))
    counts = DRAW.multinomial(DRAWS, preferred / preferred.sum())
    made = pad_pairs([[ANSWERS + i] for i in x], [[i] for i in won], [[i] for i in lost])
    return made.replace(weight=(counts / counts.mean()).astype(np.float32))


@pytest.fixture(scope="module")
def learned(batch):
    """By beta: the policy [prompt, answer] after training."""
    policies = {}
    for beta in (0.5, 1.0, 2.0):
        optimizer = optax.adam(optax.exponential_decay(0.05, 300, 0.1))
        step = make_train_step(logps_fn=make_padded_logps_fn(apply), loss=LossConfig(beta=beta), optimizer=optimizer)
        reference = {"table": jnp.asarray(REFERENCE, jnp.float32)}
        state = init_state(jax.tree.map(jnp.copy, reference), optimizer)
        for _ in range(900):
            state, _ = step(state, reference, batch)
        policies[beta] = softmax(np.asarray(state.params["table"], np.float64))
    return policies


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_training_reaches_the_closed_form_optimum(learned, beta):
    optimum = softmax(REFERENCE + REWARDS / beta)
    distance = 0.5 * np.abs(learned[beta] - optimum).sum(-1).max()  # total variation
    assert distance < 1e-2
    assert 0.5 * np.abs(softmax(REFERENCE) - optimum).sum(-1).min() > 5e-2  # it had somewhere to go


def test_a_larger_beta_stays_closer_to_the_reference(learned):
    distances = [kl(learned[beta], softmax(REFERENCE)) for beta in (0.5, 1.0, 2.0)]
    assert distances[0] > 1.5 * distances[1] > 2 * distances[2] > 0
    closed_form = [kl(softmax(REFERENCE + REWARDS / beta), softmax(REFERENCE)) for beta in (0.5, 1.0, 2.0)]
    np.testing.assert_allclose(distances, closed_form, rtol=2e-2)
