"""Sample the next token of each row. A row's draw depends on its own key and logits, not on its neighbors."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dpo_jax.config.sampling import SamplingConfig


def row_keys(seed: int, step: int, rows: Int[Array, " R"]) -> Key[Array, " R"]:
    """Return a key for each row of a step; `sample` derives the keys of its tokens."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, rows)


def sample(
    logits: Float[Array, "R V"], keys: Key[Array, " R"], token: Int[Array, ""], options: SamplingConfig
) -> Int[Array, " R"]:
    """Sample from softmax(logits / temperature), restricted to ``top_k``, then ``top_p``, by the Gumbel-max trick.

    ``token``: index of the token in the answer.
    """
    if options.temperature == 0:
        return argmax(logits)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, token)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return argmax(cut(logits / options.temperature, options) + noise)


def argmax(values: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Return the argmax of each row. On a CPU, XLA vectorizes neither `jnp.argmax` nor the computation of its input."""
    size = values.shape[-1]
    return jnp.where(values == values.max(-1, keepdims=True), jnp.arange(size), size - 1).min(-1)


def cut(logits: Float[Array, "R V"], options: SamplingConfig) -> Float[Array, "R V"]:
    """Set logits to -inf, first outside the ``top_k`` most likely tokens, then outside the nucleus of mass ``top_p``.

    The nucleus is the smallest set of most likely tokens with at least that mass (Holtzman et al. 2020, arXiv
    1904.09751).
    """
    if options.top_k:
        kth_logit = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= kth_logit, logits, -jnp.inf)
    if options.top_p < 1:
        sorted_logits = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(sorted_logits, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        lowest_kept_logit = jnp.where(mass_before < options.top_p, sorted_logits, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= lowest_kept_logit, logits, -jnp.inf)
    return logits
