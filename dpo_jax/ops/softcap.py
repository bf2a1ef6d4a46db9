"""Soft-capping of scores."""

import jax.numpy as jnp
from jaxtyping import Array


def soft_cap(scores: Array, cap: float | None) -> Array:
    """Return cap * tanh(scores / cap), or the scores if there is no cap (arXiv 2408.00118, section 2)."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)
