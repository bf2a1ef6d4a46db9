"""A model that is nothing but two functions, as another program may have: a bag of the tokens so far."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import PaddedBatch, pad_pairs
from dpo_jax.logprobs import make_padded_logps_fn

VOCABULARY, WIDTH = 24, 8


def init(seed=0):
    embed, head = jax.random.split(jax.random.key(seed))
    return {
        "embed": jax.random.normal(embed, (VOCABULARY, WIDTH)),
        "head": jax.random.normal(head, (WIDTH, VOCABULARY)),
    }


def apply(params, tokens):
    """Token ids [n, T] to next-token scores [n, T, V]."""
    mean = jnp.cumsum(params["embed"][tokens], axis=1) / (1 + jnp.arange(tokens.shape[1]))[:, None]
    return jnp.tanh(mean) @ params["head"]


plain_logps_fn = make_padded_logps_fn(apply)


def random_batch(count=4, seed=0, **replaced) -> PaddedBatch:
    """Pairs of 1 to 6 tokens a piece."""
    draw = np.random.Generator(np.random.Philox(seed))
    lists = [[draw.integers(0, VOCABULARY, n).tolist() for n in draw.integers(1, 7, count)] for _ in range(3)]
    return pad_pairs(*lists).replace(**replaced)
