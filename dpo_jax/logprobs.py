"""Token log-probs from hidden states, a chunk at a time, so that scores of all tokens over the vocabulary never exist.

Shape letters: R rows, T tokens, M targets, C chunks of n targets, D model, V vocabulary, B pairs, K answers of a
prompt, A answer slots in a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.batch import AnyArray, PaddedBatch, PairLogps, PreferenceBatch, TokenStats

SUMMED = 32  # log-probs that are summed at once
Params = Any  # a tree of arrays
LogpsFn = Callable[..., PairLogps]  # (params, batch), or (adapters, batch, base)


class TargetStats(NamedTuple):
    """What only metrics need of each target; float32, without gradient."""

    entropy: Float[Array, "*n"]  # nats
    mean_logit: Float[Array, "*n"]  # over the vocabulary
    top1: Float[Array, "*n"]  # 1: the label was the model's first choice


class TokenLogps(NamedTuple):
    """Of each target, float32."""

    logp: Float[Array, "*n"]  # log pi(token | what it sees), nats
    normalizer: Float[Array, "*n"]  # logsumexp of the scores
    log_sum_sq: Float[Array, "*n"] | None = None  # log of the sum over V of p^2
    stats: TargetStats | None = None


def logps_of_logits(
    logits: Float[Array, "*n V"], labels: Int[AnyArray, "*n"], *, stats: bool = False, squares: bool = False
) -> TokenLogps:
    """Log-softmax at the labels, in float32. A label's score is picked by a masked sum, local where V is sharded."""
    logits = logits.astype(jnp.float32)
    label = jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0).sum(-1)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    tokens = TokenLogps(label - normalizer, normalizer)
    if squares:
        tokens = tokens._replace(log_sum_sq=jax.nn.logsumexp(2 * logits, axis=-1) - 2 * normalizer)
    if stats:
        fixed, total = jax.lax.stop_gradient(logits), jax.lax.stop_gradient(normalizer)
        expected = (jnp.exp(fixed - total[..., None]) * fixed).sum(-1)
        top1 = (jax.lax.stop_gradient(label) >= fixed.max(-1)).astype(jnp.float32)
        tokens = tokens._replace(stats=TargetStats(total - expected, fixed.mean(-1), top1))
    return tokens


class _Options(NamedTuple):
    """What is computed, and how; the backward pass is traced elsewhere, so no context can tell it."""

    stats: bool
    squares: bool
    precision: str | None

    def product(self, spec: str, x: Array, y: Array) -> Array:
        """A matrix product, float32."""
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision=self.precision)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    states: Float[Array, "C n D"], unembedding: Float[Array, "V D"], labels: Int[Array, "C n"], used: Int[Array, ""],
    options: _Options,
) -> TokenLogps:  # fmt: skip
    """Log-probs of the first ``used`` of C chunks of n targets, one chunk's scores at a time; 0 in the others.

    Its gradient is written out, so that the backward pass, too, visits used chunks only and holds one chunk's scores z:
    d log p_label / dz = onehot(label) - p, and d log sum p^2 / dz = 2 (p^2 / sum p^2 - p).
    """
    return _chunked_forward(states, unembedding, labels, used, options)[0]


def _chunked_forward(states, unembedding, labels, used, options):
    mean_row = unembedding.mean(0, dtype=jnp.float32)  # its score is a token's mean score, without a look at all V

    def chunk(i):
        scores = options.product("nd,vd->nv", states[i], unembedding)
        tokens = logps_of_logits(scores, labels[i], stats=options.stats, squares=options.squares)
        if tokens.stats is None:
            return tokens
        mean_logit = jnp.dot(states[i].astype(jnp.float32), mean_row, precision=jax.lax.Precision.HIGHEST)
        return tokens._replace(stats=tokens.stats._replace(mean_logit=mean_logit))

    zeros = jax.tree.map(lambda x: jnp.zeros(labels.shape, x.dtype), jax.eval_shape(chunk, 0))
    put = lambda i, out: jax.tree.map(lambda whole, own: whole.at[i].set(own), out, chunk(i))  # noqa: E731
    tokens = jax.lax.fori_loop(0, used, put, zeros)
    return tokens, (states, unembedding, labels, used, tokens.normalizer, tokens.log_sum_sq)


def _chunked_backward(options, kept, cotangents):
    states, unembedding, labels, used, normalizer, log_sum_sq = kept

    def add_chunk(i, grads):
        by_states, by_unembedding = grads
        logps = options.product("nd,vd->nv", states[i], unembedding) - normalizer[i][:, None]
        probs = jnp.exp(logps)
        onehot = jnp.arange(unembedding.shape[0]) == labels[i][:, None]
        by_scores = cotangents.logp[i][:, None] * (onehot - probs)
        if options.squares:
            shares = jnp.exp(2 * logps - log_sum_sq[i][:, None])
            by_scores += 2 * cotangents.log_sum_sq[i][:, None] * (shares - probs)
        by_scores = by_scores.astype(states.dtype)
        by_states = by_states.at[i].set(options.product("nv,vd->nd", by_scores, unembedding).astype(states.dtype))
        return by_states, by_unembedding + options.product("nv,nd->vd", by_scores, states[i])

    zeros = jnp.zeros_like(states), jnp.zeros(unembedding.shape, jnp.float32)
    by_states, by_unembedding = jax.lax.fori_loop(0, used, add_chunk, zeros)
    return by_states, by_unembedding.astype(unembedding.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def target_logps(
    hidden: Float[Array, "R T D"],
    unembedding: Float[Array, "V D"],
    batch: PreferenceBatch,
    *,
    chunk: int,
    stats: bool = False,
    squares: bool = False,
    precision: str | None = None,
) -> TokenLogps:
    """Log-probs of the batch's targets [R, M]; differentiable in ``logp`` and ``log_sum_sq``.

    At most ``chunk`` targets a row have scores at one time, in the backward pass, too. What stands in the place of an
    unused target has no meaning.
    """
    num_rows, num_targets = batch.target_tokens.shape
    num_chunks = max(1, -(-num_targets // chunk))
    size = -(-num_targets // num_chunks)

    def in_chunks(x: AnyArray) -> Array:
        """[R, M, ...] -> [chunks, R * targets of a chunk, ...]: scores are then one plain matrix, fastest on a CPU."""
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - num_targets)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(num_rows, num_chunks, size, *x.shape[2:]).swapaxes(0, 1).reshape(num_chunks, -1, *x.shape[2:])

    states = jnp.take_along_axis(hidden, batch.target_sources[..., None], axis=1)
    used = (in_chunks(batch.target_mask).any(1) * jnp.arange(1, num_chunks + 1)).max()
    options = _Options(stats, squares, precision)
    tokens = _chunked(in_chunks(states), unembedding, in_chunks(batch.target_tokens), used, options)
    in_rows = lambda x: x.reshape(num_chunks, num_rows, size).swapaxes(0, 1).reshape(num_rows, -1)  # noqa: E731
    return jax.tree.map(lambda x: in_rows(x)[:, :num_targets], tokens)


def pair_logps(tokens: TokenLogps, batch: PreferenceBatch, *, tail: bool = False) -> PairLogps:
    """Sums over each answer's targets, gathered from the rows into [B, K]; 0 in empty slots."""
    mask = batch.target_mask
    num_rows = mask.shape[0]
    num_slots = num_rows * batch.answers_per_row
    member = jax.nn.one_hot(jnp.where(mask, batch.target_answers, -1), batch.answers_per_row)  # [R, M, A]
    member = jnp.pad(member, ((0, 0), (0, -mask.shape[1] % SUMMED), (0, 0)))
    member = member.reshape(num_rows, -1, SUMMED, batch.answers_per_row)

    def per_answer(values: Float[Array, "R M"]) -> Float[Array, "B K"]:
        # in two stages: one long float32 sum would lose a digit
        values = jnp.pad(jnp.where(mask, values, 0.0), ((0, 0), (0, -mask.shape[1] % SUMMED))).reshape(
            num_rows, -1, SUMMED
        )
        sums = jnp.einsum("rjm,rjma->rja", values, member, precision=jax.lax.Precision.HIGHEST).sum(1)
        return jnp.where(batch.valid[:, None], sums.reshape(-1)[batch.answer_slots], 0.0)

    count = per_answer(jnp.ones_like(tokens.logp))
    tail_sum = None
    if tail:
        slots = jnp.where(batch.valid[:, None], batch.answer_slots, num_slots)  # empty ones are dropped
        shorter = jnp.broadcast_to(count.min(1, keepdims=True), slots.shape)
        shorter = jnp.zeros(num_slots).at[slots].set(shorter, mode="drop").reshape(mask.shape[0], -1)
        in_tail = batch.target_offsets >= jnp.take_along_axis(shorter, batch.target_answers, axis=1)
        tail_sum = per_answer(jnp.where(in_tail, tokens.logp, 0.0))
    return PairLogps(
        sum=per_answer(tokens.logp),
        count=count,
        weight=batch.weight,
        valid=batch.valid,
        tail_sum=tail_sum,
        log_sum_sq=None if tokens.log_sum_sq is None else per_answer(tokens.log_sum_sq),
        stats=None if tokens.stats is None else TokenStats(*map(per_answer, tokens.stats)),
    )


def make_logps_fn(
    hidden_fn: Callable[..., Float[Array, "R T D"]],
    unembedding_fn: Callable[..., Float[Array, "V D"]],
    *,
    chunk: int,
    stats: bool = False,
    tail: bool = False,
    squares: bool = False,
    precision: str | None = None,
) -> LogpsFn:
    """``logps_fn(params, batch) -> PairLogps`` of a model given as two pure functions, over packed rows.

    Args:
        hidden_fn: (params, batch) to normalised hidden states; of adapters (params, batch, base).
        unembedding_fn: (params) to the matrix that scores the vocabulary; of adapters (params, base).
        chunk: targets of a row whose scores exist at one time.
        stats: also what only metrics want, `TokenStats`.
        tail: also ``tail_sum``, which ``loss.ld_alpha`` asks for.
        squares: also ``log_sum_sq``, which ``loss.weighting: wpo`` asks for.
        precision: of the products with the unembedding, as in ``jax.lax.Precision``; None: jax's default.
    """

    def logps_fn(params: Params, batch: PreferenceBatch, *frozen: Params) -> PairLogps:
        hidden, unembedding = hidden_fn(params, batch, *frozen), unembedding_fn(params, *frozen)
        tokens = target_logps(
            hidden, unembedding, batch, chunk=chunk, stats=stats, squares=squares, precision=precision
        )
        return pair_logps(tokens, batch, tail=tail)

    return logps_fn


def make_token_logps_fn(
    hidden_fn: Callable[..., Float[Array, "R T D"]],
    unembedding_fn: Callable[..., Float[Array, "V D"]],
    *,
    chunk: int,
    precision: str | None = None,
) -> Callable[..., Float[Array, "R M"]]:
    """As ``make_logps_fn``, but of each target by itself; see ``answer_values`` for whose it is."""

    def token_logps_fn(params: Params, batch: PreferenceBatch, *frozen: Params) -> Float[Array, "R M"]:
        hidden, unembedding = hidden_fn(params, batch, *frozen), unembedding_fn(params, *frozen)
        return target_logps(hidden, unembedding, batch, chunk=chunk, precision=precision).logp

    return token_logps_fn


def answer_values(values: Float[np.ndarray, "R M"], batch: PreferenceBatch) -> list[list[np.ndarray]]:
    """What stands at the targets, by pair and answer, in the order of the answer's tokens; empty in empty slots."""
    per_row = batch.answers_per_row

    def of(slot: int, valid: bool) -> np.ndarray:
        row, place = divmod(slot, per_row)
        own = np.asarray(batch.target_mask[row] & (batch.target_answers[row] == place)) & valid
        return np.asarray(values[row][own][np.argsort(batch.target_offsets[row][own])])

    pairs = zip(batch.answer_slots.tolist(), batch.valid.tolist(), strict=True)
    return [[of(slot, valid) for slot in slots] for slots, valid in pairs]


def make_padded_logps_fn(
    apply: Callable[[Params, Int[AnyArray, "n T"]], Float[Array, "n T V"]], *, tail: bool = False, squares: bool = False
) -> LogpsFn:
    """``logps_fn`` of any model from tokens to next-token scores, over a ``PaddedBatch``; no packing, full scores.

    ``tail`` and ``squares`` as in ``make_logps_fn``.
    """

    def logps_fn(params: Params, batch: PaddedBatch) -> PairLogps:
        tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
        tokens = logps_of_logits(apply(params, tokens)[:, :-1], tokens[:, 1:], squares=squares)
        mask = batch.mask[:, :, 1:] & batch.valid[:, None, None]
        per_answer = lambda x, mask: jnp.where(mask, x.reshape(mask.shape), 0.0).sum(-1)  # noqa: E731
        count = mask.sum(-1)
        in_tail = mask & (mask.cumsum(-1) > count.min(1)[:, None, None])
        return PairLogps(
            sum=per_answer(tokens.logp, mask),
            count=count.astype(jnp.float32),
            weight=batch.weight,
            valid=batch.valid,
            tail_sum=per_answer(tokens.logp, in_tail) if tail else None,
            log_sum_sq=None if tokens.log_sum_sq is None else per_answer(tokens.log_sum_sq, mask),
        )

    return logps_fn
