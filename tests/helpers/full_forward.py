"""Generation without a cache, one full forward pass per token: what generation with one is compared with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.decoder import Model, plain_batch
from dpo_jax.ops.softcap import soft_cap


@partial(jax.jit, static_argnums=0)
def log_probs(model: Model, weights, tokens, lengths):
    """Log-probs [R, T, V] of the token after each token."""
    hidden = model.hidden(weights, plain_batch(tokens, lengths))
    logits = jnp.einsum("RTD,VD->RTV", hidden.astype(jnp.float32), model.unembedding(weights).astype(jnp.float32))
    return jax.nn.log_softmax(soft_cap(logits, model.config.logit_softcap))


def greedy(model: Model, weights, prompts: list[list[int]], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy answers [R, N] and the log-probs of their tokens."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + num_tokens), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows, logps = np.arange(len(prompts)), []
    for t in range(num_tokens):
        after = np.asarray(log_probs(model, weights, tokens, lengths + t))[rows, lengths + t - 1]
        tokens[rows, lengths + t] = after.argmax(-1)
        logps.append(after.max(-1))
    return np.stack([tokens[rows, lengths + t] for t in range(num_tokens)], axis=1), np.stack(logps, axis=1)
