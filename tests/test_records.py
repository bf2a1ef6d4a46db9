"""Every layout of rows, and what is said of rows that cannot be used."""

import json
import re
from pathlib import Path

import pytest

from dpo_jax.data.records import SCHEMAS, Example, Problem, detect_schema, parser_of
from dpo_jax.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def parse(row, stage="dpo", schema="auto"):
    return parser_of(schema, list(row), [row], stage)(7, row)


Q, A, B = user("q"), assistant("a"), assistant("b")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

DPO_ROWS = {
    "text": ({"prompt": "q ", "chosen": "a", "rejected": "b"}, "q ", ("a", "b")),
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, [Q], ([A], [B])),
    "messages, text answers": ({"prompt": [Q], "chosen": "a", "rejected": "b"}, [Q], ([A], [B])),
    "messages, one message each": ({"prompt": Q, "chosen": A, "rejected": B}, [Q], ([A], [B])),
    "messages repeated in answers": ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, [Q], ([A], [B])),
    "text prompt, conversations": (
        {"prompt": "q", "chosen": [system("s"), Q, A], "rejected": [system("s"), Q, B]},
        [system("s"), Q],
        ([A], [B]),
    ),
    "text prompt, answers as messages": ({"prompt": "q", "chosen": [A], "rejected": [B]}, [Q], ([A], [B])),
    "conversations": (
        {"chosen": [Q, A, user("r"), A], "rejected": [Q, A, user("r"), B]},
        [Q, A, user("r")],
        ([A], [B]),
    ),
    "conversations, several messages": ({"chosen": [Q, A, A], "rejected": [Q, B]}, [Q], ([A, A], [B])),
    "conversations, one longer": ({"chosen": [Q, A], "rejected": [Q, A, B]}, [Q], ([A], [A, B])),
    "conversations, equal": ({"chosen": [Q, A], "rejected": [Q, A]}, [Q], ([A], [A])),
    "transcripts that begin alike": (
        {
            "chosen": "\n\nHuman: h\n\nAssistant: x\n\nHuman: i\n\nAssistant: Yes, a",
            "rejected": "\n\nHuman: h\n\nAssistant: x\n\nHuman: i\n\nAssistant: Yes, b",
        },
        "\n\nHuman: h\n\nAssistant: x\n\nHuman: i\n\nAssistant:",
        (" Yes, a", " Yes, b"),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [system("s"), Q],
        ([A], [B]),
    ),
    "sharegpt, system column": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        [system("s"), Q],
        ([A], [B]),
    ),
    "alpaca": (
        {"instruction": "do", "input": "it", "output": "x", "chosen": "a", "rejected": "b"},
        [user("do\n\nit")],
        ([A], [B]),
    ),
    "alpaca, no input": ({"instruction": "do", "input": "", "chosen": "a", "rejected": "b"}, [user("do")], ([A], [B])),
    "openai": (
        {"input": {"messages": [Q]}, "preferred_output": [A], "non_preferred_output": [B]},
        [Q],
        ([A], [B]),
    ),
    "openai, input as text": (
        {"input": json.dumps({"messages": [Q]}), "preferred_output": [A], "non_preferred_output": [B]},
        [Q],
        ([A], [B]),
    ),
}


@pytest.mark.parametrize("case", DPO_ROWS)
def test_preference_layouts(case):
    row, prompt, answers = DPO_ROWS[case]
    assert parse(row) == Example(7, prompt, answers)


SFT_ROWS = {
    "prompt, answer": ({"prompt": "q", "answer": "a"}, "q", "a"),
    "prompt, completion": ({"prompt": [Q], "completion": [A]}, [Q], [A]),
    "text prompt, answer as messages": ({"prompt": "q", "completion": [A]}, [Q], [A]),
    "messages": ({"messages": [Q, A, Q, B]}, None, [Q, A, Q, B]),
    "messages beside a pair": ({"messages": [Q, A], "prompt": "q", "chosen": [A], "rejected": [B]}, None, [Q, A]),
    "text": ({"text": "t"}, None, "t"),
    "alpaca": ({"instruction": "do", "input": "it", "output": "a"}, [user("do\n\nit")], [A]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None, [Q, A]),
    "chosen of a pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a"),
    "chosen of transcripts": ({"chosen": "\n\nHuman: h\n\nAssistant: a", "rejected": "\n\nHuman: h\n\nAssistant: b"},
                              "\n\nHuman: h\n\nAssistant:", " a"),
}  # fmt: skip


@pytest.mark.parametrize("case", SFT_ROWS)
def test_sft_layouts(case):
    row, prompt, answer = SFT_ROWS[case]
    assert parse(row, "sft") == Example(7, prompt, (answer,))


TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [Q], "chosen": [A], "rejected": [B]}


@pytest.mark.parametrize(
    ("row", "cause", "detail"),
    [
        (TEXT | {"chosen": None}, "missing_field", "chosen is absent or null, not text"),
        (TEXT | {"prompt": None}, "missing_field", "prompt is absent or null, not text"),
        (TEXT | {"rejected": 3}, "missing_field", "rejected is 3, not text"),
        (TEXT | {"chosen": "\ud83d"}, "missing_field", "lone surrogate"),
        (TEXT | {"weight": None}, "missing_field", "weight is absent or null"),
        (TEXT | {"weight": -1.0}, "missing_field", "weight is -1.0"),
        (TEXT | {"weight": float("nan")}, "missing_field", "weight is nan"),
        (TEXT | {"chosen": [Q, A]}, "missing_field", "rejected is 'b', not a list of messages"),
        (CHAT | {"chosen": [{"content": "x"}]}, "missing_field", "chosen[0] role is absent or null"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, "missing_field", "chosen[0] content is absent or null"),
        (CHAT | {"chosen": [assistant([{"type": "image"}])]}, "missing_field", "not text: ['image']"),
        (CHAT | {"tools": "{oops"}, "missing_field", "tools is text that is not JSON"),
        (CHAT | {"tools": {}}, "missing_field", "tools is {}, not a list"),
        (CHAT | {"chat_template_kwargs": {"tokenize": True}}, "missing_field", "cannot hold ['tokenize']"),
        (TEXT | {"chosen": ""}, "empty_answer", "no text"),
        (TEXT | {"rejected": " \n"}, "empty_answer", "no text"),
        (CHAT | {"rejected": []}, "empty_answer", "does not end with an assistant message"),
        (CHAT | {"rejected": [assistant(" ")]}, "empty_answer", "no text"),
        (CHAT | {"chosen": [A, Q]}, "empty_answer", "does not end with an assistant message"),
        (CHAT | {"prompt": []}, "empty_prompt", "no message"),
        ({"chosen": [A], "rejected": [B]}, "empty_prompt", "no message"),
        ({"chosen": [Q], "rejected": [Q, B]}, "empty_answer", "does not end with an assistant message"),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, B]}, "prompts_differ", "['assistant', 'user', 'assistant']"),
        ({"chosen": [Q, A], "rejected": [user("r"), B]}, "prompts_differ", "after the 0 message(s)"),
        ({"prompt": "z", "chosen": [Q, A], "rejected": [Q, B]}, "prompts_differ", "not in the conversation: 'z'"),
        (CHAT | {"chosen": [A, user("more"), A]}, "prompts_differ", "['assistant', 'user', 'assistant']"),
        ({"chosen": "\n\nHuman: h\n\nAssistant: a", "rejected": "\n\nHuman: i\n\nAssistant: b"}, "prompts_differ",
         "at character 9"),
        ({"chosen": "a", "rejected": "b"}, "missing_field", "has no turn"),
        ({"chosen": "\n\nHuman: h\n\nAssistant: a\n\nHuman: x", "rejected": "\n\nHuman: h\n\nAssistant: b"},
         "empty_answer", "ends with a turn"),
        ({"input": None, "preferred_output": [A], "non_preferred_output": [B]}, "missing_field", "input is absent"),
        ({"conversations": "x", "chosen": A, "rejected": B}, "missing_field", "conversations is 'x'"),
        ({"instruction": None, "chosen": "a", "rejected": "b"}, "missing_field", "instruction is absent"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(row, cause, detail):
    problem = parse(row)
    assert isinstance(problem, Problem)
    assert (problem.row, problem.cause) == (7, cause)
    assert detail in problem.detail
    assert "\n" not in problem.detail


def test_a_row_without_the_prompt_that_others_have():
    rows = [TEXT, {"chosen": "a", "rejected": "b"}]
    parser = parser_of("auto", ["prompt", "chosen", "rejected"], rows, "dpo")
    assert parser(1, rows[1]) == Problem(1, "missing_field", "prompt is absent or null, not text")


def test_tools_kwargs_and_weight_come_along():
    tools = [TOOL]
    expected = Example(7, [Q], ([A], [B]), 0.5, tools, {"enable_thinking": False})
    row = CHAT | {"weight": 0.5, "tools": json.dumps(tools), "chat_template_kwargs": '{"enable_thinking": false}'}
    assert parse(row) == expected
    assert parse(row | {"tools": tools, "chat_template_kwargs": {"enable_thinking": False, "other": None}}) == expected
    openai = {"input": {"messages": [Q], "tools": tools}, "preferred_output": [A], "non_preferred_output": [B]}
    assert parse(openai).tools == tools
    assert parse(CHAT | {"tools": [], "chat_template_kwargs": None}) == Example(7, [Q], ([A], [B]))


def test_messages_are_made_plain():
    """Nulls of table formats go, text parts are joined, arguments of calls become the object that templates write."""
    call = {"id": None, "function": {"name": "f", "arguments": '{"x": 1}'}}
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    assert parse(CHAT | {"prompt": prompt}).prompt == [
        user("ab"),
        assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "1"},
    ]


@pytest.mark.parametrize(
    ("columns", "stage", "schema"),
    [
        ({"prompt", "chosen", "rejected", "instruction"}, "dpo", "preference"),
        ({"instruction", "input", "output", "chosen", "rejected"}, "dpo", "alpaca"),
        ({"instruction", "input", "output", "chosen", "rejected"}, "sft", "alpaca"),
        ({"prompt", "messages", "chosen", "rejected", "score_chosen"}, "dpo", "preference"),
        ({"prompt", "messages", "chosen", "rejected", "score_chosen"}, "sft", "messages"),
        ({"conversations", "chosen", "rejected"}, "sft", "sharegpt"),
        ({"chosen", "rejected"}, "dpo", "preference"),
        ({"text", "id"}, "sft", "text"),
    ],
)
def test_detection(columns, stage, schema):
    assert detect_schema(sorted(columns), [], stage) == schema


def test_unknown_columns_name_what_was_seen_and_what_is_known():
    with pytest.raises(UserError, match=r"\['answer', 'question'\].*sharegpt.*preference.*columns"):
        parser_of("auto", ["question", "answer"], [], "dpo")
    with pytest.raises(UserError, match="'text' is not a layout of dpo"):
        parser_of("text", ["text"], [], "dpo")


def test_a_named_schema_overrules_the_columns():
    row = {"prompt": "q", "answer": "a", "text": "t"}
    assert parse(row, "sft") == Example(7, "q", ("a",))
    assert parse(row, "sft", schema="text") == Example(7, None, ("t",))


def test_every_row_of_the_documentation_is_read_as_it_says():
    """Each JSON row of docs/data.md parses, under the layout that the paragraph before it names."""
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    dpo, sft = text.split("## Layouts for supervised fine-tuning")
    for stage, part in (("dpo", dpo), ("sft", sft)):
        schema, seen = None, set()
        for name, text in re.findall(r"^`(\w+)`:|^```json\n(.*?)\n```", part, re.MULTILINE | re.DOTALL):
            schema = name or schema
            if text:
                row = json.loads(text)
                assert detect_schema(list(row), [row], stage) == schema
                assert isinstance(parse(row, stage), Example)
                seen.add(schema)
        expected = set(SCHEMAS["dpo"]) if stage == "dpo" else {"prompt_answer", "messages", "alpaca", "text"}
        assert seen == expected
