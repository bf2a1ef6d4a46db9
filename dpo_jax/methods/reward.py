"""Reward modeling: answer scores trained with the Bradley-Terry loss; pairs, packing and train step are DPO's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dpo_jax.data.store import Store
from dpo_jax.errors import UserError
from dpo_jax.methods.offline import Offline, Start, make_offline
from dpo_jax.methods.samples import make_start_answers
from dpo_jax.methods.setup import Setup, load_policy
from dpo_jax.models.heads import reward_hf_config


def reward(setup: Setup, flags: Mapping[str, str]) -> tuple[Offline, Start]:
    """Build the method that trains a reward model, and the arrays it starts from; ``flags`` are compiler options."""
    stores = [batches.store for batches in (setup.batches, *setup.evals.values())]
    pad_id = unused_end(setup.tokenizer, setup.model.config.vocab, stores)
    setup = replace(setup, hf_config=reward_hf_config(setup.source.hf_config, pad_id))
    samples = make_start_answers(setup)  # first, while no other weights are loaded
    return make_offline(setup, load_policy(setup), None, flags, samples)


def unused_end(tokenizer: Any, vocab: int, stores: Sequence[Store]) -> int:
    """Return a padding token that ends no answer: the tokenizer's own if possible, else an unused or special one.

    transformers reads the score at the last token that is not padding. Where padding is the end-of-sequence token, as
    is common, that would be the token before the end.

    Raises:
        UserError: every special token ends an answer, and the vocabulary has no token without text.
    """
    end_ids = {tokenizer.eos_token_id}.union(*(last_tokens(store).tolist() for store in stores))
    for token in candidates(tokenizer, vocab):
        if token is not None and token not in end_ids:
            return int(token)
    remedy = "add a padding token to the tokenizer, so that exported scores are read at the end of an answer"
    raise UserError(f"model.tokenizer: every special token may end an answer; {remedy}")


def candidates(tokenizer: Any, vocab: int) -> Iterator[int | None]:
    """Yield token ids that may serve as padding, best first; None for a token that the tokenizer lacks."""
    yield tokenizer.pad_token_id
    yield tokenizer.unk_token_id
    yield from range(len(tokenizer), vocab)  # rows of the embedding that stand for no token
    yield from tokenizer.all_special_ids


def last_tokens(store: Store) -> np.ndarray:
    """Return the last token of every answer, [N * K]."""
    last_positions = store.starts[:, None] + np.cumsum(store.lengths, axis=1) - 1
    return np.asarray(store.tokens[last_positions[:, 1:].ravel()])
