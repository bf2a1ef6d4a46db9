"""Tokenize examples: chat template, boundary between prompt and answer, special tokens, truncation.

The prompt ends where the encodings of the prompt alone and of prompt + answer diverge; a token that spans the boundary
belongs to the answer. Special tokens occur once: BOS as written by tokenizer or template, EOS after plain-text answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dpo_jax.config import NUM_ANSWERS, DataConfig, Stage
from dpo_jax.data.schemas import Example, Messages, Problem, common_prefix
from dpo_jax.data.template import RenderError, Template, missing_part, render
from dpo_jax.data.tokenizer import added_around
from dpo_jax.errors import UserError, from_outside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "zqxj"  # message content that shares no prefix with the end of a generation prompt
NOTES = {"straddling_token": "A token spans the boundary between prompt and answer; it belongs to the answer."}
"""Causes that are counted but do not make a row invalid."""


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of one example; the model reads `prompt + answers[k]`, and `prompt` is never empty.

    `targets` marks the tokens of `answers[0]` to predict (SFT on conversations; None: all). `notes` are repairs,
    truncations and the like, counted by cause: a field of ``InvalidRowsConfig`` or a key of ``NOTES``.
    """

    row: int
    prompt: list[int]
    answers: tuple[list[int], ...]
    targets: list[bool] | None
    weight: float
    notes: tuple[Problem, ...] = ()
    is_conversation: bool = False  # whether a chat template rendered it
    margin: float = 0.0


Tokenize = Callable[[Example], TokenizedExample | Problem]


def make_tokenize(data: DataConfig, tokenizer: "PreTrainedTokenizerBase", stage: Stage) -> Tokenize:
    """Return a picklable function that tokenizes examples as `data` configures.

    The function returns a ``Problem`` for an invalid row; its caller decides whether to drop the row or to raise.

    Raises:
        UserError: a row needs a chat template or an EOS token that the tokenizer lacks.
    """
    _, suffix_ids = added_around(tokenizer)
    encoder = _DataEncoder(tokenizer, Template(tokenizer, data.template_date), suffix_ids, data)
    return partial(_tokenize, encoder, NUM_ANSWERS[stage])


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt, never empty, and those that training appends to the text of its answers."""

    tokens: list[int]
    tail: list[int]


def make_tokenize_prompt(
    template_date: str, tokenizer: "PreTrainedTokenizerBase"
) -> Callable[[Example], TokenizedPrompt | Problem]:
    """Return a function that tokenizes a prompt, as training does, up to where the answer begins.

    Raises:
        UserError: a row needs a chat template that the tokenizer lacks.
    """
    _, suffix_ids = added_around(tokenizer)
    return partial(_tokenize_prompt, _Encoder(tokenizer, Template(tokenizer, template_date), suffix_ids))


@dataclass(frozen=True)
class _Encoder:
    """The tokenizer, its chat template, and the ids that the tokenizer appends to every text."""

    tokenizer: Any  # a PreTrainedTokenizerBase, whose type annotations are too broad to help
    template: Template
    suffix_ids: list[int]


@dataclass(frozen=True)
class _DataEncoder(_Encoder):
    """An encoder together with the options of the data."""

    data: DataConfig


def _encode(encoder: _Encoder, row: int, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Encode texts with at most one leading BOS, and without the ids that the tokenizer appends to every text."""
    remedy = "remove the row, or set model.tokenizer to another"
    with from_outside(f"row {row}: the tokenizer cannot encode the text", remedy):
        encoded = encoder.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    bos, suffix_length = encoder.tokenizer.bos_token_id, len(encoder.suffix_ids) if special else 0
    return [_drop_extra_bos(ids[: len(ids) - suffix_length], bos) for ids in encoded["input_ids"]]


def _drop_extra_bos(ids: list[int], bos: int | None) -> list[int]:
    """Remove duplicate leading BOS ids: the tokenizer adds one to a text that already starts with one."""
    num_extra = 0
    while bos is not None and ids[num_extra : num_extra + 2] == [bos, bos]:
        num_extra += 1
    return ids[num_extra:]


def _tokenize_prompt(encoder: _Encoder, example: Example) -> TokenizedPrompt | Problem:
    row, prompt, eos = example.row, example.prompt, encoder.tokenizer.eos_token_id
    assert prompt is not None, "a prompt is to be answered"
    try:
        if isinstance(prompt, str):
            (tokens,), tail = _encode(encoder, row, [prompt], special=True), [] if eos is None else [eos]
        else:
            text = render(encoder.template, example, prompt, prompt=True)
            omission = missing_part(encoder.template, example, prompt, render(encoder.template, example, prompt))
            if omission is not None:
                return Problem(row, "message_not_rendered", omission)
            answered = render(encoder.template, example, [*prompt, {"role": "assistant", "content": MARKER}])
            end = answered.rpartition(MARKER)[2] if MARKER in answered else ""
            tokens, tail = _encode(encoder, row, [text, end], special=False)
    except RenderError as error:
        return Problem(row, "template_refused", str(error))
    return TokenizedPrompt(tokens, tail) if tokens else Problem(row, "empty_prompt", "the prompt has no token")


def _with_eos(encoder: _DataEncoder, ids: list[int], row: int) -> list[int]:
    """Append EOS to the ids of a plain text, unless they already end with it or data.append_eos is false."""
    eos = encoder.tokenizer.eos_token_id
    if not encoder.data.append_eos:
        return ids
    if eos is None:
        raise UserError(f"row {row}: the tokenizer has no EOS token to end answers with; set data.append_eos to false")
    return ids if ids[-1:] == [eos] else [*ids, eos]


@dataclass(frozen=True)
class _Pieces:
    """Prompt and answer ids of an example, before or after truncation."""

    prompt: list[int]
    answers: list[list[int]]
    target_mask: list[bool] = field(default_factory=list)  # of prompt + answers[0]; empty if the prompt is separate
    notes: tuple[Problem, ...] = ()


def _tokenize(encoder: _DataEncoder, num_answers: int, example: Example) -> TokenizedExample | Problem:
    assert len(example.answers) == num_answers, f"{len(example.answers)} answers, the stage has {num_answers}"
    try:
        if num_answers == 0:
            prompt = _tokenize_prompt(encoder, example)
            pieces = prompt if isinstance(prompt, Problem) else _Pieces(prompt.tokens, [])
        else:
            pieces = (
                _tokenize_whole(encoder, example) if example.prompt is None else _tokenize_prompted(encoder, example)
            )
    except RenderError as error:
        return Problem(example.row, "template_refused", str(error))
    if isinstance(pieces, Problem):
        return pieces
    pieces = _truncate(encoder, example, pieces)
    if isinstance(pieces, Problem):
        return pieces
    notes = pieces.notes
    if num_answers == 2 and pieces.answers[0] == pieces.answers[1]:
        problem = Problem(example.row, "equal_answers", f"both answers are the same {len(pieces.answers[0])} tokens")
        if encoder.data.invalid_rows.equal_answers != "keep":
            return problem
        notes += (problem,)
    target_mask = pieces.target_mask[len(pieces.prompt) :]
    targets = None if all(target_mask) else target_mask
    is_conversation = not isinstance((example.prompt, *example.answers)[-1], str)
    answers = tuple(pieces.answers)
    numbers = {"weight": example.weight, "margin": example.margin}
    return TokenizedExample(
        example.row, pieces.prompt, answers, targets, notes=notes, is_conversation=is_conversation, **numbers
    )


def _tokenize_prompted(encoder: _DataEncoder, example: Example) -> _Pieces | Problem:
    """Tokenize prompt and answers; the prompt ends where its ids first differ from those of any prompt + answer."""
    row, notes = example.row, ()
    prompt: Any = example.prompt
    answers: Any = example.answers
    if isinstance(prompt, str):
        prompt_ids, *sequences = _encode(encoder, row, [prompt, *(prompt + answer for answer in answers)], special=True)
        sequences_with_eos = [_with_eos(encoder, ids, row) for ids in sequences]
    else:
        prompt_text = render(encoder.template, example, prompt, prompt=True)
        texts = [render(encoder.template, example, prompt + answer) for answer in answers]
        for answer, text in zip(answers, texts, strict=True):
            omission = missing_part(encoder.template, example, prompt + answer, text)
            if omission is not None:
                return Problem(row, "message_not_rendered", omission)
        divergence = min(common_prefix(prompt_text, text) for text in texts)
        if divergence < len(prompt_text):
            omission = prompt_text[divergence:][:40]
            notes = (_not_prefix(row, f"{omission!r} of the rendered prompt is not in the rendered conversation"),)
            if encoder.data.invalid_rows.template_not_prefix != "repair":
                return notes[0]
        prompt_ids, *sequences = _encode(encoder, row, [prompt_text, *texts], special=False)
        sequences_with_eos = sequences
    size = min(common_prefix(prompt_ids, ids) for ids in sequences)
    if size == 0:
        return Problem(row, "empty_prompt", "no token comes before the answers")
    if size == min(map(len, sequences)):
        return Problem(row, "empty_answer", "an answer adds no token to the prompt")
    if size < len(prompt_ids) and not notes:
        merged = encoder.tokenizer.decode(prompt_ids[size:])
        notes = (Problem(row, "straddling_token", f"the end of the prompt, {merged!r}, merges with an answer"),)
    return _Pieces(prompt_ids[:size], [ids[size:] for ids in sequences_with_eos], notes=notes)


def _tokenize_whole(encoder: _DataEncoder, example: Example) -> _Pieces | Problem:
    """Tokenize a text or a conversation; the targets are all tokens but the first, or those of the assistant turns."""
    answer: Any = example.answers[0]
    if isinstance(answer, str):
        (ids,) = _encode(encoder, example.row, [answer], special=True)
        ids = _with_eos(encoder, ids, example.row)
        return _split_ids(ids, [True] * len(ids)) or Problem(example.row, "empty_answer", "the text is a single token")
    text = render(encoder.template, example, answer)
    omission = missing_part(encoder.template, example, answer, text)
    if omission is not None:
        return Problem(example.row, "message_not_rendered", omission)
    turns = _assistant_turns(encoder, example, answer, text)
    if isinstance(turns, Problem):
        return turns
    spans, notes = turns
    if notes and encoder.data.invalid_rows.template_not_prefix != "repair":
        return notes[0]
    prefixes = [text[:position] for span in spans for position in span]
    ids, *prefix_ids = _encode(encoder, example.row, [text, *prefixes], special=False)
    bounds = [common_prefix(prefix, ids) for prefix in prefix_ids]
    target_mask = [False] * len(ids)
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        target_mask[start:end] = [True] * (end - start)
    pieces = _split_ids(ids, target_mask)
    if pieces is None:
        return Problem(example.row, "empty_answer", "no assistant message after the first message is to be trained on")
    return replace(pieces, notes=notes)


def _split_ids(ids: list[int], target_mask: list[bool]) -> _Pieces | None:
    """Split before the first target and drop all tokens after the last one; None if there is no target.

    The first token is never a target, because no token precedes it.
    """
    target_positions = [position for position, flag in enumerate(target_mask) if flag and position > 0]
    if not target_positions:
        return None
    first, end = target_positions[0], target_positions[-1] + 1
    return _Pieces(ids[:first], [ids[first:end]], [False] * first + target_mask[first:end])


def _not_prefix(row: int, detail: str) -> Problem:
    return Problem(row, "template_not_prefix", detail)


def _assistant_turns(encoder: _DataEncoder, example: Example, messages: Messages, text: str):
    """Return (spans, notes) or a ``Problem``; the spans [start, end) in `text` are the assistant turns to train on.

    A turn starts where the preceding conversation with its generation prompt ends. A template may render a turn
    differently when others follow: by its end alone (Phi-3 writes EOS after the last turn only), or otherwise (Qwen3
    removes thoughts), and the turn is then the longest tail of it that matches.
    """
    spans, changed_index = [], None
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0 or message.get("weight") == 0:
            continue
        prompt_text = render(encoder.template, example, messages[:index], prompt=True)
        turn_text = render(encoder.template, example, messages[: index + 1])
        start = common_prefix(prompt_text, text)
        end = _turn_end(encoder, example, messages[: index + 1], turn_text, text)
        if start < len(prompt_text) or end is None:
            changed_index = index
            # content may start like the end of the generation prompt, so a marker is used to find the turn's start
            marked_messages = [*messages[:index], message | {"content": MARKER}, *messages[index + 1 :]]
            start = common_prefix(prompt_text, render(encoder.template, example, marked_messages))
            turn_start = common_prefix(prompt_text, render(encoder.template, example, marked_messages[: index + 1]))
            turn = turn_text[turn_start:]
            tails = (turn[cut:] for cut in range(len(turn)))
            tail = next((tail for tail in tails if tail.strip() and text.startswith(tail, start)), None)
            if tail is None or (spans and start < spans[-1][1]):
                return _not_prefix(example.row, f"message {index} cannot be found in the rendered conversation")
            end = start + len(tail)
        spans.append((start, end))
    detail = f"message {changed_index} is rendered differently when messages follow it"
    return spans, () if changed_index is None else (_not_prefix(example.row, detail),)


def _turn_end(encoder: _DataEncoder, example: Example, messages: Messages, turn_text: str, text: str) -> int | None:
    """Return the position in `text` where the last of `messages` ends; `turn_text` renders only these messages.

    If the renderings differ after the message's content only, it is where they do, or the start of the special token
    that they differ in. None if they differ before.
    """
    end = common_prefix(turn_text, text)
    if end == len(turn_text):
        return end
    marked_text = render(encoder.template, example, [*messages[:-1], messages[-1] | {"content": MARKER}])
    ending = marked_text.rpartition(MARKER)[2] if MARKER in marked_text else ""
    content_end = len(turn_text) - len(ending)
    if end < content_end or not turn_text.endswith(ending) or "tool_calls" in messages[-1]:
        return None
    for token in (str(token) for token in encoder.tokenizer.added_tokens_decoder.values()):
        for rendering in (turn_text, text):
            start = rendering.find(token, max(content_end, end - len(token) + 1), end + len(token) - 1)
            end = end if start < 0 else min(end, start)
    return end


def _truncate(encoder: _DataEncoder, example: Example, pieces: _Pieces) -> _Pieces | Problem:
    """Truncate so that prompt + longest answer has at most max_length tokens; all answers share one prompt."""
    limit, invalid_rows = encoder.data.max_length, encoder.data.invalid_rows
    length = len(pieces.prompt) + max(map(len, pieces.answers), default=0)
    if length <= limit:
        return pieces
    too_long = Problem(example.row, "too_long", f"{length} tokens, but max_length is {limit}")
    if invalid_rows.too_long != "truncate":
        return too_long
    truncated = _cut(pieces, limit, encoder.tokenizer.bos_token_id, encoder.data.truncation == "keep_end")
    if truncated is None:
        cause = "the prompt" if encoder.data.truncation == "keep_start" else "the answer"
        return replace(too_long, detail=f"{too_long.detail}, and {cause} alone fills it")
    return replace(truncated, notes=(*pieces.notes, too_long))


def _cut(pieces: _Pieces, limit: int, bos: int | None, keep_end: bool) -> _Pieces | None:
    """Cut pieces to ``limit`` tokens; None if no answer token is left. A leading BOS is kept, as models rely on it."""
    prompt, answers = pieces.prompt, pieces.answers
    if pieces.target_mask:  # the example has no separate prompt
        ids, target_mask = prompt + answers[0], pieces.target_mask
        if keep_end:
            return _split_ids(_tail(ids, ids, limit, bos), _tail(target_mask, ids, limit, bos))
        return _split_ids(ids[:limit], target_mask[:limit])
    num_left = limit - (max(map(len, answers), default=0) if keep_end else len(prompt))
    if num_left <= 0:
        return None
    if keep_end:
        return replace(pieces, prompt=_tail(prompt, prompt, num_left, bos))
    return replace(pieces, answers=[answer[:num_left] for answer in answers])


def _tail(items: list, ids: list[int], size: int, bos: int | None) -> list:
    """Return `size` of the items: the last ones, but including the first if `ids` starts with BOS."""
    num_bos = 1 if ids[0] == bos else 0
    return items[:num_bos] + items[len(items) - (size - num_bos) :]
