"""Token log-probs from hidden states, a chunk at a time, so that scores of all tokens over the vocabulary never exist.

Shape letters: R rows, T tokens, M targets, C targets in a chunk, D model, V vocabulary, B pairs, K answers of a prompt,
A answer slots in a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.batch import AnyArray, PaddedBatch, PairLogps, PreferenceBatch, TokenStats

Params = Any  # a tree of arrays
LogpsFn = Callable[[Params, Any], PairLogps]


class TargetStats(NamedTuple):
    """What only metrics need of each target; float32, without gradient."""

    entropy: Float[Array, "*n"]  # nats
    mean_logit: Float[Array, "*n"]  # over the vocabulary
    top1: Float[Array, "*n"]  # 1: the label was the model's first choice


class TokenLogps(NamedTuple):
    """Of each target, float32."""

    logp: Float[Array, "*n"]  # log pi(token | what it sees), nats
    normalizer: Float[Array, "*n"]  # logsumexp of the scores
    stats: TargetStats | None = None


def logps_of_logits(logits: Float[Array, "*n V"], labels: Int[AnyArray, "*n"], stats: bool) -> TokenLogps:
    """Log-softmax at the labels, in float32. A label's score is picked by a masked sum, local where V is sharded."""
    logits = logits.astype(jnp.float32)
    label = jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0).sum(-1)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    if not stats:
        return TokenLogps(label - normalizer, normalizer)
    fixed, total = jax.lax.stop_gradient(logits), jax.lax.stop_gradient(normalizer)
    expected = (jnp.exp(fixed - total[..., None]) * fixed).sum(-1)
    top1 = (jax.lax.stop_gradient(label) >= fixed.max(-1)).astype(jnp.float32)
    return TokenLogps(label - normalizer, normalizer, TargetStats(total - expected, fixed.mean(-1), top1))


def _scores(states: Float[Array, "n D"], unembedding: Float[Array, "V D"]) -> Float[Array, "n V"]:
    return jnp.einsum("nd,vd->nv", states, unembedding, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    states: Float[Array, "C n D"], unembedding: Float[Array, "V D"], labels: Int[Array, "C n"], used: Int[Array, ""],
    stats: bool,
) -> TokenLogps:  # fmt: skip
    """Log-probs of the first ``used`` of C chunks of n targets, one chunk's scores at a time; 0 in the others.

    Its gradient is written out, so that the backward pass, too, visits used chunks only and holds one chunk's scores:
    d log p_label / d scores = onehot(label) - p.
    """
    return _chunked_forward(states, unembedding, labels, used, stats)[0]


def _chunked_forward(states, unembedding, labels, used, stats):
    mean_row = unembedding.mean(0, dtype=jnp.float32)  # its score is a token's mean score, without a look at all V

    def one(i, out):
        tokens = logps_of_logits(_scores(states[i], unembedding), labels[i], stats)
        if tokens.stats is not None:
            mean_logit = jnp.dot(states[i].astype(jnp.float32), mean_row, precision=jax.lax.Precision.HIGHEST)
            tokens = tokens._replace(stats=tokens.stats._replace(mean_logit=mean_logit))
        return jax.tree.map(lambda all_chunks, own: all_chunks.at[i].set(own), out, tokens)

    zeros = jax.tree.map(
        lambda x: jnp.zeros(labels.shape, x.dtype),
        jax.eval_shape(lambda: logps_of_logits(_scores(states[0], unembedding), labels[0], stats)),
    )
    tokens = jax.lax.fori_loop(0, used, one, zeros)
    return tokens, (states, unembedding, labels, used, tokens.normalizer)


def _chunked_backward(stats, kept, cotangents):
    states, unembedding, labels, used, normalizer = kept

    def one(i, grads):
        by_states, by_unembedding = grads
        probs = jnp.exp(_scores(states[i], unembedding) - normalizer[i][:, None])
        onehot = jnp.arange(unembedding.shape[0]) == labels[i][:, None]
        by_scores = (cotangents.logp[i][:, None] * (onehot - probs)).astype(states.dtype)
        by_states = by_states.at[i].set(jnp.einsum("nv,vd->nd", by_scores, unembedding))
        own = jnp.einsum("nv,nd->vd", by_scores, states[i], preferred_element_type=jnp.float32)
        return by_states, by_unembedding + own

    zeros = jnp.zeros_like(states), jnp.zeros(unembedding.shape, jnp.float32)
    by_states, by_unembedding = jax.lax.fori_loop(0, used, one, zeros)
    return by_states, by_unembedding.astype(unembedding.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def target_logps(
    hidden: Float[Array, "R T D"], unembedding: Float[Array, "V D"], batch: PreferenceBatch, *, chunk: int, stats: bool
) -> TokenLogps:
    """Log-probs of the batch's targets, 0 in unused ones beyond the last chunk; differentiable in ``logp`` only.

    At most ``chunk`` targets a row have scores at one time, in the backward pass, too.
    """
    num_rows, num_targets = batch.target_tokens.shape
    num_chunks = -(-num_targets // chunk)
    size = -(-num_targets // num_chunks)

    def in_chunks(x: AnyArray) -> Array:
        """[R, M, ...] -> [chunks, R * targets of a chunk, ...]: scores are then one plain matrix, fastest on a CPU."""
        x = jnp.pad(x, ((0, 0), (0, num_chunks * size - num_targets)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(num_rows, num_chunks, size, *x.shape[2:]).swapaxes(0, 1).reshape(num_chunks, -1, *x.shape[2:])

    states = jnp.take_along_axis(hidden, batch.target_sources[..., None], axis=1)
    used = (in_chunks(batch.target_mask).any(1) * jnp.arange(1, num_chunks + 1)).max()
    tokens = _chunked(in_chunks(states), unembedding, in_chunks(batch.target_tokens), used, stats)
    in_rows = lambda x: x.reshape(num_chunks, num_rows, size).swapaxes(0, 1).reshape(num_rows, -1)  # noqa: E731
    return jax.tree.map(lambda x: in_rows(x)[:, :num_targets], tokens)


def pair_logps(tokens: TokenLogps, batch: PreferenceBatch) -> PairLogps:
    """Sums over each answer's targets, gathered from the rows into [B, K]; 0 in empty slots."""
    mask = batch.target_mask
    member = jax.nn.one_hot(batch.target_answers, batch.answers_per_row) * mask[..., None]  # [R, M, A]

    def per_answer(values: Float[Array, "R M"]) -> Float[Array, "B K"]:
        values = jnp.where(mask, values, 0.0)
        sums = jnp.einsum("rm,rma->ra", values, member, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(batch.valid[:, None], sums.reshape(-1)[batch.answer_slots], 0.0)

    stats = None
    if tokens.stats is not None:
        stats = TokenStats(*map(per_answer, tokens.stats))
    return PairLogps(
        sum=per_answer(tokens.logp),
        count=per_answer(jnp.ones_like(tokens.logp)),
        weight=batch.weight,
        valid=batch.valid,
        stats=stats,
    )


def make_logps_fn(
    hidden_fn: Callable[[Params, PreferenceBatch], Float[Array, "R T D"]],
    unembedding_fn: Callable[[Params], Float[Array, "V D"]],
    *,
    chunk: int,
    stats: bool = False,
) -> LogpsFn:
    """``logps_fn(params, batch) -> PairLogps`` of a model given as two pure functions, over packed rows."""

    def logps_fn(params: Params, batch: PreferenceBatch) -> PairLogps:
        hidden = hidden_fn(params, batch)
        return pair_logps(target_logps(hidden, unembedding_fn(params), batch, chunk=chunk, stats=stats), batch)

    return logps_fn


def make_padded_logps_fn(apply: Callable[[Params, Int[AnyArray, "n T"]], Float[Array, "n T V"]]) -> LogpsFn:
    """``logps_fn`` of any model from tokens to next-token scores, over a ``PaddedBatch``; no packing, full scores."""

    def logps_fn(params: Params, batch: PaddedBatch) -> PairLogps:
        num_pairs, num_answers, length = batch.tokens.shape
        logits = apply(params, batch.tokens.reshape(-1, length))[:, :-1]
        labels = batch.tokens.reshape(-1, length)[:, 1:]
        logp = logps_of_logits(logits, labels, stats=False).logp.reshape(num_pairs, num_answers, length - 1)
        mask = batch.mask[:, :, 1:] & batch.valid[:, None, None]
        return PairLogps(
            sum=jnp.where(mask, logp, 0.0).sum(-1),
            count=mask.sum(-1).astype(jnp.float32),
            weight=batch.weight,
            valid=batch.valid,
        )

    return logps_fn
