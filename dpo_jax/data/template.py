"""Render conversations with chat templates, under a time limit, and check that every message is in the output.

A template is a program that comes with the model. It gets a fixed date instead of the clock, may fail on a row in any
way, and is stopped if it does not terminate.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dpo_jax.data.schemas import Example, Messages
from dpo_jax.errors import UserError, reason

RENDER_SECONDS = 10.0  # limit on the processor time of rendering one conversation
MAX_CACHED_STRUCTURES = 1000


class RenderError(Exception):
    """Raised if the chat template fails on a conversation."""


@dataclass(frozen=True)
class Template:
    """A tokenizer with its chat template, and the date that the template gets instead of today's."""

    tokenizer: Any  # a PreTrainedTokenizerBase, whose type annotations are too broad to help
    date: str
    rendered_parts: dict[str, frozenset["_Path"]] = field(default_factory=dict)  # cache, by conversation structure


def reads_clock(chat_template: str | dict[str, str] | None) -> bool:
    """Return whether the output of a template may depend on the date."""
    return "strftime_now" in str(chat_template)


def render(template: Template, example: Example, messages: Messages, prompt: bool = False) -> str:
    """Render a conversation as text; `prompt` appends the template's generation prompt.

    Raises:
        RenderError: the template fails on these messages, or does not terminate.
        UserError: the tokenizer has no template for this row, or the template is not valid Jinja.
    """
    import jinja2

    _require_template(template.tokenizer.chat_template, example)
    variables = example.template_kwargs or {}
    try:
        with _time_limit(RENDER_SECONDS):
            _set_clock(template, example)
            text = template.tokenizer.apply_chat_template(
                messages, tools=example.tools, add_generation_prompt=prompt, tokenize=False, **variables
            )
        text.encode()  # raises at a lone surrogate, which no tokenizer accepts
    except jinja2.TemplateSyntaxError as error:
        problem = f"the chat template has a syntax error in line {error.lineno}: {error.message}"
        raise UserError(f"row {example.row}: {problem}; fix it, or set data.chat_template to another file") from None
    except Exception as error:  # a template may raise anything
        message = " ".join(str(error).split())[:200] if isinstance(error, jinja2.TemplateError) else ""
        raise RenderError(message or reason(error)) from error
    return text


def _require_template(chat_template: str | dict[str, str] | None, example: Example) -> None:
    if chat_template is None:
        problem = f"row {example.row}: the row holds messages, but the tokenizer has no chat template"
        raise UserError(f"{problem}; set data.chat_template to a file with one")
    has_tool_template = example.tools is not None and isinstance(chat_template, dict) and "tool_use" in chat_template
    if isinstance(chat_template, dict) and "default" not in chat_template and not has_tool_template:
        problem = f"the tokenizer has several chat templates and no default: {', '.join(sorted(chat_template))}"
        raise UserError(f"row {example.row}: {problem}; set data.chat_template to one of them")


def _set_clock(template: Template, example: Example) -> None:
    """Make the chat template of this row read the configured date instead of the clock."""
    chat_template = template.tokenizer.get_chat_template(tools=example.tools)
    if reads_clock(chat_template):
        # apply_chat_template uses this cached object, and passes only plain data to a template
        from transformers.utils.chat_template_utils import _compile_jinja_template

        format_date = datetime.fromisoformat(template.date).strftime
        _compile_jinja_template(chat_template).globals["strftime_now"] = format_date


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Context manager that raises TimeoutError after ``seconds`` of processor time; no-op outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"the template did not finish within {seconds:g} s of processor time")

    previous_handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)  # repeats each second: a callback may swallow one exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)


_Path = tuple[int | str, ...]  # indices and keys that lead from a list of messages to one value


def missing_part(template: Template, example: Example, messages: Messages, text: str) -> str | None:
    """Describe the first part of the messages that does not affect their rendering `text`; None if all parts do.

    Each content, and each tool call's name and arguments, is replaced by a marker. Templates may strip, move, merge or
    shorten their input, so a marker in the new rendering, or any change of the rendering, is enough. All markers are
    inserted at once first: which of them appear depends on roles, not on words, so the result is cached by structure.
    """
    parts = dict(_parts(messages))
    rendered_parts = _rendered_parts(template, example, messages, parts)
    if rendered_parts.issuperset(parts):
        return None
    for path, value in parts.items():
        if path in rendered_parts:
            continue
        marked_messages = _replaced(messages, path, _marker(0, value))
        try:
            failure = "" if render(template, example, marked_messages) == text else None
        except RenderError as error:
            failure = f": with other text in its place the template fails: {error}"
        if failure is not None:
            index, part = int(path[0]), " ".join(map(str, path[1:]))
            return f"{part} of message {index} ({messages[index]['role']}) is not in the rendered conversation{failure}"
    return None


def _rendered_parts(
    template: Template, example: Example, messages: Messages, parts: dict[_Path, Any]
) -> frozenset[_Path]:
    """Return the parts whose markers appear in the rendering when all parts are replaced by markers at once."""
    markers = {path: _marker(number, value) for number, (path, value) in enumerate(parts.items())}
    marked_messages = messages
    for path, marker in markers.items():
        marked_messages = _replaced(marked_messages, path, marker)
    structure = repr((marked_messages, example.tools, example.template_kwargs))
    cache = template.rendered_parts
    if structure not in cache:
        if len(cache) == MAX_CACHED_STRUCTURES:
            cache.clear()
        try:
            text = render(template, example, marked_messages)
        except RenderError:
            text = ""
        cache[structure] = frozenset(path for n, path in enumerate(markers) if _marker(n, "") in text)
    return cache[structure]


def _parts(messages: Messages) -> Iterator[tuple[_Path, Any]]:
    """Yield the parts that must be rendered: non-blank contents, and the names and arguments of tool calls."""
    for index, message in enumerate(messages):
        if message["content"].strip():
            yield (index, "content"), message["content"]
        for number, call in enumerate(message.get("tool_calls", ())):
            path_prefix = ("function",) if isinstance(call.get("function"), dict) else ()
            function = call["function"] if path_prefix else call
            for key in ("name", "arguments"):
                if function.get(key):
                    yield (index, "tool_calls", number, *path_prefix, key), function[key]


def _marker(number: int, value: Any) -> Any:
    """Return a unique marker to replace ``value``; an object keeps its keys, which a template may access."""
    marker_text = f"zqxj{number}jxqz"
    return dict.fromkeys(value, marker_text) if isinstance(value, dict) else marker_text


def _replaced(value: Any, path: _Path, new: Any) -> Any:
    """Return a copy of a nested value in which `new` replaces the part at `path`."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy
