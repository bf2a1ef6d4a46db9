"""Chat templates: what they see, how they fail, and that they leave nothing out."""

import threading
from functools import partial

import pytest
from test_tokenize import CHATML, assistant, config, make_tokenizer, pair, texts, turns, user

from dpo_jax.data import template as templates
from dpo_jax.data.schemas import Example, Problem
from dpo_jax.data.template import Template, missing_part, reads_clock, render
from dpo_jax.data.tokenize import make_tokenize

ROW = pair(user("What"), assistant("is"), assistant("the"))


def test_a_template_that_refuses():
    tokenizer = make_tokenizer(template="{{ raise_exception('No system turns here') }}")
    assert make_tokenize(config(), tokenizer, "dpo")(ROW) == Problem(3, "template_refused", "No system turns here")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ tools|length }}", "TypeError"),
        ("{{ 10.0**400 }}", "OverflowError"),
        ("{{ range(10**9) }}", "OverflowError"),
        ("{{ 'a' * 10**15 }}", "MemoryError"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{{ raise_exception('one\ntwo') }}", "one two"),
    ],
)
def test_a_template_that_fails_in_any_way_makes_its_row_invalid(template, said):
    problem = make_tokenize(config(), make_tokenizer(template=template), "dpo")(ROW)
    assert (problem.row, problem.cause) == (3, "template_refused")
    assert said in problem.detail
    assert "\n" not in problem.detail


ENDLESS = """{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}\
{% endfor %}"""


def test_a_template_that_never_ends_makes_its_row_invalid(monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.1)
    problem = make_tokenize(config(), make_tokenizer(template=ENDLESS), "dpo")(ROW)
    assert problem == Problem(3, "template_refused", "the template did not finish within 0.1 s of processor time")


def test_rendering_works_outside_of_the_main_thread():
    found = []
    tokenize = make_tokenize(config(), make_tokenizer(template=CHATML), "dpo")
    thread = threading.Thread(target=lambda: found.append(tokenize(ROW)))
    thread.start()
    thread.join()
    assert found == [tokenize(ROW)]


# -------------------------------------------------------------------------------------------------------- clock

# as Llama 3.2's own template has it
DATED = (
    """{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}{% set date = 'none' %}\
{% endif %}{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ date }} {{ day() }}\n"""
    + CHATML
)


def test_the_clock_of_a_template_is_an_option():
    tokenizer = make_tokenizer(template=DATED)
    for options, expected in (({}, "26 Jul 2024 Friday\n"), ({"template_date": "2023-12-05"}, "05 Dec 2023 Tuesday\n")):
        made = make_tokenize(config(**options), tokenizer, "dpo")(ROW)
        assert texts(tokenizer, made)[0].startswith(expected)
    assert [reads_clock(text) for text in (DATED, CHATML, None, {"a": CHATML, "b": DATED})] == [
        True,
        False,
        False,
        True,
    ]


# ------------------------------------------------------------------------------------------- nothing may vanish

KNOWN_ROLES = """{% for m in messages %}{% if m.role in ('user', 'assistant', 'system') %}\
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"""
CALLS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments|tojson }}</call>\
{% endfor %}<|im_end|>
{% endfor %}"""


def missing(template, messages):
    template = Template(make_tokenizer(template=template), "2024-07-26")
    example = Example(0, None, (messages,))
    return missing_part(template, example, messages, render(template, example, messages))


def call(name, arguments, content=""):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


OBSERVED = [*user("What is it?"), {"role": "observation", "content": "is"}, *assistant("It is what it is.")]
WEATHER = [*user("Rain?"), call("weather", {"city": "Paris"}, "I look."), {"role": "tool", "content": "yes"}]


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (KNOWN_ROLES, OBSERVED, "content of message 1 (observation)"),
        (KNOWN_ROLES, WEATHER, "tool_calls 0 function name of message 1 (assistant)"),
        (CALLS.replace("c.function.name", "''"), WEATHER, "tool_calls 0 function name of message 1 (assistant)"),
        (
            CALLS.replace("c.function.arguments", "''"),
            WEATHER,
            "tool_calls 0 function arguments of message 1 (assistant)",
        ),
        (CALLS.replace("m.content", "'' if m.tool_calls else m.content"), WEATHER, "content of message 1 (assistant)"),
        ("{{ messages[-1].content }}", turns("one", "two"), "content of message 0 (user)"),
        (
            "{{ messages[0].content }}{{ messages[-1].content }}",
            turns("two", "two", "two"),
            "content of message 1 (assistant)",
        ),
        ("{{ messages[0].content * 0 }}ok", user("ok"), "content of message 0 (user)"),
    ],
)
def test_a_message_or_tool_call_that_vanishes_is_named(template, messages, what):
    assert missing(template, messages) == f"{what} is not in the rendered conversation"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML, turns("one", "two", "three", "four")),
        (CALLS, WEATHER),
        (CALLS, [*user("now?"), call("clock", {}), *assistant("noon")]),
        (CALLS.replace("c.function.arguments", "c.function.arguments['city'] + '.'"), WEATHER),
        (KNOWN_ROLES, [{"role": "observation", "content": " \n"}, *user("x")]),
        ("{% for m in messages %}{{ m.content|trim|upper }}{% endfor %}", turns("  one ", "two\n")),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", turns("one and more", "two and more")),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", turns("a", "<think>b</think>c")),
        ("{{ messages[1].content }} {{ messages[0].content }}", turns("system words", "user words")),
        ("{{ messages|map(attribute='content')|join('') }}", turns("yes", "no")),
    ],
)  # fmt: skip
def test_what_is_moved_stripped_or_shortened_is_not_lost(template, messages):
    assert missing(template, messages) is None


def test_a_template_that_takes_no_other_words_makes_its_row_invalid():
    template = (
        "{% for m in messages %}{{ m.content if m.content == 'yes' else raise_exception('yes only') }}{% endfor %}"
    )
    said = "content of message 0 (user) is not in the rendered conversation: with other text in its place the template "
    assert missing(template, user("yes")) == said + "fails: yes only"


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_a_row_whose_message_vanishes_is_invalid(stage):
    tokenize = make_tokenize(config(), make_tokenizer(template=KNOWN_ROLES), stage)
    whole = Example(3, None, (OBSERVED,))
    problem = tokenize(pair(OBSERVED[:2], assistant("one"), assistant("two")) if stage == "dpo" else whole)
    assert problem == Problem(
        3, "message_not_rendered", "content of message 1 (observation) is not in the rendered conversation"
    )


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "qwen2_5", "qwen3", "gemma"])
def test_published_templates_leave_out_what_they_do_not_know(shared, name):
    found = partial(missing, (shared / "chat_templates" / f"{name}.jinja").read_text())
    assert found(turns("Hi", "<think>\nhm\n</think>\n\nHello", "Why", " Because ")) is None
    unknown = (
        found([*user("Hi"), {"role": "function_call", "content": "{}"}, *assistant("Hello")]) if name != "gemma" else ""
    )
    assert (unknown or "").startswith("content of message 1") == name.startswith("qwen")
    tools = found([*user("Rain?"), call("weather", {"city": "Paris"})]) if name not in ("gemma", "llama3") else None
    assert tools is None
