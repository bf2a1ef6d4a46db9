"""Attention over packed rows: each token attends only to its own prompt and to its own answer so far.

Shape letters: R rows, T tokens per row, N query heads, K key/value heads, G = N / K, H head dim, J block pairs,
q and s indices of queries and keys.
"""

from collections.abc import Callable
from functools import partial
from math import lcm
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.batch import BLOCK, PreferenceBatch
from dpo_jax.errors import UserError
from dpo_jax.ops import blocks, kernels
from dpo_jax.ops.softcap import soft_cap
from dpo_jax.ops.unpack import UnpackIndices, share, unpack_answers, unpack_branches, unshare
from dpo_jax.parallel.sharding import ROWS, mesh_is_active

Implementation = Literal["blocks", "xla", "splash", "cudnn"]


def attention_mask(query: Int[Array, "3 *j q"], key: Int[Array, "3 *j s"], window: int | None) -> Bool[Array, "*j q s"]:
    """Compute the attention mask from (segment, branch, position) of queries and keys, which may be in any order.

    Positions increase by one within a branch, so "not later" compares positions; a prompt key is never later than an
    answer token. ``window``: only keys at most window - 1 positions back.
    """
    segment_q, branch_q, position_q = (x[..., :, None] for x in query)
    segment_s, branch_s, position_s = (x[..., None, :] for x in key)
    visible = (segment_q == segment_s) & (segment_q > 0)
    visible &= (branch_s == 0) | (branch_s == branch_q)
    visible &= position_s <= position_q
    if window is not None:
        visible &= position_q - position_s < window
    return visible


class AttentionInputs(NamedTuple):
    """Attention inputs derived from a batch, computed once for all layers."""

    tokens: Int[Array, "R 3 T"]  # segment, branch, position
    blocks: Int[Array, "R J 2"]
    unpacked: UnpackIndices | None  # for splash and cudnn only


def make_inputs(batch: PreferenceBatch, implementation: Implementation, head_dim: int = 128) -> AttentionInputs:
    """Derive the attention inputs that an implementation needs from a batch, for heads of ``head_dim``.

    Raises:
        ValueError: the batch lacks the block or answer indices that the implementation needs, as a plain batch does.
    """
    if implementation == "blocks" and batch.blocks.shape[-2] == 0:
        raise ValueError("model.attention: blocks needs packed rows, but this batch lists no block pairs; use xla")
    if implementation == "cudnn" and batch.answers_per_row == 0:
        raise ValueError("model.attention: cudnn needs packed rows, but this batch has no answer slots; use xla")
    unpacked = None
    if implementation == "splash":
        _, length = kernels.splash_sizes(batch.branch_length, batch.longest, head_dim)
        unpacked = unpack_branches(batch, length)
    elif implementation == "cudnn":
        unpacked = unpack_answers(batch, batch.longest)
    tokens = jnp.stack([batch.segments, batch.branches, batch.positions], axis=1)
    return AttentionInputs(tokens=tokens, blocks=jnp.asarray(batch.blocks), unpacked=unpacked)


def _attention_scores(q, k, spec, scale, softcap):
    scores = jnp.einsum(spec, q, k, preferred_element_type=jnp.float32) * scale
    return soft_cap(scores, softcap)


# Each takes q, k, v and the inputs of the same rows and heads; only some use the bound `longest`.


def _sink_scores(sinks: Float[Array, " N"], num_kv_heads: int, num_queries: int) -> Float[Array, "K X"]:
    """Return each query's sink score, with the queries of a group adjacent."""
    return jnp.repeat(sinks.astype(jnp.float32).reshape(num_kv_heads, -1), num_queries, axis=1)


def _dense(q, k, v, inputs, *, longest, **options):
    return attend_cached(q, k.swapaxes(1, 2), v.swapaxes(1, 2), inputs.tokens, inputs.tokens, **options)


def _blocks(q, k, v, inputs, *, longest, scale, window, softcap, sinks=None):
    num_rows, length, num_heads, head_dim = q.shape
    num_kv_heads, num_blocks = k.shape[2], length // BLOCK  # per row
    pairs = _block_pairs(inputs, num_blocks, window)
    # Head dims precede token dims, and the queries of a group are adjacent (X = G * BLOCK), so that each product is one
    # plain matrix product per key head: on a CPU several times faster than leaving the order to the compiler.
    q = q.reshape(-1, BLOCK, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(len(q), num_kv_heads, -1, head_dim)
    k, v = (x.reshape(-1, BLOCK, num_kv_heads, head_dim).swapaxes(1, 2) for x in (k, v))
    if sinks is not None:
        sinks = _sink_scores(sinks, num_kv_heads, BLOCK)
    # read now, because the precision context is not active when the backward pass is traced
    options = blocks.BlockOptions(scale, softcap, jax.config.values["jax_default_matmul_precision"])
    out = blocks.attend_pairs(q, k, v, sinks, pairs, options)
    out = out.reshape(len(q), num_kv_heads, -1, BLOCK, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(num_rows, length, num_heads, head_dim)


def _block_pairs(inputs: AttentionInputs, num_blocks: int, window: int | None) -> blocks.BlockPairs:
    """Return the block pairs of all rows, whose blocks are numbered through, and their masks."""
    is_used = (inputs.blocks[..., 0] >= 0).reshape(-1)
    first_blocks = num_blocks * jnp.arange(len(inputs.blocks))
    indices = (inputs.blocks + first_blocks[:, None, None]).reshape(-1, 2)
    order = jnp.argsort(~is_used, stable=True)
    query, key = jnp.where(is_used[:, None], indices, 0)[order].T
    tokens = inputs.tokens.swapaxes(0, 1).reshape(3, -1, BLOCK)
    # masks are computed here, all at once: within the loop they would take longer than all else
    mask = attention_mask(tokens[:, query], tokens[:, key], window) & is_used[order, None, None]
    return blocks.BlockPairs(query, key, mask, is_used.sum())


def _splash(q, k, v, inputs, *, longest, scale, window, softcap, sinks=None):
    indices = inputs.unpacked
    segments = indices.segments.reshape(-1, indices.segments.shape[-1])
    block, _ = kernels.splash_sizes(indices.segments.shape[-1], longest, q.shape[-1])
    band = longest if window is None else min(window, longest)
    q = (q * scale).astype(q.dtype)  # before unpacking copies some of them
    q, k, v = (unshare(x, indices) for x in (q, k, v))
    return share(kernels.splash(q, k, v, segments, sinks, block=block, band=band, softcap=softcap), indices)


def _padded(q, k, v, inputs, *, longest, scale, window, softcap, implementation):
    assert softcap is None, "`choose` refuses cudnn for models that cap scores"
    indices = inputs.unpacked
    lengths = (indices.segments > 0).sum(-1).reshape(-1)
    lengths = jnp.maximum(lengths, 1)  # the kernel needs one token in an unused slot; nothing reads it
    q, k, v = (unshare(x, indices) for x in (q, k, v))
    return share(kernels.padded(q, k, v, lengths, window=window, scale=scale, implementation=implementation), indices)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": _dense,
    "blocks": _blocks,
    "splash": _splash,
    "cudnn": partial(_padded, implementation="cudnn"),
}


def on_each_device(
    fn: Callable[..., Array], q: Array, k: Array, v: Array, inputs: AttentionInputs, sinks: Array | None = None
) -> Array:
    """Run ``fn(q, k, v, inputs)`` on each device's own rows and heads; without an active mesh, simply call it.

    Attention needs no collectives: a token attends only within its row. If `tensor` does not divide the key heads, they
    are repeated just often enough that each device has exactly those of its own query heads. ``sinks``, if there are
    any, are passed by this name.
    """
    options = {} if sinks is None else {"sinks": sinks}
    if not mesh_is_active():
        return fn(q, k, v, inputs, **options)
    num_kv_heads, num_shards = k.shape[2], jax.sharding.get_abstract_mesh().shape["tensor"]
    repeats = lcm(num_kv_heads, num_shards) // num_kv_heads
    k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
    row_spec, head_spec = PartitionSpec(ROWS), PartitionSpec(ROWS, None, "tensor")
    in_specs = (*[head_spec] * 3, row_spec, PartitionSpec("tensor"))
    # check_vma=False: kernels do not declare over which axes their results vary
    on_shard = lambda q, k, v, inputs, options: fn(q, k, v, inputs, **options)  # noqa: E731
    on_shards = jax.shard_map(on_shard, in_specs=in_specs, out_specs=head_spec, check_vma=False)
    return on_shards(q, k, v, inputs, options)


def attend(
    q: Float[Array, "R T N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    inputs: AttentionInputs,
    *,
    implementation: Implementation,
    scale: float,
    longest: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R T N H"]:
    """Compute softmax attention over packed rows, with float32 scores; the output at padding is 0.

    ``xla`` applies `attention_mask` as a dense mask. It is the oracle that all others are tested against; the compiler
    partitions it. ``inputs`` must be made for the same implementation; ``longest`` is the batch's. ``window`` is a
    sliding window in positions (not row indices). Each group of N / K query heads shares a key head. ``sinks``: a score
    of each head that the softmax has in addition to those of the keys, of a value of 0.
    """
    fn = partial(IMPLEMENTATIONS[implementation], longest=longest, scale=scale, window=window, softcap=softcap)
    if implementation == "xla":
        return fn(q, k, v, inputs, sinks=sinks)
    return on_each_device(fn, q, k, v, inputs, sinks)


def attend_cached(
    q: Float[Array, "R q N H"],
    k: Float[Array, "R K s H"],
    v: Float[Array, "R K s H"],
    queries: Int[Array, "R 3 q"],
    keys: Int[Array, "R 3 s"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "R q N H"]:
    """Compute attention of tokens to the slots of a cache, with a dense mask from (segment, branch, position).

    The queries of a group are adjacent (X = G * q), so that both products are plain matrix products per key head.
    """
    num_rows, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped_q = q.swapaxes(1, 2).reshape(num_rows, num_kv_heads, -1, head_dim)
    scores = _attention_scores(grouped_q, k, "rkxh,rksh->rkxs", scale, softcap)
    visible = attention_mask(queries.swapaxes(0, 1), keys.swapaxes(0, 1), window)
    visible = jnp.tile(visible, (1, num_heads // num_kv_heads, 1))[:, None]
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1, where=visible)
        weights = jnp.where(visible.any(-1, keepdims=True), weights, 0.0)  # padding attends to nothing
    else:
        sink_scores = _sink_scores(sinks, num_kv_heads, length)[..., None]
        sink_scores = jnp.broadcast_to(sink_scores, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([jnp.where(visible, scores, -jnp.inf), sink_scores], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :-1]
    out = jnp.einsum("rkxs,rksh->rkxh", weights.astype(v.dtype), v)
    return out.reshape(num_rows, num_heads, length, head_dim).swapaxes(1, 2)


def choose(
    requested: Literal["auto", "blocks", "xla", "splash", "cudnn"],
    *,
    platform: str,
    dtype: str,
    head_dim: int,
    softcap: float | None = None,
    sinks: bool = False,
) -> Implementation:
    """Return the requested implementation or, for ``auto``, the default on ``platform`` (cpu, gpu or tpu).

    Raises:
        UserError: the requested implementation does not support the platform, ``dtype``, ``head_dim``, soft-capping or
            sinks.
    """
    cudnn_runs = dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128  # supported by cuDNN on every GPU
    obstacle = "soft-cap scores" if softcap is not None else "compute attention sinks" if sinks else None
    cudnn_default = cudnn_runs and obstacle is None
    defaults: dict[str, Implementation] = {"tpu": "splash", "gpu": "cudnn" if cudnn_default else "blocks"}
    if requested == "auto":
        return defaults.get(platform, "blocks")
    if requested == "splash" and platform not in ("tpu", "cpu"):
        raise UserError(f"model.attention: splash runs on TPUs, but the devices are {platform}; use auto")
    if requested == "cudnn" and platform != "gpu":
        raise UserError(f"model.attention: cudnn runs on GPUs, but the devices are {platform}; use auto")
    if requested == "cudnn" and not cudnn_runs:
        requirement = "cudnn needs bfloat16 and a head_dim that is a multiple of 8 and at most 128"
        raise UserError(f"model.attention: {requirement}, got {dtype} and {head_dim}; use auto")
    if requested == "cudnn" and obstacle is not None:
        raise UserError(f"model.attention: cudnn cannot {obstacle}, which this model requires; use auto")
    return requested
