"""Inputs and outputs of the model in a training step: packed rows of tokens, and the log-probs of answers.

Shape letters, the same in every file: B pairs, R rows, T tokens per row, M targets per row, K answers per prompt
(2: chosen, rejected; 1 in fine-tuning), A answer slots per row, V vocabulary, D model width.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

AnyArray = jax.Array | np.ndarray  # numpy on the host, JAX on the devices
Params = Any  # pytree of arrays
CHOSEN, REJECTED = 0, 1  # indices on the K axis
BLOCK = 64  # tokens per block: a row is a whole number of blocks; attention visits only the block pairs it needs


def round_up(number: float, multiple: int) -> int:
    """Round a number up to a multiple of ``multiple``; the result is at least ``multiple``."""
    return multiple * max(1, math.ceil(number / multiple))


@struct.dataclass
class PreferenceBatch:
    """Pairs of a step packed into rows, as units ``[prompt][chosen][rejected]`` back to back; no unit spans two rows.

    A token attends to a key if both are in the same segment, the key is not later, and the key is in the prompt
    (branch 0) or in the token's own branch. So both answers share one copy of their prompt, and labels are not a plain
    shift: each target names the token that predicts it (the last prompt token predicts both answers' first tokens).
    """

    tokens: Int[AnyArray, "*a R T"]
    positions: Int[AnyArray, "*a R T"]  # rotary positions; those of `rejected` restart at the end of the prompt
    segments: Int[AnyArray, "*a R T"]  # 0: padding; else 1 + the unit's index in its row
    branches: Int[AnyArray, "*a R T"]  # 0: prompt; 1: chosen; 2: rejected
    target_tokens: Int[AnyArray, "*a R M"]  # token to predict
    target_sources: Int[AnyArray, "*a R M"]  # index in the row of the token that predicts it
    target_answers: Int[AnyArray, "*a R M"]  # answer slot in the row that the target belongs to
    target_offsets: Int[AnyArray, "*a R M"]  # index of the target in its answer, from 0
    target_mask: Bool[AnyArray, "*a R M"]  # False: unused target
    answer_slots: Int[AnyArray, "*a B K"]  # location of answer (pair, branch): row * answers_per_row + slot
    weight: Float[AnyArray, "*a B"]  # loss weight of the pair
    margin: Float[AnyArray, "*a B"]  # m: margin by which a reward model should score chosen above rejected
    valid: Bool[AnyArray, "*a B"]  # False: padding of a ragged last step
    blocks: Int[AnyArray, "*a R J 2"]  # sorted (query block, key block) pairs with any visible key; -1: unused
    answers_per_row: int = struct.field(pytree_node=False)
    longest: int = struct.field(pytree_node=False)  # upper bound on tokens of a prompt plus one of its answers
    branch_length: int = struct.field(pytree_node=False)  # upper bound on a row's prompt tokens plus one branch's
    label: Float[AnyArray, "*a B"] | None = None  # probability that `chosen` is the better answer; None: 1
    sampled_sum: Float[AnyArray, "*a B K"] | None = None  # log pi(y | x) by the sampler, if the policy sampled y

    def per_array(self, rows: Any, pairs: Any) -> "PreferenceBatch":
        """Return a copy in which ``rows`` replaces each array that has a row dim, and ``pairs`` each other array."""
        pair_fields = {"answer_slots", "weight", "margin", "valid", "label", "sampled_sum"}
        pytree_names = (f.name for f in fields(self) if f.metadata.get("pytree_node", True))
        array_names = (name for name in pytree_names if getattr(self, name) is not None)
        return replace(self, **{name: pairs if name in pair_fields else rows for name in array_names})

    def answer_begins(self) -> Bool[jax.Array, "R T"]:
        """Return whether each token is the first of an answer."""
        branch_ids = jnp.stack([self.segments, self.branches])
        is_boundary = (branch_ids[:, :, 1:] != branch_ids[:, :, :-1]).any(0)
        return jnp.pad(is_boundary, ((0, 0), (1, 0)), constant_values=True) & (self.branches > 0)

    def gather_pairs(self, values: Float[AnyArray, "R A"]) -> Float[jax.Array, "B K"]:
        """Gather one value per answer slot from the rows into pairs; 0 for padding pairs."""
        return jnp.where(self.valid[:, None], values.reshape(-1)[self.answer_slots], 0.0)

    def gather_tokens(self, values: Float[AnyArray, "R M"], num_tokens: int) -> Float[jax.Array, "B K N"]:
        """Gather one value per target into answers of ``num_tokens`` values; 0 where there is no target."""
        row_indices = jnp.arange(len(values))[:, None]
        answer_values = jnp.zeros((len(values), self.answers_per_row, num_tokens))
        values = jnp.where(self.target_mask, values, 0.0)
        answer_values = answer_values.at[row_indices, self.target_answers, self.target_offsets].add(values)
        answer_values = answer_values.reshape(-1, num_tokens)[self.answer_slots]
        return jnp.where(self.valid[:, None, None], answer_values, 0.0)


class Adapted(NamedTuple):
    """Weights of a model with adapters: only the adapters are trained, and the base weights alone are the reference."""

    adapters: Params | None
    base: Params


@struct.dataclass
class TokenStats:
    """Sums over answer tokens, used only by metrics, each [B, K] float32; divide by ``PairLogps.count`` for means."""

    entropy: Float[AnyArray, "B K"]  # nats
    mean_logit: Float[AnyArray, "B K"]  # mean over the vocabulary, summed over tokens
    top1: Float[AnyArray, "B K"]  # number of tokens that were the model's top prediction


class BalanceSums(NamedTuple):
    """Sums over tokens that determine the load-balancing loss of a mixture of experts; add them to combine batches.

    L layers, E experts. A token of a prompt counts once for each of its answers.
    """

    chosen: Float[AnyArray, "*L E"]  # tokens that chose an expert
    probs: Float[AnyArray, "*L E"]  # sum of the router's softmax
    weight: Float[AnyArray, "*L"]  # number of tokens


class RoutedHidden(NamedTuple):
    """Hidden states of a mixture of experts, with the sums and the coefficient of its load-balancing loss."""

    hidden: Float[jax.Array, "R T D"]
    balance: BalanceSums
    balance_coef: float  # of the load-balancing loss


@struct.dataclass
class PairLogps:
    """Log-probs of each pair's answers, in nats, float32."""

    sum: Float[AnyArray, "B K"]  # log pi(y | x), summed over the answer's tokens
    count: Float[AnyArray, "B K"]  # |y|, number of tokens in the answer
    weight: Float[AnyArray, " B"]
    valid: Bool[AnyArray, " B"]
    tail_sum: Float[AnyArray, "B K"] | None = None  # sum over tokens past the shorter answer's length (LD-DPO)
    log_sum_sq: Float[AnyArray, "B K"] | None = None  # log of the sum over V of p^2, summed over tokens (WPO)
    stats: TokenStats | None = None
    margin: Float[AnyArray, " B"] | None = None  # as in `PreferenceBatch`
    label: Float[AnyArray, " B"] | None = None  # as in `PreferenceBatch`
    sampled_sum: Float[AnyArray, "B K"] | None = None  # as in `PreferenceBatch`
    balance: BalanceSums | None = None  # of a mixture of experts, over all tokens of the pairs
    balance_coef: float = struct.field(pytree_node=False, default=0.0)  # of the load-balancing loss
    scored: bool = struct.field(pytree_node=False, default=False)  # ``sum`` is a reward model's score, not a log-prob


@struct.dataclass
class PaddedBatch:
    """Pairs for a model that takes plain tokens: each prompt followed by each of its answers, right-padded."""

    tokens: Int[AnyArray, "*a B K T"]
    mask: Bool[AnyArray, "*a B K T"]  # True: an answer token, whose log-prob counts
    weight: Float[AnyArray, "*a B"]
    valid: Bool[AnyArray, "*a B"]


def pad_pairs(prompts: Sequence[Sequence[int]], *answers: Sequence[Sequence[int]], pad_id: int = 0) -> PaddedBatch:
    """Build a ``PaddedBatch``: ``pad_pairs(prompts, chosen, rejected)``, each a list of B lists of token ids.

    Raises:
        ValueError: the lists differ in length, or a prompt or answer is empty.
    """
    if {len(branch) for branch in answers} != {len(prompts)}:
        raise ValueError(f"{len(prompts)} prompts, but {[*map(len, answers)]} answers; pass lists of equal length")
    for i, sequences in enumerate(zip(prompts, *answers, strict=True)):
        if not all(map(len, sequences)):
            raise ValueError(f"pair {i} has an empty prompt or answer, so it has no log-prob; remove the pair")
    length = max(len(prompt) + len(branch[i]) for branch in answers for i, prompt in enumerate(prompts))
    tokens = np.full((len(prompts), len(answers), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, prompt in enumerate(prompts):
        for k, branch in enumerate(answers):
            end = len(prompt) + len(branch[i])
            tokens[i, k, :end] = [*prompt, *branch[i]]
            mask[i, k, len(prompt) : end] = True
    ones = np.ones(len(prompts), np.float32)
    return PaddedBatch(tokens=tokens, mask=mask, weight=ones, valid=ones > 0)
