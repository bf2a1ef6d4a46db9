"""Log-probs of a batch's targets from hidden states, and their sums over each pair's answers.

Shape letters: R rows, T tokens, M targets, D model, V vocabulary, B pairs, K answers per prompt, A answer slots of a
row.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.batch import AnyArray, PaddedBatch, PairLogps, Params, PreferenceBatch, RoutedHidden, TokenStats
from dpo_jax.ops.token_logps import Options, TargetStats, TokenLogps, score_targets
from dpo_jax.parallel.sharding import constrain_rows

PARTIAL_SUM_SIZE = 32  # log-probs per partial sum
BLOCK = 8192  # default number of vocabulary rows whose logits are in memory at a time
LogpsFn = Callable[[Any, Any], PairLogps]  # (weights, batch); weights are a pytree of arrays, such as `Adapted`


def logps_of_logits(
    logits: Float[Array, "*n V"], labels: Int[AnyArray, "*n"], *, stats: bool = False, squares: bool = False
) -> TokenLogps:
    """Compute the log-softmax at the labels in float32, by a masked sum that never gathers a sharded vocabulary."""
    logits = logits.astype(jnp.float32)
    label_logit = jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0).sum(-1)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    token_logps = TokenLogps(label_logit - normalizer, normalizer)
    if squares:
        token_logps = token_logps._replace(log_sum_sq=jax.nn.logsumexp(2 * logits, axis=-1) - 2 * normalizer)
    if stats:
        logits, label_logit, normalizer = jax.lax.stop_gradient((logits, label_logit, normalizer))
        expected_logit = (jnp.exp(logits - normalizer[..., None]) * logits).sum(-1)
        top1 = (label_logit >= logits.max(-1)).astype(jnp.float32)
        token_logps = token_logps._replace(stats=TargetStats(normalizer - expected_logit, logits.mean(-1), top1))
    return token_logps


def target_logps(
    hidden: Float[Array, "R T D"],
    unembedding: Float[Array, "V D"],
    batch: PreferenceBatch,
    *,
    chunk: int,
    block: int = BLOCK,
    stats: bool = False,
    squares: bool = False,
    precision: str | None = None,
    softcap: float | None = None,
) -> TokenLogps:
    """Compute the log-probs of the batch's targets [R, M]; gradients flow through ``logp`` and ``log_sum_sq``.

    Logits exist for at most ``chunk`` targets per device and ``block`` vocabulary rows at a time, in the backward pass
    too. Values at unused targets are undefined.
    """
    states = constrain_rows(jnp.take_along_axis(hidden, batch.target_sources[..., None], axis=1))
    options = Options(chunk, block, stats, squares, precision, softcap)
    return score_targets(states, unembedding, batch.target_tokens, batch.target_mask, options)


def pair_logps(token_logps: TokenLogps, batch: PreferenceBatch, *, tail: bool = False) -> PairLogps:
    """Sum the log-probs over the targets of each answer, [B, K]; the sums of padding pairs are 0."""
    mask = batch.target_mask
    num_rows = mask.shape[0]
    num_slots = num_rows * batch.answers_per_row
    is_member = jax.nn.one_hot(jnp.where(mask, batch.target_answers, -1), batch.answers_per_row)  # [R, M, A]
    padding = (0, 0), (0, -mask.shape[1] % PARTIAL_SUM_SIZE)
    is_member = jnp.pad(is_member, (*padding, (0, 0))).reshape(num_rows, -1, PARTIAL_SUM_SIZE, batch.answers_per_row)

    def per_answer(values: Float[Array, "R M"]) -> Float[Array, "B K"]:
        # in two stages: one long float32 sum would lose precision
        values = jnp.pad(jnp.where(mask, values, 0.0), padding).reshape(num_rows, -1, PARTIAL_SUM_SIZE)
        sums = jnp.einsum("rjm,rjma->rja", values, is_member, precision=jax.lax.Precision.HIGHEST).sum(1)
        return batch.gather_pairs(sums)

    count = per_answer(jnp.ones_like(token_logps.logp))
    tail_sum = None
    if tail:
        slots = jnp.where(batch.valid[:, None], batch.answer_slots, num_slots)  # num_slots is out of range: dropped
        shorter_counts = jnp.broadcast_to(count.min(1, keepdims=True), slots.shape)
        shorter_counts = jnp.zeros(num_slots).at[slots].set(shorter_counts, mode="drop").reshape(mask.shape[0], -1)
        is_in_tail = batch.target_offsets >= jnp.take_along_axis(shorter_counts, batch.target_answers, axis=1)
        tail_sum = per_answer(jnp.where(is_in_tail, token_logps.logp, 0.0))
    return PairLogps(
        sum=per_answer(token_logps.logp),
        count=count,
        weight=batch.weight,
        valid=batch.valid,
        tail_sum=tail_sum,
        log_sum_sq=None if token_logps.log_sum_sq is None else per_answer(token_logps.log_sum_sq),
        stats=None if token_logps.stats is None else TokenStats(*map(per_answer, token_logps.stats)),
        label=batch.label,
        sampled_sum=batch.sampled_sum,
    )


def make_logps_fn(
    hidden_fn: Callable[[Params, PreferenceBatch], Float[Array, "R T D"] | RoutedHidden],
    unembedding_fn: Callable[[Params], Float[Array, "V D"]],
    *,
    chunk: int,
    block: int = BLOCK,
    stats: bool = False,
    tail: bool = False,
    squares: bool = False,
    precision: str | None = None,
    softcap: float | None = None,
) -> LogpsFn:
    """Make ``logps_fn(weights, batch) -> PairLogps`` over packed rows, for a model given as two pure functions.

    Args:
        hidden_fn: (weights, batch) -> normalized hidden states, or those of a mixture of experts as `RoutedHidden`.
        unembedding_fn: (weights) -> the matrix that maps hidden states to logits.
        chunk: targets per device whose logits are in memory at a time.
        block: vocabulary rows over which these logits are computed at a time.
        stats: also compute `TokenStats`, used only by metrics.
        tail: also compute ``tail_sum``, required by ``loss.ld_alpha``.
        squares: also compute ``log_sum_sq``, required by ``loss.weighting: wpo``.
        precision: of the matmuls with the unembedding, as in ``jax.lax.Precision``; None: JAX's default.
        softcap: cap of the logits, which become cap * tanh(logit / cap); None: no cap.
    """
    options: dict[str, Any] = {"chunk": chunk, "block": block, "stats": stats, "squares": squares}
    options |= {"precision": precision, "softcap": softcap}

    def logps_fn(weights: Params, batch: PreferenceBatch) -> PairLogps:
        outputs = hidden_fn(weights, batch)
        is_mixture = isinstance(outputs, RoutedHidden)
        hidden = outputs.hidden if is_mixture else outputs
        logps = pair_logps(target_logps(hidden, unembedding_fn(weights), batch, **options), batch, tail=tail)
        return replace(logps, balance=outputs.balance, balance_coef=outputs.balance_coef) if is_mixture else logps

    return logps_fn


def make_token_logps_fn(
    hidden_fn: Callable[[Params, PreferenceBatch], Float[Array, "R T D"]],
    unembedding_fn: Callable[[Params], Float[Array, "V D"]],
    *,
    chunk: int,
    block: int = BLOCK,
    precision: str | None = None,
    softcap: float | None = None,
) -> Callable[[Params, PreferenceBatch], Float[Array, "R M"]]:
    """Make ``token_logps_fn(weights, batch)``, which returns one log-prob per target; `answer_values` groups them."""

    def token_logps_fn(weights: Params, batch: PreferenceBatch) -> Float[Array, "R M"]:
        hidden, unembedding = hidden_fn(weights, batch), unembedding_fn(weights)
        options: Any = {"chunk": chunk, "block": block, "precision": precision, "softcap": softcap}
        return target_logps(hidden, unembedding, batch, **options).logp

    return token_logps_fn


def answer_values(values: Float[np.ndarray, "R M"], batch: PreferenceBatch) -> list[list[np.ndarray]]:
    """Group per-target values by pair and answer, in the answer's token order; padding pairs get empty arrays."""
    slots_per_row = batch.answers_per_row

    def slot_values(slot: int, valid: bool) -> np.ndarray:
        row, answer = divmod(slot, slots_per_row)
        mask = np.asarray(batch.target_mask[row] & (batch.target_answers[row] == answer)) & valid
        return np.asarray(values[row][mask][np.argsort(batch.target_offsets[row][mask])])

    pairs = zip(batch.answer_slots.tolist(), batch.valid.tolist(), strict=True)
    return [[slot_values(slot, valid) for slot in slots] for slots, valid in pairs]


def make_padded_logps_fn(
    apply: Callable[[Params, Int[AnyArray, "n T"]], Float[Array, "n T V"]], *, tail: bool = False, squares: bool = False
) -> LogpsFn:
    """Make ``logps_fn`` over padded batches for any model that maps tokens to next-token logits, all held in memory.

    ``tail`` and ``squares`` as in ``make_logps_fn``.
    """

    def logps_fn(params: Params, batch: PaddedBatch) -> PairLogps:
        tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
        token_logps = logps_of_logits(apply(params, tokens)[:, :-1], tokens[:, 1:], squares=squares)
        mask = batch.mask[:, :, 1:] & batch.valid[:, None, None]
        per_answer = lambda x, mask: jnp.where(mask, x.reshape(mask.shape), 0.0).sum(-1)  # noqa: E731
        count = mask.sum(-1)
        is_in_tail = mask & (mask.cumsum(-1) > count.min(1)[:, None, None])
        return PairLogps(
            sum=per_answer(token_logps.logp, mask),
            count=count.astype(jnp.float32),
            weight=batch.weight,
            valid=batch.valid,
            tail_sum=per_answer(token_logps.logp, is_in_tail) if tail else None,
            log_sum_sq=None if token_logps.log_sum_sq is None else per_answer(token_logps.log_sum_sq, mask),
        )

    return logps_fn
