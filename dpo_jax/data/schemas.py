"""Parse a row of any supported schema into an ``Example``, or a ``Problem`` that states why it is invalid.

A schema is a function from a row to prompt and answers; the tables at the end list the schemas of each stage and the
columns that each reads. ``infer_schema`` selects the schema of a source. Nothing here depends on tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dpo_jax.config import Stage
from dpo_jax.data import values
from dpo_jax.data.values import BadRow, Messages

_RESERVED_KWARGS = {"conversation", "messages", "tools", "tokenize", "add_generation_prompt", "chat_template",
                "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding",
                "truncation", "max_length", "sanitize_control_tokens", "tokenizer_kwargs"}  # fmt: skip
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_EMPTY_REPRS = ("''", "b''", "[]", "[None]", "{}")  # compared by repr, because images may be of any type
MAX_WEIGHT = 1e30  # the sum of many still fits in float32
ASSISTANT_TURN, _HUMAN_TURN = "\n\nAssistant:", "\n\nHuman:"


@dataclass(frozen=True)
class Example:
    """Training example from one row.

    DPO: `prompt` and `answers` = (chosen, rejected). SFT: `answers` = (answer,). Prompts: `answers` = (). Prompt and
    answers are either all text or all messages. `prompt` is None for SFT rows without a separate prompt: a text (all
    tokens but the first are learned), or a whole conversation (its assistant turns are learned).
    """

    row: int
    prompt: str | Messages | None
    answers: tuple[str | Messages, ...]
    weight: float = 1.0
    tools: list | None = None
    template_kwargs: dict | None = None
    margin: float = 0.0  # by which a reward model should score chosen above rejected; NaN: not a number


@dataclass(frozen=True)
class Problem:
    """Problem with a row; `cause` is a field of ``InvalidRowsConfig`` or a key of ``tokenize.NOTES``."""

    row: int
    cause: str
    detail: str


def common_prefix(first: Sequence, second: Sequence) -> int:
    """Return the length of the common prefix of two sequences."""
    if first == second[: len(first)]:  # the usual case, and much faster
        return len(first)
    item_pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(item_pairs) if a != b), min(len(first), len(second)))


def _split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Split two whole conversations into their common leading messages and the rest of each, at least one message."""
    num_common = max(0, min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    return chosen[:num_common], chosen[num_common:], rejected[num_common:]


def _after_prompt(prompt: Messages, answer: Messages) -> Messages:
    """Remove the prompt from an answer that repeats it as the start of a whole conversation."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _text_and_conversations(prompt: str, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    if all(answer and answer[0]["role"] == "assistant" for answer in (chosen, rejected)):
        return [{"role": "user", "content": prompt}], chosen, rejected
    messages, chosen, rejected = _split_conversations(chosen, rejected)
    # a text prompt next to whole conversations must be part of a user message, or a rendering of one
    user_texts = [message["content"].strip() for message in messages if message["role"] == "user"]
    if not any(prompt.strip() in content or content in prompt for content in user_texts):
        raise BadRow("prompts_differ", f"the prompt column is not in the conversation: {values.short_repr(prompt)}")
    return messages, chosen, rejected


def _preference(row: Mapping):
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if "prompt" not in row and values.is_messages(chosen):
        return _split_conversations(values.messages("chosen", chosen), values.messages("rejected", rejected))
    if values.is_messages(prompt):
        prompt = values.messages("prompt", prompt)
        return prompt, *(_after_prompt(prompt, values.answer(name, row.get(name))) for name in ("chosen", "rejected"))
    prompt = values.text("prompt", prompt)
    if values.is_messages(chosen) or values.is_messages(rejected):
        return _text_and_conversations(prompt, values.messages("chosen", chosen), values.messages("rejected", rejected))
    return prompt, values.text("chosen", chosen), values.text("rejected", rejected)


def _split_transcript(name: str, value: object) -> tuple[str, str]:
    prompt, turn, answer = values.text(name, value).rpartition(ASSISTANT_TURN)
    if not turn:
        raise BadRow("missing_field", f"{name} has no {ASSISTANT_TURN!r} turn: {values.short_repr(value)}")
    if _HUMAN_TURN in answer:
        raise BadRow("empty_answer", f"{name} ends with a {_HUMAN_TURN!r} turn, not an answer")
    return prompt + turn, answer


def _transcripts(row: Mapping):
    prompt, chosen = _split_transcript("chosen", row.get("chosen"))
    rejected_prompt, rejected = _split_transcript("rejected", row.get("rejected"))
    if prompt != rejected_prompt:
        raise BadRow("prompts_differ", f"the prompts diverge at character {common_prefix(prompt, rejected_prompt)}")
    return prompt, chosen, rejected


def _implicit_prompt(row: Mapping):
    """Split two texts where they first differ, or at a space just before; each answer has at least one character."""
    chosen, rejected = values.text("chosen", row.get("chosen")), values.text("rejected", row.get("rejected"))
    prompt_size = max(0, min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    prompt_size -= chosen[:prompt_size].endswith(" ")
    return chosen[:prompt_size], chosen[prompt_size:], rejected[prompt_size:]


def _system(row: Mapping) -> Messages:
    system = row.get("system")
    return [] if system in (None, "") else [{"role": "system", "content": values.text("system", system)}]


def _conversation(row: Mapping) -> Messages:
    name = "conversations" if "conversations" in row else "messages"
    return _system(row) + values.messages(name, row.get(name))


def _sharegpt(row: Mapping):
    prompt = _conversation(row)
    return prompt, *(_after_prompt(prompt, values.answer(name, row.get(name))) for name in ("chosen", "rejected"))


def _sharegpt_sft(row: Mapping):
    return _sharegpt(row) if "chosen" in row else (None, _conversation(row))


def _history(row: Mapping) -> Messages:
    """Return the earlier turns of an Alpaca row, which are stored as pairs of instruction and answer."""
    history = row.get("history") or []
    if not isinstance(history, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise BadRow("missing_field", f"history is {values.short_repr(history)}, not a list of [instruction, answer]")
    return [
        {"role": role, "content": values.text(f"history[{index}]", content)}
        for index, pair in enumerate(history)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _instruction(row: Mapping) -> Messages:
    """Join instruction and input into one user message; the chat template decides how it is rendered."""
    texts = [values.text("instruction", row.get("instruction"))]
    if row.get("input") is not None and values.text("input", row["input"]).strip():
        texts.append(row["input"])
    return [*_system(row), *_history(row), {"role": "user", "content": "\n\n".join(texts)}]


def _alpaca(row: Mapping):
    return _instruction(row), values.answer("chosen", row.get("chosen")), values.answer("rejected", row.get("rejected"))


def _alpaca_sft(row: Mapping):
    """Parse an Alpaca row; one with a history becomes a whole conversation, with a loss on every answer."""
    name = "output" if "output" in row else "chosen"
    prompt, answer = _instruction(row), values.answer(name, row.get(name))
    return (None, prompt + answer) if row.get("history") else (prompt, answer)


def _openai_input(row: Mapping) -> dict:
    input_object = values.json_object("input", row.get("input"))
    if input_object is None:
        raise BadRow("missing_field", "input is absent or null")
    return input_object


def _openai(row: Mapping):
    prompt = values.messages("input messages", _openai_input(row).get("messages"))
    return prompt, *(values.answer(name, row.get(name)) for name in ("preferred_output", "non_preferred_output"))


def _prompt_answer(row: Mapping):
    name = "answer" if "answer" in row else "completion"
    prompt, answer = row.get("prompt"), row.get(name)
    if values.is_messages(prompt):
        prompt = values.messages("prompt", prompt)
        return prompt, _after_prompt(prompt, values.answer(name, answer))
    prompt = values.text("prompt", prompt)
    if values.is_messages(answer):
        return [{"role": "user", "content": prompt}], values.messages(name, answer)
    return prompt, values.text(name, answer)


def _prompt(row: Mapping):
    prompt = row.get("prompt")
    return (values.messages("prompt", prompt) if values.is_messages(prompt) else values.text("prompt", prompt),)


def _unanswered(row: Mapping):
    """Return a conversation as a prompt, without its last message if that is an answer."""
    messages = _conversation(row)
    return (messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages,)


def _whole_conversation(row: Mapping):
    return None, values.messages("messages", row.get("messages"))


def _plain(row: Mapping):
    return None, values.text("text", row.get("text"))


def _weight(row: Mapping) -> float:
    weight = row.get("weight", 1.0)
    number = values.number(weight)
    if number is None or not 0 <= number <= MAX_WEIGHT:
        raise BadRow("missing_field", f"weight is {values.short_repr(weight)}, not a number from 0 to {MAX_WEIGHT:g}")
    return number


def _margin(row: Mapping) -> float:
    """Return a pair's margin; NaN if it is not a number, which is an error only for a reward model."""
    number = values.number(row.get("margin", 0.0))
    return math.nan if number is None or abs(number) > MAX_WEIGHT else number


def _tools(row: Mapping) -> list | None:
    """Return tools in the format of chat templates; ShareGPT files hold bare functions, which are wrapped in it."""
    tools = row.get("tools")
    if tools is None and "preferred_output" in row:
        tools = _openai_input(row).get("tools")
    tools = values.json_objects("tools", tools)
    if tools is None or "conversations" not in row:
        return tools
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]


def _template_kwargs(row: Mapping) -> dict | None:
    kwargs = values.json_object("chat_template_kwargs", row.get("chat_template_kwargs"))
    reserved = sorted(set(kwargs or ()) & _RESERVED_KWARGS)
    if reserved:
        raise BadRow("missing_field", f"chat_template_kwargs cannot hold {reserved}, which this program sets itself")
    return kwargs


def _check_no_media(row: Mapping) -> None:
    """Refuse rows with images, video or audio: text about media that the model cannot see teaches it to hallucinate."""
    media = [name for name in _MEDIA_COLUMNS if row.get(name) is not None and repr(row[name]) not in _EMPTY_REPRS]
    if media:
        problem = "only text is supported; remove the column if the text makes sense without it"
        raise BadRow("missing_field", f"{media[0]} is {values.short_repr(row[media[0]])}, and {problem}")


def _check_turns(prompt: Messages, answer: Messages) -> None:
    """Check that an answer has only assistant messages, all of them trained on; other messages belong in the prompt."""
    if not answer or answer[-1]["role"] != "assistant":
        raise BadRow("empty_answer", "the conversation does not end with an assistant message")
    roles = [message["role"] for message in answer]
    if set(roles) != {"assistant"}:
        raise BadRow(
            "prompts_differ", f"after {len(prompt)} prompt message(s), an answer has roles {roles}, not only assistant"
        )
    if not prompt:
        raise BadRow("empty_prompt", "no message comes before the answer")

    if any(message.get("weight") == 0 for message in answer):
        raise BadRow("missing_field", "an answer has a message of weight 0, but training uses all its messages")


def _check_not_blank(answer: str | Messages) -> None:
    turns = [{"content": answer}] if isinstance(answer, str) else [m for m in answer if m["role"] == "assistant"]
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise BadRow("empty_answer", "an answer has no text")


def _check_prompt(prompt: str | Messages) -> None:
    """Check that a prompt of messages is not empty and does not end with an answer."""
    if not prompt and not isinstance(prompt, str):
        raise BadRow("empty_prompt", "there is no message to answer")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow("empty_prompt", "the prompt ends with an assistant message, so there is nothing to answer")


@dataclass(frozen=True)
class Parser:
    """Parser for the rows of one schema, called with a row's index and the row."""

    read: Callable[[Mapping], tuple]
    columns: frozenset[str]  # the only columns that `read` is given
    num_answers: int

    def __call__(self, index: int, row: Mapping) -> Example | Problem:
        """Return the example that a row holds, or the problem that makes the row invalid."""
        row = {name: values.without_nulls(value) for name, value in row.items() if name in self.columns}
        try:
            _check_no_media(row)
            prompt, *answers = self.read(row)
            answers = answers[: self.num_answers]
            if self.num_answers == 0:
                _check_prompt(prompt)
            for answer in answers:
                if isinstance(prompt, list):
                    _check_turns(prompt, answer)
                _check_not_blank(answer)
            options = (_weight(row), _tools(row), _template_kwargs(row), _margin(row))
            return Example(index, prompt, tuple(answers), *options)
        except BadRow as bad:
            return Problem(index, *bad.args)


_PAIR_COLUMNS = "chosen rejected"
_COMMON_COLUMNS = f"weight margin tools chat_template_kwargs {' '.join(_MEDIA_COLUMNS)}"
_PAIR_SCHEMAS: dict[str, tuple[Callable, str]] = {
    "preference": (_preference, f"prompt {_PAIR_COLUMNS}"),
    "transcripts": (_transcripts, _PAIR_COLUMNS),
    "sharegpt": (_sharegpt, f"system conversations messages {_PAIR_COLUMNS}"),
    "alpaca": (_alpaca, f"system history instruction input {_PAIR_COLUMNS}"),
    "openai": (_openai, "input preferred_output non_preferred_output"),
}
_DPO_SCHEMAS = _PAIR_SCHEMAS | {"implicit_prompt": (_implicit_prompt, _PAIR_COLUMNS)}
_SFT_SCHEMAS = _PAIR_SCHEMAS | {  # training is on the chosen answer
    "prompt_answer": (_prompt_answer, "prompt answer completion"),
    "messages": (_whole_conversation, "messages"),
    "text": (_plain, "text"),
    "sharegpt": (_sharegpt_sft, f"system conversations messages {_PAIR_COLUMNS}"),
    "alpaca": (_alpaca_sft, f"system history instruction input output {_PAIR_COLUMNS}"),
}


_PROMPT_SCHEMAS = {name: schema for name, schema in _PAIR_SCHEMAS.items() if name not in ("sharegpt", "alpaca")} | {
    "prompt_answer": (_prompt_answer, "prompt answer completion"),
    "prompt": (_prompt, "prompt"),
    "messages": (_unanswered, "system messages"),
    "sharegpt": (_unanswered, "system conversations messages"),
    "alpaca": (lambda row: (_instruction(row),), "system history instruction input"),
}


def _parsers(schemas: Mapping[str, tuple[Callable, str]], num_answers: int) -> dict[str, Parser]:
    return {
        name: Parser(read, frozenset(f"{columns} {_COMMON_COLUMNS}".split()), num_answers)
        for name, (read, columns) in schemas.items()
    }


SCHEMAS: dict[Stage, dict[str, Parser]] = {
    "dpo": _parsers(_DPO_SCHEMAS, 2),
    "sft": _parsers(_SFT_SCHEMAS, 1),
    "prompts": _parsers(_PROMPT_SCHEMAS, 0),
}
