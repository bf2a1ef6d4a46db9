"""Rows of every usual layout -> one ``Example``, or the ``Problem`` that says why not.

A layout ("schema") is a function from a row to an ``Example``; the tables below name them, per stage. Messages are
dicts with `role` and `content` as chat templates take them. Nothing here knows tokens.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dpo_jax.errors import UserError

Stage = Literal["dpo", "sft"]
Messages = list[dict]


@dataclass(frozen=True)
class Example:
    """What is learned from one row.

    DPO: `prompt` and `answers` = (chosen, rejected). SFT: `answers` = (answer,). Text goes with text, messages with
    messages. `prompt` is None for SFT rows that are one piece: a text (all of it but the first token is learned), or a
    whole conversation (its assistant turns are learned).
    """

    row: int
    prompt: str | Messages | None
    answers: tuple[str | Messages, ...]
    weight: float = 1.0
    tools: list | None = None
    template_kwargs: dict | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row: `cause` is a field of ``FatesConfig``, or of ``tokenize.NOTES`` for a mere note."""

    row: int
    cause: str
    detail: str


Parser = Callable[[int, Mapping], Example | Problem]


class _Bad(Exception):
    """A row that cannot be used: (cause, detail)."""


# ---------------------------------------------------------------------------------------------- values of a row

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # the names that ShareGPT files use
_ASSISTANT_TURN, _HUMAN_TURN = "\n\nAssistant:", "\n\nHuman:"
_GIVEN_BY_US = {"conversation", "messages", "tools", "tokenize", "add_generation_prompt", "chat_template",
                "continue_final_message", "return_dict", "return_tensors"}  # fmt: skip


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _Bad("missing_field", f"{name} is {_shown(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Bad("missing_field", f"{name} holds half a character (a lone surrogate) at {error.start}") from None
    return value


def _shown(value: object) -> str:
    if value is None:
        return "absent or null"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{type(value).__name__} {shown[:50]}..."


def _without_nulls(value: Any) -> Any:
    """Arrow gives every dict of a column the same keys; those that a row did not have are null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _parsed(name: str, value: Any, kind: type) -> Any:
    """A value that columns often hold as JSON text, as the list or dict that it is; None when absent."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise _Bad("missing_field", f"{name} is text that is not JSON: {_shown(value)}") from None
    if value is None:
        return None
    if not isinstance(value, kind):
        raise _Bad("missing_field", f"{name} is {_shown(value)}, not a {kind.__name__}")
    return _without_nulls(value) or None


def _content(name: str, value: object) -> str:
    """Text of a message; the parts of a content list are joined when all are text."""
    if isinstance(value, list):
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in value}
        if kinds - {"text"}:
            raise _Bad("missing_field", f"{name} has content that is not text: {sorted(map(str, kinds - {'text'}))}")
        return "".join(_text(name, part.get("text")) for part in value)
    return _text(name, value)


def _tool_call(name: str, call: Mapping) -> dict:
    """Templates write arguments as JSON, so text that is JSON already becomes the object."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = _parsed(f"{name} arguments", function.get("arguments"), dict) or {}
    return {**call, "function": {**function, "arguments": arguments}}


def _message(name: str, value: object) -> dict:
    if not isinstance(value, Mapping):
        raise _Bad("missing_field", f"{name} is {_shown(value)}, not a message")
    message = _without_nulls(value)
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    role = _text(f"{name} role", message.get("role"))
    message["role"] = _ROLES.get(role, role)
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(name, call) for call in message["tool_calls"]]
        message["content"] = _content(f"{name} content", message.get("content", ""))
    else:
        message["content"] = _content(f"{name} content", message.get("content"))
    return message


def _messages(name: str, value: object) -> Messages:
    """A list of messages, or one message alone."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise _Bad("missing_field", f"{name} is {_shown(value)}, not a list of messages")
    return [_message(f"{name}[{place}]", message) for place, message in enumerate(value)]


def _answer(name: str, value: object) -> Messages:
    """Messages of an answer to a conversation; plain text is one assistant message."""
    return [{"role": "assistant", "content": _text(name, value)}] if isinstance(value, str) else _messages(name, value)


def _is_messages(value: object) -> bool:
    return isinstance(value, list | tuple | Mapping)


# ---------------------------------------------------------------------------------- layouts: row -> prompt, *answers


def common_prefix(first: Sequence, second: Sequence) -> int:
    """How many leading items are equal."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Two whole conversations -> their common leading messages, and what follows in each, at least one message."""
    size = max(0, min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    return chosen[:size], chosen[size:], rejected[size:]


def _check_prompt_column(prompt: str, messages: Messages) -> None:
    """A text prompt beside whole conversations must be the one that they hold, in part or as a rendering of it."""
    users = [message["content"].strip() for message in messages if message["role"] == "user"]
    if not any(prompt.strip() in content or content in prompt for content in users):
        raise _Bad("prompts_differ", f"the prompt column is not in the conversation: {_shown(prompt)}")


def _after_prompt(prompt: Messages, answer: Messages) -> Messages:
    """Answers given as the whole conversation lose the prompt that they repeat."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _text_and_conversations(prompt: str, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    if all(answer and answer[0]["role"] == "assistant" for answer in (chosen, rejected)):
        return [{"role": "user", "content": prompt}], chosen, rejected
    messages, chosen, rejected = _split_conversations(chosen, rejected)
    _check_prompt_column(prompt, messages)
    return messages, chosen, rejected


def _preference(row: Mapping):
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if "prompt" not in row and _is_messages(chosen):
        return _split_conversations(_messages("chosen", chosen), _messages("rejected", rejected))
    if _is_messages(prompt):
        prompt = _messages("prompt", prompt)
        return prompt, *(_after_prompt(prompt, _answer(name, row.get(name))) for name in ("chosen", "rejected"))
    prompt = _text("prompt", prompt)
    if _is_messages(chosen) or _is_messages(rejected):
        return _text_and_conversations(prompt, _messages("chosen", chosen), _messages("rejected", rejected))
    return prompt, _text("chosen", chosen), _text("rejected", rejected)


def _split_transcript(name: str, value: object) -> tuple[str, str]:
    prompt, turn, answer = _text(name, value).rpartition(_ASSISTANT_TURN)
    if not turn:
        raise _Bad("missing_field", f"{name} has no turn {_ASSISTANT_TURN!r}: {_shown(value)}")
    if _HUMAN_TURN in answer:
        raise _Bad("empty_answer", f"{name} ends with a turn {_HUMAN_TURN!r}")
    return prompt + turn, answer


def _transcripts(row: Mapping):
    prompt, chosen = _split_transcript("chosen", row.get("chosen"))
    other, rejected = _split_transcript("rejected", row.get("rejected"))
    if prompt != other:
        raise _Bad("prompts_differ", f"the prompts part at character {common_prefix(prompt, other)}")
    return prompt, chosen, rejected


def _system(row: Mapping) -> Messages:
    return [{"role": "system", "content": _text("system", row["system"])}] if row.get("system") else []


def _sharegpt(row: Mapping):
    prompt = _system(row) + _messages("conversations", row.get("conversations"))
    return prompt, _answer("chosen", row.get("chosen")), _answer("rejected", row.get("rejected"))


def _sharegpt_sft(row: Mapping):
    if "chosen" in row:
        return _sharegpt(row)
    return None, _system(row) + _messages("conversations", row.get("conversations"))


def _instruction(row: Mapping) -> Messages:
    """Instruction and input are one user message: how they look as text is the chat template's affair."""
    parts = [_text("instruction", row.get("instruction"))]
    if row.get("input") is not None and _text("input", row["input"]).strip():
        parts.append(row["input"])
    return [*_system(row), {"role": "user", "content": "\n\n".join(parts)}]


def _alpaca(row: Mapping):
    return _instruction(row), _answer("chosen", row.get("chosen")), _answer("rejected", row.get("rejected"))


def _alpaca_sft(row: Mapping):
    name = "output" if "output" in row else "chosen"
    return _instruction(row), _answer(name, row.get(name))


def _openai_input(row: Mapping) -> dict:
    given = _parsed("input", row.get("input"), dict)
    if given is None:
        raise _Bad("missing_field", "input is absent or null")
    return given


def _openai(row: Mapping):
    prompt = _messages("input messages", _openai_input(row).get("messages"))
    return prompt, *(_answer(name, row.get(name)) for name in ("preferred_output", "non_preferred_output"))


def _prompt_answer(row: Mapping):
    name = "answer" if "answer" in row else "completion"
    prompt, answer = row.get("prompt"), row.get(name)
    if _is_messages(prompt):
        prompt = _messages("prompt", prompt)
        return prompt, _after_prompt(prompt, _answer(name, answer))
    prompt = _text("prompt", prompt)
    if _is_messages(answer):
        return [{"role": "user", "content": prompt}], _messages(name, answer)
    return prompt, _text(name, answer)


def _conversation(row: Mapping):
    return None, _messages("messages", row.get("messages"))


def _plain(row: Mapping):
    return None, _text("text", row.get("text"))


# ------------------------------------------------------------------------------------------------------ the tables


def _weight(row: Mapping) -> float:
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise _Bad("missing_field", f"weight is {_shown(weight)}, not a number >= 0")
    return float(weight)


def _tools(row: Mapping) -> list | None:
    tools = row.get("tools")
    if tools is None and "preferred_output" in row:
        tools = _openai_input(row).get("tools")
    return _parsed("tools", tools, list)


def _template_kwargs(row: Mapping) -> dict | None:
    kwargs = _parsed("chat_template_kwargs", row.get("chat_template_kwargs"), dict)
    taken = sorted(set(kwargs or ()) & _GIVEN_BY_US)
    if taken:
        raise _Bad("missing_field", f"chat_template_kwargs cannot hold {taken}, which this program sets itself")
    return kwargs


def _check_turns(prompt: Messages, answer: Messages) -> None:
    """Whatever is not said by the assistant belongs to the prompt, which both answers share."""
    if not answer or answer[-1]["role"] != "assistant":
        raise _Bad("empty_answer", "the conversation does not end with an assistant message")
    roles = [message["role"] for message in answer]
    if set(roles) != {"assistant"}:
        raise _Bad("prompts_differ", f"after the {len(prompt)} message(s) of the prompt an answer goes on with {roles}")
    if not prompt:
        raise _Bad("empty_prompt", "no message comes before the answer")


def _check_said(answer: str | Messages) -> None:
    if isinstance(answer, str):
        said = answer.strip()
    else:
        said = any(m["content"].strip() or m.get("tool_calls") for m in answer if m["role"] == "assistant")
    if not said:
        raise _Bad("empty_answer", "an answer has no text")


def _parse(layout: Callable, num_answers: int, index: int, row: Mapping) -> Example | Problem:
    try:
        prompt, *answers = layout(row)
        answers = answers[:num_answers]
        for answer in answers:
            if isinstance(prompt, list):
                _check_turns(prompt, answer)
            _check_said(answer)
        return Example(index, prompt, tuple(answers), _weight(row), _tools(row), _template_kwargs(row))
    except _Bad as bad:
        return Problem(index, *bad.args)


def _table(num_answers: int, **layouts: Callable) -> dict[str, Parser]:
    return {name: partial(_parse, layout, num_answers) for name, layout in layouts.items()}


PREFERENCE_SCHEMAS = _table(
    2, preference=_preference, transcripts=_transcripts, sharegpt=_sharegpt, alpaca=_alpaca, openai=_openai
)
SFT_SCHEMAS = _table(  # preference layouts too: their chosen answer is learned
    1, prompt_answer=_prompt_answer, messages=_conversation, text=_plain, sharegpt=_sharegpt_sft, alpaca=_alpaca_sft,
    preference=_preference, transcripts=_transcripts, openai=_openai,
)  # fmt: skip
SCHEMAS: dict[Stage, dict[str, Parser]] = {"dpo": PREFERENCE_SCHEMAS, "sft": SFT_SCHEMAS}

_PREFERENCE_COLUMNS = (  # the first whose columns are all there
    ("openai", {"input", "preferred_output", "non_preferred_output"}),
    ("sharegpt", {"conversations", "chosen", "rejected"}),
    ("preference", {"prompt", "chosen", "rejected"}),
    ("alpaca", {"instruction", "chosen", "rejected"}),
    ("preference", {"chosen", "rejected"}),
)
_SFT_COLUMNS = (
    ("messages", {"messages"}),
    ("prompt_answer", {"prompt", "answer"}),
    ("prompt_answer", {"prompt", "completion"}),
    ("alpaca", {"instruction", "output"}),
    *_PREFERENCE_COLUMNS,
    ("sharegpt", {"conversations"}),
    ("text", {"text"}),
)
_COLUMNS: dict[Stage, tuple] = {"dpo": _PREFERENCE_COLUMNS, "sft": _SFT_COLUMNS}


def detect_schema(columns: Sequence[str], rows: Sequence[Mapping], stage: Stage) -> str:
    """Name of the layout, told from the columns; `rows` are the first few, which tell transcripts from messages.

    Raises:
        UserError: the columns fit no layout of the stage.
    """
    name = next((name for name, needed in _COLUMNS[stage] if needed <= set(columns)), None)
    if name is None:
        known = "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, needed in _COLUMNS[stage])
        raise UserError(f"columns {sorted(columns)} fit no layout of {stage}: {known}; rename them with `columns`")
    if name == "preference" and "prompt" not in columns and any(isinstance(row.get("chosen"), str) for row in rows):
        return "transcripts"
    return name


def parser_of(schema: str, columns: Sequence[str], rows: Sequence[Mapping], stage: Stage) -> Parser:
    """The parser of a source: of its `schema`, or of the one that its columns tell when that is `auto`.

    Raises:
        UserError: no layout fits, or the stage does not know the schema.
    """
    if schema == "auto":
        schema = detect_schema(columns, rows, stage)
    if schema not in SCHEMAS[stage]:
        raise UserError(f"schema: {schema!r} is not a layout of {stage}; it knows {sorted(SCHEMAS[stage])}")
    return SCHEMAS[stage][schema]
