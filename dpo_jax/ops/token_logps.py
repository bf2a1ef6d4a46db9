"""Log-probs of tokens, computed in tiles of targets by vocabulary rows, on one device or on a mesh.

Neither the logits of all targets over the whole vocabulary nor, on a mesh, the whole unembedding matrix ever exist at
once: each block of vocabulary rows is all-gathered once (axes `EMBED`), and its gradient is reduce-scattered once. If
`tensor` shards the vocabulary, each device scores its shard, and the shards' normalizers are combined.

Shape letters: R rows, M targets per row, C chunks of n targets, D model, V vocabulary, b vocabulary rows per block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.batch import AnyArray
from dpo_jax.ops.softcap import soft_cap
from dpo_jax.parallel.sharding import EMBED, ROWS, mesh_is_active

MIN_SCORE = -1e30  # score of a masked vocabulary row; finite, so that 0 times it is 0


class TargetStats(NamedTuple):
    """Per-target statistics used only by metrics; float32, without gradient."""

    entropy: Float[Array, "*n"]  # nats
    mean_logit: Float[Array, "*n"]  # mean over the vocabulary
    top1: Float[Array, "*n"]  # 1: the label is the model's top prediction


class TokenLogps(NamedTuple):
    """Log-probs of each target, float32."""

    logp: Float[Array, "*n"]  # log pi(token | context), nats
    normalizer: Float[Array, "*n"]  # logsumexp of the scores
    log_sum_sq: Float[Array, "*n"] | None = None  # log of the sum over V of p^2
    stats: TargetStats | None = None


class Options(NamedTuple):
    """Static options, passed explicitly because no context manager is active while the backward pass is traced."""

    chunk: int  # targets per device whose scores exist at a time
    block: int  # vocabulary rows over which they exist at a time
    stats: bool = False
    squares: bool = False
    precision: str | None = None
    softcap: float | None = None  # scores become cap * tanh(score / cap)

    def product(self, spec: str, x: Array, y: Array) -> Array:
        """Return an einsum of ``x`` and ``y``, accumulated in float32."""
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision=self.precision)

    def scores(self, states: Float[Array, "n D"], rows: Float[Array, "b D"]) -> Float[Array, "n b"]:
        """Return the scores of hidden states with rows of the unembedding, soft-capped if the model has a cap."""
        return soft_cap(self.product("nd,vd->nv", states, rows), self.softcap)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def score_targets(
    states: Float[Array, "R M D"],
    unembedding: Float[Array, "V D"],
    labels: Int[AnyArray, "R M"],
    mask: Bool[AnyArray, "R M"],
    options: Options,
) -> TokenLogps:
    """Compute the log-probs of the labels; they are undefined where ``mask`` is False.

    Gradients flow through ``logp`` and ``log_sum_sq``. They are written by hand, so that the backward pass also holds
    only one tile of scores z and visits only chunks with unmasked targets:
    d log p_label / dz = onehot(label) - p, and d log sum p^2 / dz = 2 (p^2 / sum p^2 - p).
    """
    return _forward(states, unembedding, labels, mask, options)[0]


def _forward(states, unembedding, labels, mask, options):
    token_logps = _on_mesh(partial(_target_logps, options), "rwrr", "r")(states, unembedding, labels, mask)
    return token_logps, (states, unembedding, labels, mask, token_logps.normalizer, token_logps.log_sum_sq)


def _backward(options, residuals, cotangents):
    token_grads = cotangents.logp, cotangents.log_sum_sq
    gradients = _on_mesh(partial(_target_gradients, options), "rwrrrrr", "rw")(*residuals, token_grads)
    return *gradients, None, None


score_targets.defvjp(_forward, _backward)


def _on_mesh(local: Callable[..., Any], input_kinds: str, output_kinds: str) -> Callable[..., Any]:
    """Map ``local(is_sharded, *arrays)`` over devices: kind "r" is sharded by rows, kind "w" like the unembedding."""
    if not mesh_is_active():
        return partial(local, False)
    specs = {"r": PartitionSpec(ROWS), "w": PartitionSpec("tensor", EMBED)}
    outputs = tuple(specs[letter] for letter in output_kinds)
    in_specs, out_specs = tuple(specs[letter] for letter in input_kinds), outputs if len(outputs) > 1 else outputs[0]
    return jax.shard_map(partial(local, True), in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Tiles:
    """The tiles that one device computes: chunks of its targets by blocks of its vocabulary shard."""

    def __init__(self, options: Options, is_sharded: bool, unembedding: Array, mask: AnyArray):
        self.is_sharded, self.unembedding, self.rows, self.targets = is_sharded, unembedding, *mask.shape
        self.num_chunks = max(1, -(-self.targets // max(1, options.chunk // self.rows)))
        self.num_blocks = max(1, -(-len(unembedding) // options.block))
        self.block = -(-len(unembedding) // self.num_blocks)
        used_chunks = self.chunks(mask).any(1) * jnp.arange(1, self.num_chunks + 1)
        self.num_used_chunks = used_chunks.max()  # later chunks hold no target

    def chunks(self, x: AnyArray) -> Array:
        """Reshape [R, M, ...] -> [C, n, ...], so that a chunk's scores are one plain matrix product (fast on CPUs)."""
        size = -(-self.targets // self.num_chunks)
        x = jnp.pad(x, ((0, 0), (0, self.num_chunks * size - self.targets)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(self.rows, self.num_chunks, size, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(self.num_chunks, -1, *x.shape[3:])

    def join_chunks(self, x: Array) -> Array:
        """Invert `chunks`: [C, n, ...] -> [R, M, ...]."""
        x = x.reshape(self.num_chunks, self.rows, -1, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(self.rows, -1, *x.shape[3:])[:, : self.targets]

    def fold_blocks(self, visit: Callable[[Any, Any], Any], initial: Any) -> Any:
        """Fold ``visit(i, carry)`` over the blocks in order, without a loop if there is only one."""
        return visit(0, initial) if self.num_blocks == 1 else jax.lax.fori_loop(0, self.num_blocks, visit, initial)

    def block_offset(self, i: Any) -> Any:
        """Return the first row of block i; the last block is shifted back so that it has full size."""
        return jnp.minimum(i * self.block, len(self.unembedding) - self.block)

    def weights(self, i: Any, dtype: Any) -> tuple[Array, Array, Array]:
        """Return block i's rows [b, D], their vocabulary ids [b], and a mask of those in no earlier block [b]."""
        offset = self.block_offset(i)
        rows = jax.lax.dynamic_slice_in_dim(self.unembedding, offset, self.block).astype(dtype)
        ids = offset + jnp.arange(self.block)
        is_new = ids >= i * self.block
        if self.is_sharded:
            rows = jax.lax.all_gather(rows, EMBED, axis=1, tiled=True)
            ids += jax.lax.axis_index("tensor") * len(self.unembedding)
        return rows, ids, is_new


class _Sums(NamedTuple):
    """Running values over the vocabulary rows visited so far, [C, n] float32."""

    largest: Array  # largest score
    label: Array  # score of the label
    total: Array  # sum of exp(score - largest)
    squares: Array | None  # sum of exp(2 (score - largest))
    expected: Array | None  # sum of exp(score - largest) score
    score_sum: Array | None  # sum of the scores; only where a cap makes it no linear function of the states


def _add_block(scores: Array, is_label: Array, before: _Sums) -> _Sums:
    """Add the scores [n, b] of a block of vocabulary rows to the running sums."""
    largest = jnp.maximum(before.largest, scores.max(-1))
    exp_scores, shift = jnp.exp(scores - largest[:, None]), jnp.exp(before.largest - largest)
    return _Sums(
        largest=largest,
        label=before.label + jnp.where(is_label, scores, 0.0).sum(-1),
        total=before.total * shift + exp_scores.sum(-1),
        squares=None if before.squares is None else before.squares * shift**2 + (exp_scores**2).sum(-1),
        expected=None if before.expected is None else before.expected * shift + (exp_scores * scores).sum(-1),
        score_sum=None
        if before.score_sum is None
        else before.score_sum + jnp.where(scores > MIN_SCORE, scores, 0.0).sum(-1),
    )


def _combine_shards(sums: _Sums) -> _Sums:
    """Combine the running sums of all vocabulary shards, along mesh axis `tensor`."""
    largest = jax.lax.pmax(sums.largest, "tensor")
    shift = jnp.exp(sums.largest - largest)
    sums = sums._replace(
        total=sums.total * shift,
        squares=None if sums.squares is None else sums.squares * shift**2,
        expected=None if sums.expected is None else sums.expected * shift,
    )
    return jax.lax.psum(sums, "tensor")._replace(largest=largest)


def _target_logps(options, is_sharded, states, unembedding, labels, mask):
    tiles = _Tiles(options, is_sharded, unembedding, mask)
    states, labels = tiles.chunks(states), tiles.chunks(labels)

    def visit_block(i, sums):
        rows, ids, is_new = tiles.weights(i, states.dtype)

        def visit_chunk(c, sums):
            scores = options.scores(states[c], rows)
            if tiles.num_blocks > 1:
                scores = jnp.where(is_new, scores, MIN_SCORE)
            is_label = (ids == labels[c][:, None]) & is_new
            chunk_sums = _add_block(scores, is_label, jax.tree.map(lambda x: x[c], sums))
            return jax.tree.map(lambda array, chunk: array.at[c].set(chunk), sums, chunk_sums)

        return jax.lax.fori_loop(0, tiles.num_used_chunks, visit_chunk, sums)

    zeros = jnp.zeros(labels.shape, jnp.float32)
    squares, expected = zeros if options.squares else None, zeros if options.stats else None
    score_sum = None if options.softcap is None else expected
    sums = _Sums(zeros + MIN_SCORE, zeros, zeros, squares, expected, score_sum)
    sums = tiles.fold_blocks(visit_block, sums)
    if is_sharded:
        sums = _combine_shards(sums)
    is_unvisited = sums.total == 0  # true in chunks that were not visited; NaN is not 0
    log_total = jnp.log(jnp.where(is_unvisited, 1.0, sums.total))
    normalizer = log_total + sums.largest
    logp = sums.label - normalizer
    log_sum_sq = None if sums.squares is None else jnp.log(sums.squares) - 2 * log_total
    stats = None
    if sums.expected is not None:
        entropy = normalizer - sums.expected / sums.total
        mean_logit = _mean_logit(sums, states, unembedding, is_sharded)
        stats = TargetStats(entropy, mean_logit, top1=(sums.label >= sums.largest).astype(jnp.float32))
    token_logps = TokenLogps(logp, normalizer, log_sum_sq, stats)
    return jax.tree.map(lambda x: tiles.join_chunks(jnp.where(is_unvisited, 0.0, x)), token_logps)


def _mean_logit(sums: _Sums, states: Array, unembedding: Array, is_sharded: bool) -> Array:
    """Return the mean score over the vocabulary; without a cap it is the score of the mean row."""
    if sums.score_sum is not None:
        num_shards = jax.lax.axis_size("tensor") if is_sharded else 1
        return sums.score_sum / (len(unembedding) * num_shards)
    mean_row = unembedding.mean(0, dtype=jnp.float32)
    if is_sharded:
        mean_row = jax.lax.all_gather(jax.lax.pmean(mean_row, "tensor"), EMBED, axis=0, tiled=True)
    return jnp.einsum("cnd,d->cn", states.astype(jnp.float32), mean_row, precision=jax.lax.Precision.HIGHEST)


def _target_gradients(options, is_sharded, states, unembedding, labels, mask, normalizer, log_sum_sq, token_grads):
    """Return the gradients of states and unembedding, given the cotangents of the log-probs."""
    tiles = _Tiles(options, is_sharded, unembedding, mask)
    states, labels, normalizer, log_sum_sq, logp_grads, log_sum_sq_grads = jax.tree.map(
        tiles.chunks, (states, labels, normalizer, log_sum_sq, *token_grads)
    )

    def score_gradients(c, rows, ids, is_new):
        scores = options.scores(states[c], rows)
        logps = scores - normalizer[c][:, None]
        probs = jnp.exp(logps)
        grads = logp_grads[c][:, None] * ((ids == labels[c][:, None]) - probs)
        if options.squares:
            squared_shares = jnp.exp(2 * logps - log_sum_sq[c][:, None])
            grads += 2 * log_sum_sq_grads[c][:, None] * (squared_shares - probs)
        if options.softcap is not None:
            grads *= 1 - (scores / options.softcap) ** 2
        if tiles.num_blocks > 1:
            grads = jnp.where(is_new, grads, 0.0)
        return grads.astype(states.dtype)

    def visit_block(i, grads):
        states_grad, unembedding_grad = grads
        block = tiles.weights(i, states.dtype)

        def visit_chunk(c, grads):
            states_grad, rows_grad = grads
            score_grads = score_gradients(c, *block)
            block_grad = options.product("nv,vd->nd", score_grads, block[0])
            states_grad = states_grad.at[c].add(block_grad.astype(states_grad.dtype))
            return states_grad, rows_grad + options.product("nv,nd->vd", score_grads, states[c])

        zeros = jnp.zeros(block[0].shape, jnp.float32)
        states_grad, rows_grad = jax.lax.fori_loop(0, tiles.num_used_chunks, visit_chunk, (states_grad, zeros))
        if is_sharded:
            rows_grad = jax.lax.psum_scatter(rows_grad, EMBED, scatter_dimension=1, tiled=True)
        if tiles.num_blocks == 1:
            return states_grad, rows_grad
        offset = tiles.block_offset(i)
        rows_grad += jax.lax.dynamic_slice_in_dim(unembedding_grad, offset, tiles.block)
        return states_grad, jax.lax.dynamic_update_slice_in_dim(unembedding_grad, rows_grad, offset, 0)

    sum_dtype = jnp.float32 if tiles.num_blocks > 1 or is_sharded else states.dtype  # of sums over blocks or shards
    initial_grads = jnp.zeros(states.shape, sum_dtype), jnp.zeros(unembedding.shape, jnp.float32)
    states_grad, unembedding_grad = tiles.fold_blocks(visit_block, initial_grads)
    if is_sharded:
        states_grad, unembedding_grad = jax.lax.psum(states_grad, "tensor"), jax.lax.psum(unembedding_grad, "data")
    return tiles.join_chunks(states_grad).astype(states.dtype), unembedding_grad.astype(unembedding.dtype)
