"""Per-token rewards: an answer's implicit reward is beta times the sum of its tokens' log-ratios."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.batching.batches import Batches
from dpo_jax.batching.to_devices import ToDevices
from dpo_jax.data.store import Store
from dpo_jax.inference.reference import LiveReference
from dpo_jax.logprobs import answer_values
from dpo_jax.parallel.sharding import replicated

BRANCHES = ("chosen", "rejected")
CONTEXT_TOKENS = 4  # prompt tokens decoded with the answer, as a token's text may depend on the tokens before it
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder emits for an incomplete character


def token_fields(
    ratios: Iterable[tuple[int, list[np.ndarray]]], store: Store, tokenizer: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (example id, fields) for every pair in ``ratios``, the output of ``token_log_ratios``.

    The fields are ``prompt``; ``pieces/ANSWER``, the text of each token of an answer; and ``log_ratios/ANSWER``, each
    token's log pi - log ref in nats, weighted as in the loss. The latter sum to the answer's log-ratio.
    """
    decode = decoder(tokenizer)
    for i, pair_ratios in ratios:
        prompt, answers, _ = store.example(i)
        fields: dict[str, Any] = {"prompt": decode(prompt.tolist())}
        for branch, answer, answer_ratios in zip(BRANCHES, answers, pair_ratios, strict=True):
            fields[f"pieces/{branch}"] = token_pieces(decode, prompt.tolist(), answer.tolist())
            fields[f"log_ratios/{branch}"] = answer_ratios.tolist()
        yield int(i), fields


def token_log_ratios(
    token_logps_fn: Callable[..., Any],
    weights: Any,
    reference: LiveReference,
    batches: Batches,
    to_devices: ToDevices,
    mesh: Mesh,
    ld_alpha: float | None = None,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (example id, token log-ratios of each answer, float32) for each pair; both models run the same program."""
    token_logps_step = jax.jit(token_logps_fn, out_shardings=replicated(mesh))
    gather = jax.jit(lambda batch: batch, out_shardings=replicated(mesh))  # a pair may lie in rows of two hosts
    for data in batches.ahead(range(batches.order.num_steps)):
        batch = to_devices(data.batch)
        ratios = np.asarray(token_logps_step(weights, batch)) - np.asarray(token_logps_step(reference.weights, batch))
        for i, pair_ratios in zip(data.ids, answer_values(ratios, jax.device_get(gather(batch))), strict=True):
            if i >= 0:
                yield i, weigh_tails(pair_ratios, ld_alpha)


def weigh_tails(answers: list[np.ndarray], ld_alpha: float | None) -> list[np.ndarray]:
    """Apply LD-DPO's weight to a pair's tokens beyond the shorter answer's length, as in ``losses.sequence_logps``."""
    if ld_alpha is None:
        return answers
    min_length = min(map(len, answers))
    return [np.where(np.arange(len(values)) < min_length, values, np.float32(ld_alpha) * values) for values in answers]


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Return a function that decodes token ids to text and keeps special tokens."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_pieces(decode: Callable[[list[int]], str], prompt: list[int], answer: list[int]) -> list[str]:
    """Return the text of each token of an answer, decoded after the prompt; joined, they are the answer's text.

    A character that spans several tokens belongs to the last of them, and the others are empty. An incomplete
    character at the end is returned as the decoder emits it.
    """
    start = max(0, len(prompt) - CONTEXT_TOKENS)
    while start > 0 and decode(prompt[start:]).startswith(INCOMPLETE):
        start -= 1
    ids = prompt[start:] + answer
    pieces = []
    num_decoded = context_start = 0  # the last decoded piece is decoded again as context of the next
    for end in range(1, len(ids) + 1):
        text = decode(ids[context_start:end])
        if text.endswith(INCOMPLETE) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(ids[context_start:num_decoded])) :])
        context_start, num_decoded = num_decoded, end
    return pieces[len(prompt) - start :]
