"""Infer the schema of a source from its columns, and warn about columns not read and messages read as plain text."""

import re
from collections.abc import Mapping, Sequence

from dpo_jax.config import Stage
from dpo_jax.data.schemas import ASSISTANT_TURN, SCHEMAS, Parser
from dpo_jax.errors import UserError

_PREFERENCE_COLUMNS = (  # the first schema whose columns are all present is chosen
    ("openai", {"input", "preferred_output", "non_preferred_output"}),
    ("sharegpt", {"conversations", "chosen", "rejected"}),
    ("preference", {"prompt", "chosen", "rejected"}),
    ("alpaca", {"instruction", "chosen", "rejected"}),
    ("sharegpt", {"messages", "chosen", "rejected"}),
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
_PROMPT_COLUMNS = (
    *_PREFERENCE_COLUMNS,
    ("messages", {"messages"}),
    ("prompt_answer", {"prompt", "answer"}),
    ("prompt_answer", {"prompt", "completion"}),
    ("prompt", {"prompt"}),
    ("alpaca", {"instruction"}),
    ("sharegpt", {"conversations"}),
)
_COLUMNS: dict[Stage, tuple] = {"dpo": _PREFERENCE_COLUMNS, "sft": _SFT_COLUMNS, "prompts": _PROMPT_COLUMNS}
_COLUMN_ALIASES = {  # our column name -> names of that column in public data sets
    "prompt": ("question", "query", "input", "instruction", "problem", "context", "history", "post"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted", "better", "response_j", "positive"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred", "worse", "response_k", "negative"),
    "answer": ("response", "output", "target", "solution", "chosen"),
    "output": ("response", "answer", "completion"),
    "messages": ("conversation", "dialogue", "dialog", "turns"),
    "text": ("content", "document"),
}
_JSON_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")


def _renames(needed: set[str], columns: Sequence[str]) -> dict[str, str]:
    """Map each missing standard column name to the column of the file that probably corresponds to it."""
    missing_columns = sorted(needed - set(columns))
    candidates = {ours: [name for name in _COLUMN_ALIASES.get(ours, ()) if name in columns] for ours in missing_columns}
    return {ours: names[0] for ours, names in candidates.items() if names}


def _no_schema_message(columns: Sequence[str], stage: Stage) -> str:
    """Return an error message that names the closest schema and the column renames that it needs."""

    def distance(schema: tuple[str, set[str]]) -> tuple[int, int, int]:
        num_missing = len(schema[1] - set(columns))
        return num_missing - len(_renames(schema[1], columns)), -len(schema[1]), num_missing

    name, needed = min(_COLUMNS[stage], key=distance)
    renames = _renames(needed, columns)
    renames_text = ", ".join(f"{ours}: {renames.get(ours, 'COLUMN')}" for ours in sorted(needed - set(columns)))
    hint = "; replace COLUMN by its name in the file, or add the column" if distance((name, needed))[0] else ""
    closest_text = f"the closest is {name} ({', '.join(sorted(needed))}): set columns: {{{renames_text}}}{hint}"
    return f"columns {sorted(columns)} match no schema of {stage}; {closest_text}"


def _first_role(value: object) -> str | None:
    """Return the role of the first message in a list, None if the value is not a list of messages."""
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], Mapping):
        return None
    role = value[0].get("role") or value[0].get("from")
    return role if isinstance(role, str) else None


def _schema_without_prompt(columns: Sequence[str], rows: Sequence[Mapping], stage: Stage) -> str:
    """Return the schema of rows with `chosen` and `rejected` but no column named prompt."""
    chosen = [row.get("chosen") for row in rows]
    texts = [value for value in chosen if isinstance(value, str)]
    if any(ASSISTANT_TURN in value for value in texts):
        return "transcripts"
    if any(map(_JSON_MESSAGES.match, texts)):
        raise UserError("chosen is JSON text of messages: store the messages as lists")
    if not texts and not all(_first_role(value) in ("assistant", "gpt") for value in chosen):
        return "preference"  # whole conversations
    content_columns = {name for row in rows for name, value in row.items() if isinstance(value, str | list | Mapping)}
    candidates = [name for name in columns if name in content_columns - {"chosen", "rejected"}]
    if candidates:
        prompt_column = _renames({"prompt"}, candidates).get("prompt", candidates[0])
        chat_hint = f" (or {{instruction: {prompt_column}}}, which puts system first)" if "system" in candidates else ""
        implicit_hint = "; schema: implicit_prompt, if both texts begin with it" if texts and stage == "dpo" else ""
        remedy = f"name the prompt column, such as columns: {{prompt: {prompt_column}}}{chat_hint}{implicit_hint}"
        raise UserError(f"columns {sorted(columns)}: there is no column named prompt: {remedy}")
    if texts and stage == "sft":
        raise UserError("chosen is text without a prompt: to train on all of it, set columns: {text: chosen}")
    return "implicit_prompt" if texts else "preference"


def detect_schema(columns: Sequence[str], rows: Sequence[Mapping], stage: Stage) -> str:
    """Infer the name of the schema from the columns and, where these are ambiguous, from the first few `rows`.

    Raises:
        UserError: the columns fit no schema of the stage, or none of them is clearly the prompt.
    """
    match = next(((name, needed) for name, needed in _COLUMNS[stage] if needed <= set(columns)), None)
    if match is None:
        raise UserError(_no_schema_message(columns, stage))
    name, needed = match
    if needed == {"chosen", "rejected"}:
        return _schema_without_prompt(columns, rows, stage)
    if needed == {"messages", "chosen", "rejected"} and any(
        _first_role(row.get("chosen")) not in (None, "assistant", "gpt") for row in rows
    ):
        return "preference"  # chosen and rejected are whole conversations that include the messages
    if name == "messages" and {"chosen", "rejected"} <= set(columns) and rows and not any(map(_is_answered, rows)):
        return "sharegpt"
    return name


def _is_answered(row: Mapping) -> bool:
    messages = row.get("messages")
    return isinstance(messages, list | tuple) and _first_role(messages[-1:]) in ("assistant", "gpt")


def parser_of(schema: str, columns: Sequence[str], rows: Sequence[Mapping], stage: Stage) -> Parser:
    """Return the parser for a source's `schema`; `auto` infers the schema from the columns.

    Raises:
        UserError: no schema fits, or the stage does not support the schema.
    """
    if schema == "auto":
        schema = detect_schema(columns, rows, stage)
    if schema not in SCHEMAS[stage]:
        raise UserError(f"schema: {schema!r} is not a schema for {stage}; choose from {sorted(SCHEMAS[stage])}")
    return SCHEMAS[stage][schema]


def hints(parser: Parser, columns: Sequence[str], rows: Sequence[Mapping]) -> list[str]:
    """Return warnings about columns that are not read and messages that are read as plain text."""
    notes = []
    unread_columns = [name for name in columns if name not in parser.columns]
    if unread_columns:
        notes.append(f"columns that are not read: {', '.join(unread_columns)}")
    notes += [
        f"{name} is not part of the prompt: use columns to rename it to system, and the prompt to instruction (text) "
        "or conversations (messages)"
        for name in ("system", "system_prompt")
        if name in unread_columns
    ]
    for name in sorted(parser.columns & {"prompt", "chosen", "rejected", "answer", "completion", "output", "text"}):
        count = sum(isinstance(row.get(name), str) and bool(_JSON_MESSAGES.match(row[name])) for row in rows)
        if count:
            frequency = f"in {count} of the first {len(rows)} rows"
            notes.append(f"{name} looks like JSON text {frequency}, and is read as plain text: store messages as lists")
    return notes
