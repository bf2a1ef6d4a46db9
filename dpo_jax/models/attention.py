"""Attention over packed rows: each token sees its own prompt and its own answer so far, and nothing else.

Shape letters: R rows, T tokens in a row, N query heads, K key/value heads, G = N / K, H head, J pairs of blocks,
q and s places of queries and keys.
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

    Work and memory follow the tokens that are seen, not the square of the row: J * BLOCK^2 scores a head. Heads stand
    before places, and the queries of a group beside each other (X = G * BLOCK), so that each product is one plain
    matrix product a key head: on a CPU that is several times faster than leaving the order to the compiler.
    """
    length, num_kv_heads, group, head = q.shape
    num_blocks = length // BLOCK
    query_block, key_block = blocks[:, 0], blocks[:, 1]
    used = query_block >= 0
    segment = jnp.where(used, query_block, num_blocks)  # unused pairs fall into a block that is cut off

    q = q.reshape(num_blocks, BLOCK, num_kv_heads, group, head).transpose(0, 2, 3, 1, 4)
    q = q.reshape(num_blocks, num_kv_heads, group * BLOCK, head)
    k, v = (x.reshape(num_blocks, BLOCK, num_kv_heads, head).swapaxes(1, 2) for x in (k, v))
    tokens = tokens.reshape(3, num_blocks, BLOCK)

    scores = _scores(q[query_block], k[key_block], "jkxh,jksh->jkxs", scale, softcap)
    seen = sees(tokens[:, query_block], tokens[:, key_block], window) & used[:, None, None]
    seen = jnp.tile(seen, (1, group, 1))[:, None]  # [J, 1, X, s]
    scores = jnp.where(seen, scores, -jnp.inf)

    largest = jax.ops.segment_max(jax.lax.stop_gradient(scores.max(-1)), segment, num_blocks + 1)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    weights = jnp.exp(scores - largest[segment][..., None])
    total = jax.ops.segment_sum(weights.sum(-1), segment, num_blocks + 1)[:num_blocks, ..., None]
    values = jnp.einsum("jkxs,jksh->jkxh", weights.astype(v.dtype), v[key_block], preferred_element_type=jnp.float32)
    values = jax.ops.segment_sum(values, segment, num_blocks + 1)[:num_blocks]
    out = (values / jnp.where(total > 0, total, 1.0)).astype(v.dtype)
    out = out.reshape(num_blocks, num_kv_heads, group, BLOCK, head).transpose(0, 3, 1, 2, 4)
    return out.reshape(length, num_kv_heads, group, head)


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
        # The backward pass computes scores again: they are many times larger than q, k and v, which are kept.
        one_row = jax.checkpoint(partial(_blocks, **options))
        rows = (q, k, v, tokens, batch.blocks)
        # a mapped dim of one makes the softmax's gradient 30 times slower in XLA on a CPU
        out = jax.vmap(one_row)(*rows) if num_rows > 1 else one_row(*(x[0] for x in rows))[None]
    return out.reshape(num_rows, length, num_heads, head)
