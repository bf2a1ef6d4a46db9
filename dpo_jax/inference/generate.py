"""Greedy decoding for inspecting a model's answers: one full forward pass per token, compiled for one shape."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dpo_jax.models.decoder import Model, Params, plain_batch


@partial(jax.jit, static_argnums=0)
def _extend(
    model: Model, params: Params, tokens: Int[Array, "R T"], lengths: Int[Array, " R"], ends: Int[Array, " R"], eos_id
) -> tuple[Int[Array, "R T"], Int[Array, " R"]]:
    """Extend each row until its end or its end-of-sequence token; return the rows and their new lengths."""
    positions = jnp.arange(tokens.shape[1])
    unembedding = model.unembedding(params).astype(jnp.float32)

    def any_open(state):
        _, lengths, ends = state
        return jnp.any(lengths < ends)

    def add_token(state):
        tokens, lengths, ends = state
        hidden = model.hidden(params, plain_batch(tokens, lengths))
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        token = jnp.argmax(jnp.einsum("RD,VD->RV", last.astype(jnp.float32), unembedding), axis=-1)
        is_open = lengths < ends
        tokens = jnp.where((positions == lengths[:, None]) & is_open[:, None], token[:, None], tokens)
        ends = jnp.where(is_open & (token == eos_id), lengths + 1, ends)
        return tokens, lengths + is_open, ends

    tokens, lengths, _ = jax.lax.while_loop(any_open, add_token, (tokens, lengths, ends))
    return tokens, lengths


def greedy(
    model: Model, params: Params, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_id: int
) -> list[list[int]]:
    """Decode greedily from all prompts as one batch.

    Returns:
        The new tokens of each prompt, at most ``max_new_tokens``, ending in ``eos_id`` if the model generated it.
    """
    assert all(len(prompt) > 0 for prompt in prompts), "a prompt must have at least one token"
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max() + max_new_tokens), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    dense = replace(model, attention="xla")  # rows are short, and these batches carry no block indices
    tokens, ends = jax.device_get(_extend(dense, params, tokens, lengths, lengths + max_new_tokens, eos_id))
    return [row[start:end].tolist() for row, start, end in zip(tokens, lengths, ends, strict=True)]
