"""Token log-probs from hidden states, a chunk at a time, so that scores of all tokens over the vocabulary never exist.

Shape letters: R rows, T tokens, M targets, C targets in a chunk, D model, V vocabulary, B pairs, K answers of a prompt,
A answer slots in a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax.batch import AnyArray, PaddedBatch, PairLogps, PreferenceBatch, TokenStats

Params = Any  # a tree of arrays
LogpsFn = Callable[[Params, Any], PairLogps]


class TokenLogps(NamedTuple):
    """Of each target, float32."""

    logp: Float[Array, "*n"]  # log pi(token | what it sees), nats
    stats: tuple[Float[Array, "*n"], Float[Array, "*n"], Float[Array, "*n"]] | None = None  # as in ``TokenStats``


def logps_of_logits(logits: Float[Array, "*n V"], labels: Int[AnyArray, "*n"], stats: bool) -> TokenLogps:
    """Log-softmax at the labels, in float32. A label's score is picked by a masked sum, local where V is sharded."""
    logits = logits.astype(jnp.float32)
    label = jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0).sum(-1)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    if not stats:
        return TokenLogps(label - normalizer)
    fixed, total = jax.lax.stop_gradient(logits), jax.lax.stop_gradient(normalizer)
    expected = (jnp.exp(fixed - total[..., None]) * fixed).sum(-1)
    top1 = (jax.lax.stop_gradient(label) >= fixed.max(-1)).astype(jnp.float32)
    return TokenLogps(label - normalizer, (total - expected, fixed.mean(-1), top1))


def target_logps(
    hidden: Float[Array, "R T D"], unembedding: Float[Array, "V D"], batch: PreferenceBatch, *, chunk: int, stats: bool
) -> TokenLogps:
    """Log-probs of the batch's targets.

    At most ``chunk`` targets a row have scores at one time: the backward pass computes each chunk's scores again.
    """
    num_targets = batch.target_tokens.shape[1]
    num_chunks = -(-num_targets // chunk)
    size = -(-num_targets // num_chunks)
    padding = ((0, 0), (0, num_chunks * size - num_targets))
    in_chunks = lambda x: jnp.pad(x, padding).reshape(x.shape[0], num_chunks, size).swapaxes(0, 1)  # noqa: E731

    mean_row = jax.lax.stop_gradient(unembedding).mean(0, dtype=jnp.float32)

    @jax.checkpoint
    def one(sources, labels):
        states = jnp.take_along_axis(hidden, sources[..., None], axis=1)  # [R, C, D]
        logits = jnp.einsum("rcd,vd->rcv", states, unembedding, preferred_element_type=jnp.float32)
        tokens = logps_of_logits(logits, labels, stats)
        if tokens.stats is None:
            return tokens
        entropy, _, top1 = tokens.stats  # the mean score is the score of the mean row, without another look at all V
        fixed = jax.lax.stop_gradient(states).astype(jnp.float32)
        mean_logit = jnp.einsum("rcd,d->rc", fixed, mean_row, precision=jax.lax.Precision.HIGHEST)
        return TokenLogps(tokens.logp, (entropy, mean_logit, top1))

    _, chunks = jax.lax.scan(
        lambda _, part: (None, one(*part)), None, (in_chunks(batch.target_sources), in_chunks(batch.target_tokens))
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :num_targets], chunks)


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
