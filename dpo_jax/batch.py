"""What a step is fed and what it is judged by: packed rows of tokens, and log-probs of answers.

Shape letters, the same in every file: B pairs, R rows, T tokens in a row, M targets in a row, K answers of a prompt
(2: chosen, rejected; 1 when fine-tuning), A answer slots in a row, V vocabulary, D model width.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

AnyArray = jax.Array | np.ndarray  # numpy's on the host, jax's on the devices
Params = Any  # a tree of arrays
CHOSEN, REJECTED = 0, 1  # places on the K axis
BLOCK = 64  # tokens in a block: rows are whole blocks, and attention visits only the pairs of blocks it needs


def up(number: float, multiple: int) -> int:
    """The next multiple, at least one."""
    return multiple * max(1, math.ceil(number / multiple))


@struct.dataclass
class PreferenceBatch:
    """Pairs of one step, packed into rows; a row holds whole units ``[prompt][chosen][rejected]``, one after another.

    A token sees a key when both lie in one segment, the key is not later, and the key is in the prompt (branch 0) or
    in the token's own branch. So both answers follow one stored copy of their prompt, and labels are no plain shift:
    every target names the token whose hidden state predicts it (the last prompt token predicts both first tokens).
    """

    tokens: Int[AnyArray, "*a R T"]
    positions: Int[AnyArray, "*a R T"]  # for the rotary embedding; `rejected` restarts where the prompt ends
    segments: Int[AnyArray, "*a R T"]  # 0: padding; else one more than the unit's place in its row
    branches: Int[AnyArray, "*a R T"]  # 0: prompt; 1: chosen; 2: rejected
    target_tokens: Int[AnyArray, "*a R M"]  # the token to be predicted
    target_sources: Int[AnyArray, "*a R M"]  # index, in the row, of the token that predicts it
    target_answers: Int[AnyArray, "*a R M"]  # answer slot, in the row, that the target belongs to
    target_offsets: Int[AnyArray, "*a R M"]  # place of the target in its answer, from 0
    target_mask: Bool[AnyArray, "*a R M"]  # False: an unused target
    answer_slots: Int[AnyArray, "*a B K"]  # where answer (pair, branch) was laid: row * answers_per_row + slot
    weight: Float[AnyArray, "*a B"]  # weight of the pair in the loss
    valid: Bool[AnyArray, "*a B"]  # False: an empty slot of a ragged last step
    blocks: Int[AnyArray, "*a R J 2"]  # (query block, key block) between which something is seen, sorted; -1: unused
    answers_per_row: int = struct.field(pytree_node=False)
    longest: int = struct.field(pytree_node=False)  # no prompt with one of its answers has more tokens
    branch_length: int = struct.field(pytree_node=False)  # no row's prompts with one branch's answers have more tokens

    def place(self, rows: Any, pairs: Any) -> "PreferenceBatch":
        """A batch that holds, in place of each array, ``rows`` where it has a dim R, else ``pairs``: shardings, say."""
        per_pair = {"answer_slots", "weight", "valid"}
        arrays = (f.name for f in fields(self) if f.metadata.get("pytree_node", True))
        return replace(self, **{name: pairs if name in per_pair else rows for name in arrays})


class Adapted(NamedTuple):
    """The weights of a model with adapters, which alone are trained; without them it is the reference."""

    adapters: Params | None
    base: Params


@struct.dataclass
class TokenStats:
    """Sums over answer tokens that only metrics need, each [B, K] float32; divide by ``PairLogps.count``."""

    entropy: Float[AnyArray, "B K"]  # nats
    mean_logit: Float[AnyArray, "B K"]  # mean over the vocabulary, summed over tokens
    top1: Float[AnyArray, "B K"]  # tokens that were the model's first choice


@struct.dataclass
class PairLogps:
    """Log-probabilities of the answers of each pair, in nats, float32."""

    sum: Float[AnyArray, "B K"]  # log pi(y | x): summed over the answer's tokens
    count: Float[AnyArray, "B K"]  # |y|: tokens of the answer
    weight: Float[AnyArray, " B"]
    valid: Bool[AnyArray, " B"]
    tail_sum: Float[AnyArray, "B K"] | None = None  # of sum, the tokens beyond the pair's shorter answer (LD-DPO)
    log_sum_sq: Float[AnyArray, "B K"] | None = None  # summed over tokens: log of the sum over V of p^2 (WPO)
    stats: TokenStats | None = None


def stop_gradient(logps: PairLogps) -> PairLogps:
    """The same numbers, through which no gradient flows."""
    return jax.tree.map(jax.lax.stop_gradient, logps)


@struct.dataclass
class PaddedBatch:
    """Pairs for a model that takes plain tokens: every prompt with each of its answers, padded on the right."""

    tokens: Int[AnyArray, "*a B K T"]
    mask: Bool[AnyArray, "*a B K T"]  # True: an answer token, whose log-prob counts
    weight: Float[AnyArray, "*a B"]
    valid: Bool[AnyArray, "*a B"]


def pad_pairs(prompts: Sequence[Sequence[int]], *answers: Sequence[Sequence[int]], pad_id: int = 0) -> PaddedBatch:
    """Token lists -> ``PaddedBatch``: ``pad_pairs(prompts, chosen, rejected)``, each a list of B lists of token ids.

    Raises:
        ValueError: the lists differ in length, or one of the prompts or answers is empty.
    """
    if {len(branch) for branch in answers} != {len(prompts)}:
        raise ValueError(f"{len(prompts)} prompts, but {[len(branch) for branch in answers]} answers")
    for i, sequences in enumerate(zip(prompts, *answers, strict=True)):
        if not all(map(len, sequences)):
            raise ValueError(f"pair {i} has an empty prompt or answer: its log-prob is that of nothing")
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
