"""Chat templates: conversations as text, rendered within bounds; and whether every message is in that text.

A template is a program that came with the model. It reads a fixed date in place of the clock, may fail at a row in any
way, and is stopped when it does not end.
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

RENDER_SECONDS = 10.0  # of processor time for one conversation
STRUCTURES_KEPT = 1000


class Refused(Exception):
    """The chat template does not take this conversation."""


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer, and the date it reads from the clock."""

    tokenizer: Any  # a PreTrainedTokenizerBase, whose types are too wide to be of use
    date: str
    shown: dict[str, frozenset["_Path"]] = field(default_factory=dict)  # of `_shown`, by structure of a conversation


def reads_clock(chat_template: str | dict[str, str] | None) -> bool:
    """Whether what a template writes may depend on the date."""
    return "strftime_now" in str(chat_template)


def render(template: Template, example: Example, messages: Messages, prompt: bool = False) -> str:
    """Text of a conversation; `prompt` adds what the template writes before an answer.

    Raises:
        Refused: the template fails at these messages, or does not end.
        UserError: there is no template, none for this row, or it is not Jinja.
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
        text.encode()  # no tokenizer takes half a character
    except jinja2.TemplateSyntaxError as error:
        fault = f"the chat template has a fault in line {error.lineno}: {error.message}"
        raise UserError(f"row {example.row}: {fault}; fix it, or give another file as data.chat_template") from None
    except Exception as error:  # it can do whatever a program can
        message = " ".join(str(error).split())[:200] if isinstance(error, jinja2.TemplateError) else ""
        raise Refused(message or reason(error)) from error
    return text


def _require_template(chosen: str | dict[str, str] | None, example: Example) -> None:
    if chosen is None:
        fault = f"row {example.row}: it holds messages, and the tokenizer has no chat template"
        raise UserError(f"{fault}; give a file with one as data.chat_template")
    with_tools = example.tools is not None and isinstance(chosen, dict) and "tool_use" in chosen
    if isinstance(chosen, dict) and "default" not in chosen and not with_tools:
        several = f"the tokenizer has several chat templates and no default: {', '.join(sorted(chosen))}"
        raise UserError(f"row {example.row}: {several}; name one of them as data.chat_template")


def _set_clock(template: Template, example: Example) -> None:
    """Give the template that this row takes a function of the set date in place of the machine's clock."""
    text = template.tokenizer.get_chat_template(tools=example.tools)
    if reads_clock(text):
        # apply_chat_template takes this object from a cache keyed by the text; it passes only plain data to a template
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled = _compile_jinja_template(text)
        compiled.globals["strftime_now"] = datetime.fromisoformat(template.date).strftime


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so much processor time; no limit outside of a process's main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} s of processor time")

    previous_handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)  # again each second: one exception may be lost in a callback
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)


# ------------------------------------------------------------------------------------------- every part must show

_Path = tuple[int | str, ...]  # keys from a list of messages down to one value


def missing_part(template: Template, example: Example, messages: Messages, text: str) -> str | None:
    """The first part of the messages that has no influence on their rendering `text`, in words; None: all have.

    Each content, and each tool call's name and arguments, is replaced by a marker. Templates may strip, move, merge or
    shorten what they are given: a marker in the new rendering, or any change of it, is enough. First all markers are
    put in at once: what then shows depends on roles and not on words, and serves the next row of that structure too.
    """
    parts = dict(_parts(messages))
    shown = _shown(template, example, messages, parts)
    if shown.issuperset(parts):
        return None
    for path, value in parts.items():
        if path in shown:
            continue
        marked_messages = _replaced(messages, path, _marker(0, value))
        try:
            refusal = "" if render(template, example, marked_messages) == text else None
        except Refused as refused:
            refusal = f": with other words in its place the template fails: {refused}"
        if refusal is not None:
            index, what = int(path[0]), " ".join(map(str, path[1:]))
            return f"{what} of message {index} ({messages[index]['role']}) is not in the rendered conversation{refusal}"
    return None


def _shown(template: Template, example: Example, messages: Messages, parts: dict[_Path, Any]) -> frozenset[_Path]:
    """Parts whose markers stand in the rendering when every part is replaced by one."""
    markers = {path: _marker(number, value) for number, (path, value) in enumerate(parts.items())}
    marked_messages = messages
    for path, marker in markers.items():
        marked_messages = _replaced(marked_messages, path, marker)
    structure = repr((marked_messages, example.tools, example.template_kwargs))
    if structure not in template.shown:
        if len(template.shown) == STRUCTURES_KEPT:
            template.shown.clear()
        try:
            text = render(template, example, marked_messages)
        except Refused:
            text = ""
        template.shown[structure] = frozenset(path for n, path in enumerate(markers) if _marker(n, "") in text)
    return template.shown[structure]


def _parts(messages: Messages) -> Iterator[tuple[_Path, Any]]:
    """What has to be rendered: contents that are more than white space, names and arguments of tool calls."""
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
    """A value of the same kind that stands nowhere else; an object keeps its names, which a template may ask for."""
    text = f"zqxj{number}jxqz"
    return dict.fromkeys(value, text) if isinstance(value, dict) else text


def _replaced(value: Any, path: _Path, new: Any) -> Any:
    """A copy with another value at `path`."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy
