"""Attention over packed rows: each token sees its own prompt and its own answer so far, and nothing else.

Shape letters: R rows, T tokens in a row, N query heads, K key/value heads, G = N / K, H head, J pairs of blocks,
q and s query and key places inside a block.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.batch import BLOCK, PreferenceBatch


def sees(query: Int[Array, "3 *j q"], key: Int[Array, "3 *j s"], window: int | None) -> Bool[Array, "*j q s"]:
    """Which query sees which key, of the (segment, branch, position) of each; order in the row is the caller's part.

    Within a branch positions rise by one, so "not later" is a comparison of positions there; a prompt key is never
    later than an answer token. ``window``: keys at most window - 1 positions back.
    """
    segment_q, branch_q, position_q = (x[..., :, None] for x in query)
    segment_s, branch_s, position_s = (x[..., None, :] for x in key)
    seen = (segment_q == segment_s) & (segment_q > 0)
    seen &= (branch_s == 0) | (branch_s == branch_q)
    seen &= position_s <= position_q
    if window is not None:
        seen &= position_q - position_s < window
    return seen


def _scores(q, k, spec, scale, softcap):
    scores = jnp.einsum(spec, q, k, preferred_element_type=jnp.float32) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _dense(q, k, v, tokens, *, scale, window, softcap):
    """One row under a [T, T] mask. q: [T, K, G, H]; k, v: [T, K, H]."""
    scores = _scores(q, k, "qkgh,skh->kgqs", scale, softcap)
    seen = sees(tokens, tokens, window)
    weights = jax.nn.softmax(scores, axis=-1, where=seen)
    weights = jnp.where(seen.any(-1)[:, None], weights, 0.0)  # padding sees nothing
    return jnp.einsum("kgqs,skh->qkgh", weights.astype(v.dtype), v)


def _blocks(q, k, v, tokens, blocks, *, scale, window, softcap):
    """One row, visiting J pairs of blocks. The softmax of a query block is put together over its pairs.

    Work and memory follow the tokens that are seen, not the square of the row: J * BLOCK^2 scores a head.
    """
    num_blocks = q.shape[0] // BLOCK
    query_block, key_block = blocks[:, 0], blocks[:, 1]
    used = query_block >= 0
    parts = lambda x: x.reshape(num_blocks, BLOCK, *x.shape[1:])  # noqa: E731
    tokens = tokens.reshape(3, num_blocks, BLOCK)

    scores = _scores(parts(q)[query_block], parts(k)[key_block], "jqkgh,jskh->jkgqs", scale, softcap)
    seen = sees(tokens[:, query_block], tokens[:, key_block], window) & used[:, None, None]
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)

    segment = jnp.where(used, query_block, num_blocks)  # unused pairs fall into a block that is cut off
    largest = jax.ops.segment_max(jax.lax.stop_gradient(scores.max(-1)), segment, num_blocks + 1)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = jnp.exp(scores - largest[segment][..., None])
    total = jax.ops.segment_sum(weights.sum(-1), segment, num_blocks + 1)[:num_blocks]
    values = jnp.einsum("jkgqs,jskh->jqkgh", weights.astype(v.dtype), parts(v)[key_block])
    values = jax.ops.segment_sum(values, segment, num_blocks + 1)[:num_blocks]
    total = jnp.moveaxis(total, -1, 1)[..., None]  # [blocks, q, K, G, 1]
    return (values / jnp.where(total > 0, total, 1.0).astype(values.dtype)).reshape(q.shape)


def attend(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    batch: PreferenceBatch,
    *,
    implementation: Literal["blocks", "xla"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "R T N H"]:
    """Softmax attention of packed rows, scores in float32; padding yields 0.

    ``xla`` is the rule as a dense mask, the oracle that ``blocks`` is checked against. ``window`` is a sliding window
    in positions (not row indices). Queries of one group of N / K heads share a key head.
    """
    num_rows, length, num_heads, head = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, head)
    tokens = jnp.stack([batch.segments, batch.branches, batch.positions], axis=1)  # [R, 3, T]
    options = {"scale": scale, "window": window, "softcap": softcap}
    if implementation == "xla":
        out = jax.vmap(partial(_dense, **options))(q, k, v, tokens)
    else:
        out = jax.vmap(partial(_blocks, **options))(q, k, v, tokens, batch.blocks)
    return out.reshape(num_rows, length, num_heads, head)
