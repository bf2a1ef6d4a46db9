"""Convert the untrusted values of a row to text, JSON objects and chat messages, or raise ``BadRow``.

Messages are dicts with `role` and `content`, as chat templates expect. Nothing here depends on schemas.
"""

import json
from collections.abc import Mapping
from typing import Any

from dpo_jax import errors

Messages = list[dict]

MAX_NESTING = 100  # levels of lists and objects; more could overflow the stack of recursive functions
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # role names in ShareGPT files
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}
_CALL_ROLE = "function_call"  # role of a ShareGPT turn whose text is the JSON of a tool call
_WEIGHT_KEYS = ("weight", "loss_weight", "train", "training")  # keys of a message in other trainers' formats


class BadRow(Exception):
    """Raised for an invalid row, with the arguments (cause, detail)."""


def read_json(text: str | bytes) -> Any:
    """Parse untrusted JSON text.

    Raises:
        ValueError: the text is not JSON, has a number too long to parse, or is nested deeper than MAX_NESTING.
    """
    problem = f"lists and objects are nested more than {MAX_NESTING} deep"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(problem) from None
    level_values = [value]
    for _ in range(MAX_NESTING):
        containers = [item for item in level_values if isinstance(item, dict | list)]
        level_values = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
        if not level_values:
            return value
    if any(isinstance(item, dict | list) for item in level_values):
        raise ValueError(problem)
    return value


def short_repr(value: object) -> str:
    """Return a short one-line ``repr`` of a value for messages."""
    return "absent or null" if value is None else errors.shown(value)


def text(name: str, value: object) -> str:
    """Return a text value unchanged; raise ``BadRow`` if it is not text or contains a lone surrogate."""
    if not isinstance(value, str):
        raise BadRow("missing_field", f"{name} is {short_repr(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"has a lone surrogate (half a character) at character {error.start}"
        raise BadRow("missing_field", f"{name} {problem}") from None
    return value


def without_nulls(value: Any) -> Any:
    """Remove keys with null values recursively: tables give all objects of a column the same keys, null if absent."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _parse_json_text(name: str, value: Any) -> Any:
    """Parse a value that is JSON text, keeping its nulls, which are intentional there; None for empty text."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value) if value.strip() else None
    except ValueError as error:
        raise BadRow("missing_field", f"{name} is text that is not JSON ({error}): {short_repr(value)}") from None


def _check_characters(name: str, value: Any) -> None:
    """Check that every text in a value is valid Unicode, because chat templates may output any part of it."""
    if isinstance(value, str):
        text(name, value)
    elif isinstance(value, Mapping | list | tuple):
        for item in (*value, *value.values()) if isinstance(value, Mapping) else value:
            _check_characters(name, item)


def number(value: Any) -> float | None:
    """Convert a number, or its text as in CSV files, to float; None if the value is not a number or too large."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def json_object(name: str, value: Any) -> dict | None:
    """Return a JSON object as a dict; it may be given as JSON text. None if absent or empty."""
    value = _parse_json_text(name, value)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BadRow("missing_field", f"{name} is {short_repr(value)}, not an object")
    _check_characters(name, value)
    return dict(value) or None


def json_objects(name: str, value: Any) -> list[dict] | None:
    """Return a list of JSON objects, given as a list or one object, either possibly as JSON text; None if empty."""
    value = _parse_json_text(name, value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        value = [value] if value else []
    if not isinstance(value, list | tuple):
        raise BadRow("missing_field", f"{name} is {short_repr(value)}, not a list of objects")
    objects = []
    for index, item in enumerate(value):
        parsed_item = json_object(f"{name}[{index}]", item)
        if parsed_item is None:
            raise BadRow("missing_field", f"{name}[{index}] is {short_repr(item)}, not an object")
        objects.append(parsed_item)
    return objects or None


def _content(name: str, value: object) -> str:
    """Return the text of a message; the parts of a content list are joined if all are text."""
    if not isinstance(value, list):
        return text(name, value)
    kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in value]
    other_kinds = sorted({str(kind) for kind in kinds if kind != "text"})
    if other_kinds:
        raise BadRow("missing_field", f"{name} has content that is not text: {other_kinds}")
    return "".join(text(name, part.get("text")) for part in value)


def _tool_call(name: str, call: dict) -> dict:
    """Return a tool call with its arguments parsed to an object, as chat templates expect."""
    if "function" not in call and "name" not in call:
        raise BadRow("missing_field", f"{name} is {short_repr(call)}, which names no function")
    if "function" not in call:
        return call | {"arguments": json_object(f"{name} arguments", call.get("arguments")) or {}}
    function = json_object(f"{name} function", call["function"])
    if function is None:
        raise BadRow("missing_field", f"{name} function is absent or empty")
    arguments = json_object(f"{name} arguments", function.get("arguments")) or {}
    return call | {"function": function | {"arguments": arguments}}


def _calls(name: str, value: object) -> list[dict]:
    """Parse the tool calls of a ShareGPT turn: JSON text of an object with name and arguments, or a list of them."""
    calls = json_objects(name, value)
    if calls is None:
        raise BadRow("missing_field", f"{name} contains no tool call")
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _is_trained_on(name: str, message: dict) -> bool:
    """Return whether to train on an assistant message, and remove its keys that say so."""
    flags = {key: message.pop(key) for key in _WEIGHT_KEYS if key in message}
    for key, value in flags.items():
        if number(value) not in (0, 1) and not isinstance(value, bool):
            raise BadRow("missing_field", f"{name} {key} is {short_repr(value)}: give 1 to train on a message, else 0")
    return all(value is True or number(value) == 1 for value in flags.values())


def _message(name: str, value: object) -> dict:
    if not isinstance(value, Mapping):
        raise BadRow("missing_field", f"{name} is {short_repr(value)}, not a message")
    message: dict[str, Any] = {key: item for key, item in value.items() if item is not None}
    is_trained_on = _is_trained_on(name, message)
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    role = text(f"{name} role", message.get("role"))
    if role == _CALL_ROLE:
        message = {"role": "assistant", "tool_calls": _calls(f"{name} tool call", message.get("content"))}
    else:
        message["role"] = _ROLES.get(role.lower(), role)
    if not is_trained_on and message["role"] == "assistant":
        message["weight"] = 0
    calls = json_objects(f"{name} tool_calls", message.pop("tool_calls", None))
    if calls:
        message["tool_calls"] = [_tool_call(f"{name} tool_calls[{n}]", call) for n, call in enumerate(calls)]
        message["content"] = _content(f"{name} content", message.get("content", ""))
    else:
        message["content"] = _content(f"{name} content", message.get("content"))
    _check_characters(name, message)
    return message


def messages(name: str, value: object) -> Messages:
    """Return the messages of a value, which is a list of messages or a single message."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadRow("missing_field", f"{name} is {short_repr(value)}, not a list of messages")
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def answer(name: str, value: object) -> Messages:
    """Return the messages of an answer; plain text becomes a single assistant message."""
    return [{"role": "assistant", "content": text(name, value)}] if isinstance(value, str) else messages(name, value)


def is_messages(value: object) -> bool:
    """Return whether a value holds chat messages rather than text."""
    return isinstance(value, list | tuple | Mapping)
