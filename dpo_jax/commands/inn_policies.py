"""Two kinds of policy for the inn: a table of next-token logits, and a small decoder.

The table can hold the optimum exactly and costs next to nothing, so what a method misses is the method's own. The
decoder is a `Model` like those that the commands train, and computes log-probs, values and scores by their functions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dpo_jax.batch import PairLogps, Params, PreferenceBatch
from dpo_jax.batching.packing import BatchShape, empty_batch
from dpo_jax.commands.inn import (
    BOS,
    FIRST_COURSE,
    FIRST_GUEST,
    MAX_TOKENS,
    NUM_COURSES,
    NUM_GUESTS,
    PAD,
    STOPS,
    VOCAB,
    Meals,
    Tree,
    language,
)
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.inference.generate import answer_rows
from dpo_jax.logprobs import LogpsFn, make_logps_fn
from dpo_jax.methods.value_model import make_answer_logps_fn, make_values_fn
from dpo_jax.models.decoder import Model
from dpo_jax.models.heads import make_scores_fn, without_unembedding
from dpo_jax.models.options import DecoderConfig
from dpo_jax.policy_gradient import TokensFn

DECODER = DecoderConfig(
    vocab=VOCAB,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=64,
    norm_eps=1e-5,
    init_std=0.08,
)
_MODEL = Model(config=DECODER, attention="xla")
PROMPT = 2  # tokens: <s> and the guest
CHUNK = 4096  # targets whose logits are in memory at a time


@dataclass(frozen=True, kw_only=True, eq=False)  # compiled runs are cached by its identity
class PolicyKind:
    """A kind of policy: the initial weights of its runs, and pure functions of such weights.

    The value model and the reward model are of the same kind. All functions but the last two take what ``inputs``
    returns.
    """

    start: Params
    start_value: Params
    start_reward: Params
    learning_rate: float
    inputs: Callable[..., Any]  # (answers [B, K], labels [B] of the pairs if they are soft) -> a batch of them
    logps_fn: TokensFn  # log-prob of each token
    values_fn: TokensFn  # value before each token
    pair_logps_fn: LogpsFn
    scores_fn: LogpsFn  # of the reward model
    answers: Callable[[Params, Array, Array], tuple[Meals, Array]]  # (weights, guests [R], key) -> and log-probs [R, N]
    next_logps: Callable[[Params], Callable[[np.ndarray], np.ndarray]]  # as `Tree.leaf_logps` takes it


class Batch(NamedTuple):
    """Inputs of the table's functions: answers, and labels of their pairs."""

    meals: Meals  # [B, K]
    label: Float[Array, " B"] | None = None  # as in `PreferenceBatch`


def table_policy() -> PolicyKind:
    """Return the table policy, whose weights are logits [guest, depth, previous course, next token]."""
    logits = jnp.asarray(language(), jnp.float32)
    return PolicyKind(
        start=logits,
        start_value=jnp.zeros(logits.shape[:-1]),
        start_reward=jnp.zeros(logits.shape),
        learning_rate=0.05,
        inputs=Batch,
        logps_fn=table_logps,
        values_fn=table_values,
        pair_logps_fn=table_pair_logps,
        scores_fn=table_scores,
        answers=table_answers,
        next_logps=table_next_logps,
    )


def table_logps(table: Float[Array, "guests depth previous V"], batch: Batch) -> Float[Array, "*B K N"]:
    """Return the log-prob of each token under the table policy; 0 at masked tokens."""
    return _cells(jax.nn.log_softmax(table), batch.meals)


def table_values(table: Float[Array, "guests depth previous"], batch: Batch) -> Float[Array, "*B K N"]:
    """Return the table value model's value before each token."""
    meals = batch.meals
    return jnp.where(meals.mask, table[_contexts(meals)], 0.0)


def table_pair_logps(table: Float[Array, "guests depth previous V"], batch: Batch) -> PairLogps:
    """Return the log-probs of answers: the `LogpsFn` of the table policy."""
    return _pair_logps(table_logps(table, batch).sum(-1), batch)


def table_scores(table: Float[Array, "guests depth previous V"], batch: Batch) -> PairLogps:
    """Return the scores of the table reward model, whose entries are summed over an answer's tokens."""
    return replace(_pair_logps(_cells(table, batch.meals).sum(-1), batch), scored=True)


def _pair_logps(sums: Float[Array, "B K"], batch: Batch) -> PairLogps:
    counts, ones = batch.meals.mask.sum(-1).astype(jnp.float32), jnp.ones(len(sums))
    return PairLogps(sums, counts, ones, ones > 0, label=batch.label)


def _cells(table: Float[Array, "guests depth previous V"], meals: Meals) -> Float[Array, "*B K N"]:
    """Return the table's entry for each token; 0 at masked tokens."""
    values = jnp.take_along_axis(table[_contexts(meals)], meals.tokens[..., None], axis=-1)[..., 0]
    return jnp.where(meals.mask, values, 0.0)


def _contexts(meals: Meals) -> tuple[Array, Array, Array]:
    """Return the table's indices before each token: guest, depth, previous course."""
    previous = jnp.clip(meals.tokens[..., :-1] - FIRST_COURSE, 0, NUM_COURSES - 1)
    pad_widths = [(0, 0)] * (previous.ndim - 1) + [(1, 0)]
    previous = jnp.pad(previous, pad_widths, constant_values=NUM_COURSES)
    return meals.guests[..., None], jnp.arange(MAX_TOKENS), previous


def table_answers(
    table: Float[Array, "guests depth previous V"], guests: Int[Array, " R"], key: Key[Array, ""]
) -> tuple[Meals, Float[Array, "R N"]]:
    """Sample an answer to each guest; return them and the log-prob of each token."""
    logps = jax.nn.log_softmax(table)

    def add_token(state: tuple[Array, Array], depth: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        previous, is_open = state
        next_logps = logps[guests, depth, previous]
        token = jax.random.categorical(jax.random.fold_in(key, depth), next_logps)
        logp = jnp.take_along_axis(next_logps, token[:, None], axis=1)[:, 0]
        course = token - FIRST_COURSE
        stays_open = is_open & (course >= 0) & (course < NUM_COURSES)
        return (jnp.clip(course, 0, NUM_COURSES - 1), stays_open), (token, is_open, jnp.where(is_open, logp, 0.0))

    start = jnp.full_like(guests, NUM_COURSES), jnp.ones_like(guests, bool)
    _, (tokens, mask, token_logps) = jax.lax.scan(add_token, start, jnp.arange(MAX_TOKENS))
    return Meals(guests, tokens.T, mask.T), token_logps.T


def table_next_logps(table: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that gives `Tree.leaf_logps` the table policy's next-token log-probs."""
    logps = _normalized(np.asarray(table))

    def next_logps(meals: np.ndarray) -> np.ndarray:
        depth = meals.shape[1]
        return logps[:, depth, meals[:, -1] if depth else [NUM_COURSES]]

    return next_logps


def _normalized(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def decoder_start(seed: int) -> Params:
    """Return the untrained weights of the decoder."""
    return jax.jit(_MODEL.init)(jax.random.key(seed))


def decoder_policy(start: Params) -> PolicyKind:
    """Return the decoder policy; its value and reward models start from its supervised weights ``start``, too.

    The head of the value model is 0, that of the reward model random.
    """
    model = _MODEL
    score_model = replace(model, config=replace(DECODER, scores=1))
    layers = without_unembedding(start)
    head = jax.random.normal(jax.random.key(0), (1, DECODER.hidden)) / (DECODER.hidden + 1) ** 0.5
    return PolicyKind(
        start=start,
        start_value=layers | {"score": jnp.zeros_like(head)},
        start_reward=layers | {"score": head},
        learning_rate=3e-3,
        inputs=packed,
        logps_fn=make_answer_logps_fn(model, MAX_TOKENS, chunk=CHUNK),
        values_fn=make_values_fn(score_model, MAX_TOKENS),
        pair_logps_fn=make_logps_fn(model.hidden, model.unembedding, chunk=CHUNK),
        scores_fn=make_scores_fn(score_model),
        answers=partial(decoder_answers, model),
        next_logps=partial(decoder_next_logps, model),
    )


def packed(meals: Meals, label: Float[Array, " B"] | None = None) -> PreferenceBatch:
    """Return a batch with one row for each answer: its prompt, then the answer."""
    num_pairs, num_answers = meals.guests.shape
    num_rows, length = num_pairs * num_answers, PROMPT + MAX_TOKENS
    shape = BatchShape(num_rows, length, MAX_TOKENS, answers=1, blocks=0, longest=length, branch_length=length)
    guests, tokens, mask = jax.tree.map(lambda x: x.reshape(num_rows, *x.shape[2:]), meals)
    tokens = jnp.where(mask, tokens, PAD)
    is_real = jnp.pad(mask, ((0, 0), (PROMPT, 0)), constant_values=True)
    in_each_row = lambda values: jnp.broadcast_to(values, (num_rows, len(values)))  # noqa: E731
    return replace(
        empty_batch(shape, num_pairs, num_answers, zeros=jnp.zeros),
        tokens=jnp.concatenate([prompts_of(guests), tokens], axis=1),
        positions=in_each_row(jnp.arange(length)),
        segments=is_real.astype(jnp.int32),
        branches=(is_real & (jnp.arange(length) >= PROMPT)).astype(jnp.int32),
        target_tokens=tokens,
        target_sources=in_each_row(jnp.arange(PROMPT - 1, length - 1)),
        target_offsets=in_each_row(jnp.arange(MAX_TOKENS)),
        target_mask=mask,
        answer_slots=jnp.arange(num_rows).reshape(num_pairs, num_answers),
        weight=jnp.ones(num_pairs),
        valid=jnp.ones(num_pairs, bool),
        label=label,
    )


def prompts_of(guests: Int[Array, " R"]) -> Int[Array, "R P"]:
    """Return the tokens of the prompt for each guest."""
    return jnp.stack([jnp.full_like(guests, BOS), FIRST_GUEST + guests], axis=1)


def decoder_answers(
    model: Model, weights: Params, guests: Int[Array, " R"], key: Key[Array, ""]
) -> tuple[Meals, Float[Array, "R N"]]:
    """Sample an answer to each guest with a cache of keys and values; return them and the log-prob of each token."""
    num_rows = len(guests)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_rows))
    lengths, options = jnp.full(num_rows, PROMPT), SamplingConfig(max_tokens=MAX_TOKENS)
    answers = answer_rows(model, weights, prompts_of(guests), lengths, keys, jnp.asarray(STOPS), options)
    mask = jnp.arange(MAX_TOKENS) < answers.lengths[:, None]
    return Meals(guests, answers.tokens, mask), answers.logps


def decoder_next_logps(model: Model, weights: Params) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that gives `Tree.leaf_logps` the decoder policy's next-token log-probs.

    One forward pass over the lists of 4 courses has those of fewer courses, too: as their first tokens.
    """
    meals = Tree().meals[MAX_TOKENS - 1]
    guests = np.repeat(np.arange(NUM_GUESTS), len(meals))
    tokens = np.full((len(guests), MAX_TOKENS), PAD)
    tokens[:, :-1] = FIRST_COURSE + np.tile(meals, (NUM_GUESTS, 1))
    logits = _compiled_logits(model)(weights, guests, tokens)
    logps = _normalized(np.asarray(logits)).reshape(NUM_GUESTS, len(meals), MAX_TOKENS, -1)

    def next_logps(meals: np.ndarray) -> np.ndarray:
        depth = meals.shape[1]
        return logps[:, :: NUM_COURSES ** (MAX_TOKENS - 1 - depth), depth]

    return next_logps


@cache
def _compiled_logits(model: Model) -> Callable[..., Array]:
    return jax.jit(partial(_logits, model))


def _logits(model: Model, weights: Params, guests: Array, tokens: Array) -> Float[Array, "R N V"]:
    """Return the logits before each token of an answer."""
    mask = jnp.ones(tokens.shape, bool)
    meals = jax.tree.map(lambda x: x[:, None], Meals(guests, tokens, mask))
    hidden = model.hidden(weights, packed(meals))[:, PROMPT - 1 : -1]
    return jnp.einsum("RND,VD->RNV", hidden, model.unembedding(weights), precision=jax.lax.Precision.HIGHEST)
