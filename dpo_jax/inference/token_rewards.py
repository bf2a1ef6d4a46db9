"""Which tokens earn a reward: an answer's implicit reward is beta times a sum over its tokens, so each has its part."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.batching.batches import Batches
from dpo_jax.batching.to_devices import ToDevices
from dpo_jax.data.store import Store
from dpo_jax.errors import UserError
from dpo_jax.inference.reference import LiveReference
from dpo_jax.logprobs import answer_values
from dpo_jax.parallel.sharding import replicated

BRANCHES = ("chosen", "rejected")
HEAD = 4  # tokens of the prompt that are decoded before an answer's: what a token reads as may depend on those before
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for a part of a character


def refuse_per_token(reference_mode: Literal["live", "cached", "none"]) -> None:
    """Tokens need a reference that can be run.

    Raises:
        UserError: there is none, or it is a cache of sums.
    """
    if reference_mode == "cached":
        raise UserError(
            "--per-token: reference.mode cached keeps the sums of whole answers only; add --reference.mode live"
        )
    if reference_mode == "none":
        raise UserError(
            "--per-token: reference.mode none leaves nothing to compare a token with; leave --per-token out, or take a "
            "loss that has a reference, and reference.mode live"
        )


def token_fields(
    ratios: Iterable[tuple[int, list[np.ndarray]]], store: Store, tokenizer: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(example id, fields) of every pair whose ``token_log_ratios`` are given.

    The fields: ``prompt``; ``pieces/ANSWER``, the text of each token of an answer; ``log_ratios/ANSWER``, of each
    token log pi - log ref, nats, as the loss weighs it. Their sum is the answer's log-ratio.
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
    """(example id, log-ratios of each answer's tokens, float32) of every pair; policy and reference by one program."""
    token_logps = jax.jit(token_logps_fn, out_shardings=replicated(mesh))
    gather = jax.jit(lambda batch: batch, out_shardings=replicated(mesh))  # a pair may lie in rows of two hosts
    for data in batches.ahead(range(batches.order.num_steps)):
        batch = to_devices(data.batch)
        ratios = np.asarray(token_logps(weights, batch)) - np.asarray(token_logps(reference.weights, batch))
        for i, pair_ratios in zip(data.ids, answer_values(ratios, jax.device_get(gather(batch))), strict=True):
            if i >= 0:
                yield i, weigh_tails(pair_ratios, ld_alpha)


def weigh_tails(answers: list[np.ndarray], ld_alpha: float | None) -> list[np.ndarray]:
    """Token values of a pair with LD-DPO's weight on those beyond the shorter answer, as ``losses.sequence_logps``."""
    if ld_alpha is None:
        return answers
    shorter = min(map(len, answers))
    return [np.where(np.arange(len(values)) < shorter, values, np.float32(ld_alpha) * values) for values in answers]


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids to their text, special tokens written out."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_pieces(decode: Callable[[list[int]], str], prompt: list[int], answer: list[int]) -> list[str]:
    """Text of each token of an answer, as it reads after the prompt; together they are the answer's text.

    A character made of several tokens belongs to the last of them, the others are empty; a part of a character that
    nothing completes is written as the decoder writes it, at the end.
    """
    start = max(0, len(prompt) - HEAD)
    while start > 0 and decode(prompt[start:]).startswith(INCOMPLETE):
        start -= 1
    ids = prompt[start:] + answer
    pieces = []
    written = before = 0  # tokens whose text is written; of these, the last ones are decoded again with what follows
    for end in range(1, len(ids) + 1):
        text = decode(ids[before:end])
        if text.endswith(INCOMPLETE) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(ids[before:written])) :])
        before, written = written, end
    return pieces[len(prompt) - start :]
