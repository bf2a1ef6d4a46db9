"""Every layout of rows, and what is said of rows that cannot be used."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.data.infer_schema import detect_schema, hints, parser_of
from dpo_jax.data.schemas import SCHEMAS, Example, Problem
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


def called(tool_calls):
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}


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
    "alpaca, history": (
        {"instruction": "r", "input": "", "history": [["q", "a"]], "system": "s", "chosen": "a", "rejected": "b"},
        [system("s"), Q, A, user("r")],
        ([A], [B]),
    ),
    "roles with capitals": (
        {"chosen": [{"role": "Human", "content": "q"}, {"role": "Assistant", "content": "a"}], "rejected": [Q, B]},
        [Q],
        ([A], [B]),
    ),
    "messages, answers": ({"messages": [system("s"), Q], "chosen": A, "rejected": "b"}, [system("s"), Q], ([A], [B])),
    "messages, whole conversations": ({"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, [Q], ([A], [B])),
    "implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "The sky is",
        (" blue.", " green."),
    ),
    "implicit prompt, inside a word": (
        {"chosen": "in the sky", "rejected": "in the sea", "score": 0.5},
        "in the s",
        ("ky", "ea"),
    ),
    "implicit prompt, one longer": ({"chosen": "a b", "rejected": "a b c"}, "a", (" b", " b c")),
    "implicit prompt, nothing shared": ({"chosen": "a", "rejected": "b"}, "", ("a", "b")),
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
    "messages without an answer, beside a pair": ({"messages": [Q], "chosen": A, "rejected": B}, [Q], [A]),
    "text": ({"text": "t"}, None, "t"),
    "alpaca": ({"instruction": "do", "input": "it", "output": "a"}, [user("do\n\nit")], [A]),
    "alpaca, history": ({"instruction": "q", "history": [["q", "b"]], "output": "a"}, None, [Q, B, Q, A]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None, [Q, A]),
    "sharegpt, weights": (
        {"conversations": [{"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "b", "weight": 0},
                           {"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}]},
        None, [Q, B | {"weight": 0}, Q, A]),
    "messages, other names of weights": (
        {"messages": [Q, B | {"train": False}, Q, B | {"loss_weight": 0.0}, Q, A | {"training": True}]},
        None, [Q, B | {"weight": 0}, Q, B | {"weight": 0}, Q, A]),
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
        (CHAT | {"tools": 3}, "missing_field", "tools is 3, not a list"),
        (CHAT | {"tools": ["x y"]}, "missing_field", "tools[0] is text that is not JSON (Expecting value"),
        (CHAT | {"tools": [None]}, "missing_field", "tools[0] is absent or null, not an object"),
        (CHAT | {"tools": [TOOL, 3]}, "missing_field", "tools[1] is 3, not an object"),
        (CHAT | {"tools": "[" * 100_000}, "missing_field", "nested more than 100 deep"),
        (CHAT | {"tools": "[" * 101 + "]" * 101}, "missing_field", "nested more than 100 deep"),
        (CHAT | {"tools": "[" + "1" * 5000 + "]"}, "missing_field", "not JSON (Exceeds the limit (4300 digits)"),
        (CHAT | {"tools": '[{"\\ud83d": 1}]'}, "missing_field", "tools[0] has a lone surrogate"),
        (CHAT | {"prompt": [Q | {"name": "\ud83d"}]}, "missing_field", "prompt[0] has a lone surrogate"),
        (CHAT | {"chosen": [assistant([{"type": ["x"]}])]}, "missing_field", "not text: [\"['x']\"]"),
        (CHAT | {"chosen": [assistant(["x"])]}, "missing_field", "not text: ['str']"),
        (CHAT | {"chosen": [{"role": {}, "content": "x"}]}, "missing_field", "chosen[0] role is {}, not text"),
        (CHAT | {"chosen": [called(3)]}, "missing_field", "chosen[0] tool_calls is 3, not a list of objects"),
        (CHAT | {"chosen": [called([3])]}, "missing_field", "tool_calls[0] is 3, not an object"),
        (CHAT | {"chosen": [called("no")]}, "missing_field", "tool_calls is text that is not JSON"),
        (CHAT | {"chosen": [called([{"id": "c"}])]}, "missing_field", "tool_calls[0] is {'id': 'c'}, which names no"),
        (CHAT | {"chosen": [called([{"function": 3}])]}, "missing_field", "tool_calls[0] function is 3, not an object"),
        (CHAT | {"chosen": [called([{"function": {"name": "f", "arguments": [1]}}])]}, "missing_field",
         "tool_calls[0] arguments is [1], not an object"),
        (CHAT | {"chosen": [called([{"function": {"name": "f", "arguments": "f(1)"}}])]}, "missing_field",
         "tool_calls[0] arguments is text that is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}], "chosen": A, "rejected": B}, "missing_field",
         "conversations[0] tool call is text that is not JSON"),
        (TEXT | {"weight": 10**400}, "missing_field", "weight is a number of 1329 bits"),
        (TEXT | {"weight": 1e31}, "missing_field", "weight is 1e+31, not a number from 0 to 1e+30"),
        (TEXT | {"weight": "heavy"}, "missing_field", "weight is 'heavy', not a number"),
        (TEXT | {"weight": True}, "missing_field", "weight is True, not a number"),
        (CHAT | {"prompt": [Q, A | {"weight": -0.1}, Q]}, "missing_field", "prompt[1] weight is -0.1: give 1 to"),
        (CHAT | {"chosen": [A, A | {"weight": 0}]}, "missing_field", "an answer has a message of weight 0"),
        ({"instruction": "q", "history": ["r"], "chosen": "a", "rejected": "b"}, "missing_field", "history is ['r']"),
        (CHAT | {"images": ["cat.jpg"]}, "missing_field", "images is ['cat.jpg'], and only text is supported"),
        (CHAT | {"chat_template_kwargs": {"tokenize": True}}, "missing_field", "cannot hold ['tokenize']"),
        (CHAT | {"chat_template_kwargs": {"padding": True}}, "missing_field", "cannot hold ['padding']"),
        (TEXT | {"chosen": ""}, "empty_answer", "no text"),
        (TEXT | {"rejected": " \n"}, "empty_answer", "no text"),
        (CHAT | {"rejected": []}, "empty_answer", "does not end with an assistant message"),
        (CHAT | {"rejected": [assistant(" ")]}, "empty_answer", "no text"),
        (CHAT | {"chosen": [A, Q]}, "empty_answer", "does not end with an assistant message"),
        (CHAT | {"prompt": []}, "empty_prompt", "no message"),
        ({"chosen": [A], "rejected": [B]}, "empty_prompt", "no message"),
        ({"chosen": [Q], "rejected": [Q, B]}, "empty_answer", "does not end with an assistant message"),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, B]}, "prompts_differ", "['assistant', 'user', 'assistant']"),
        ({"chosen": [Q, A], "rejected": [user("r"), B]}, "prompts_differ", "after 0 prompt message(s)"),
        ({"prompt": "z", "chosen": [Q, A], "rejected": [Q, B]}, "prompts_differ", "not in the conversation: 'z'"),
        (CHAT | {"chosen": [A, user("more"), A]}, "prompts_differ", "['assistant', 'user', 'assistant']"),
        ({"chosen": "\n\nHuman: h\n\nAssistant: a", "rejected": "\n\nHuman: i\n\nAssistant: b"}, "prompts_differ",
         "at character 9"),
        ({"chosen": "\n\nHuman: h\n\nAssistant: a\n\nHuman: x", "rejected": "\n\nHuman: h\n\nAssistant: b"},
         "empty_answer", "turn, not an answer"),
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


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_an_empty_column_of_pictures_is_no_picture(nothing):
    assert parse(CHAT | {"images": nothing}) == parse(CHAT)


def test_a_row_without_the_prompt_that_others_have():
    rows = [TEXT, {"chosen": "a", "rejected": "b"}]
    parser = parser_of("auto", ["prompt", "chosen", "rejected"], rows, "dpo")
    assert parser(1, rows[1]) == Problem(1, "missing_field", "prompt is absent or null, not text")


@pytest.mark.parametrize(
    ("margin", "expected"), [(1, 1.0), ("-0.5", -0.5), (None, np.nan), ("large", np.nan), (10**400, np.nan)], ids=str
)
def test_a_margin_that_is_no_number_is_kept_as_nan(margin, expected):
    np.testing.assert_array_equal(parse(TEXT | {"margin": margin}).margin, expected)


def test_tools_kwargs_and_weight_come_along():
    tools = [TOOL]
    expected = Example(7, [Q], ([A], [B]), 0.5, tools, {"enable_thinking": False})
    row = CHAT | {"weight": "0.5", "tools": json.dumps(tools), "chat_template_kwargs": '{"enable_thinking": false}'}
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


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
CALL_TEXT = json.dumps(CALL["function"])


@pytest.mark.parametrize(
    ("given", "is_text"),
    [([CALL], False), (CALL, False), (json.dumps(CALL), True), (json.dumps([CALL]), True), ([json.dumps(CALL)], True)],
)
def test_lists_of_objects_may_be_one_object_or_json_text(given, is_text):
    """What is written inside JSON text keeps its nulls; tables put theirs where rows differ."""
    expected = CALL if is_text else {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = parse(CHAT | {"chosen": [called(given)], "tools": given})
    assert row.answers[0] == [assistant("") | {"tool_calls": [expected]}]
    assert row.tools == [expected]


def test_arguments_in_json_text_keep_their_nulls():
    """Two answers may differ in nothing else."""
    with_null, without = (called([{"function": {"name": "f", "arguments": text}}]) for text in ('{"x": null}', "{}"))
    row = parse(CHAT | {"chosen": [with_null], "rejected": [without]})
    calls = [answer[0]["tool_calls"][0]["function"]["arguments"] for answer in row.answers]
    assert calls == [{"x": None}, {}]
    text = json.dumps({"messages": [Q, with_null | {"name": None}, {"role": "tool", "content": "1"}]})
    row = parse({"input": text, "preferred_output": [A], "non_preferred_output": [B]})
    assert row.prompt[1] == assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
    assert parse(CHAT | {"chosen": [called('[{"name": "f", "arguments": ""}]')]}).answers[0][0]["tool_calls"] == [
        {"name": "f", "arguments": {}}
    ]


def test_a_sharegpt_function_call_is_a_tool_call_of_the_assistant():
    turn, result = {"from": "function_call", "value": CALL_TEXT}, {"from": "observation", "value": "3"}
    bare = {"name": "f", "parameters": {}}
    row = {"conversations": [{"from": "human", "value": "q"}, turn, result], "chosen": {"from": "gpt", "value": "a"},
           "rejected": {"from": "function_call", "value": f"[{CALL_TEXT}]"}, "tools": json.dumps([bare])}  # fmt: skip
    call = assistant("") | {"tool_calls": [CALL]}
    expected = Example(7, [Q, call, {"role": "tool", "content": "3"}], ([A], [call]), tools=[TOOL])
    assert parse(row) == expected
    assert parse(CHAT | {"tools": [bare]}).tools == [bare]  # as given: other files may mean it


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


def test_a_role_that_is_no_text_is_found_in_its_row():
    answer = [{"role": [None], "content": "Why?"}, assistant("So.")]
    problem = parse({"chosen": answer, "rejected": answer})
    assert (problem.cause, problem.detail) == ("missing_field", "chosen[0] role is [None], not text")


@pytest.mark.parametrize(
    ("columns", "stage", "remedy"),
    [
        (
            ["question", "answer"],
            "dpo",
            (
                ": set columns: {chosen: COLUMN, prompt: question, rejected: COLUMN}; replace COLUMN by "
                "its name in the file, or add the column"
            ),
        ),
        (
            ["question", "response_j", "response_k"],
            "dpo",
            ": set columns: {chosen: response_j, prompt: question, rejected: response_k}",
        ),
        (["prompt", "response", "score"], "sft", "prompt_answer (answer, prompt): set columns: {answer: response}"),
        (
            ["context", "instruction", "response"],
            "sft",
            "alpaca (instruction, output): set columns: {output: response}",
        ),
        (
            ["chosen_response", "instruction", "rejected_response"],
            "dpo",
            "(chosen, instruction, rejected): set columns: {chosen: chosen_response, rejected: rejected_response}",
        ),
        (["dialogue"], "sft", "messages (messages): set columns: {messages: dialogue}"),
    ],
)
def test_unknown_columns_name_the_nearest_layout_and_the_renames_that_reach_it(columns, stage, remedy):
    with pytest.raises(UserError, match=re.escape(f"columns {sorted(columns)} match no schema of {stage}; ")) as caught:
        parser_of("auto", columns, [], stage)
    assert str(caught.value).endswith(remedy)


def test_a_prompt_is_never_guessed():
    """Two texts may share their start by chance: another column with text could be the prompt."""
    row = {"system": "s", "question": "q", "chosen": "It is a.", "rejected": "It is b."}
    with pytest.raises(UserError, match="there is no column named prompt") as caught:
        parse(row)
    assert str(caught.value).endswith(
        "name the prompt column, such as columns: {prompt: question} (or {instruction: question}, which puts system "
        "first); schema: implicit_prompt, if both texts begin with it"
    )
    assert parse(row, schema="implicit_prompt") == Example(7, "It is", (" a.", " b."))
    chosen, rejected = assistant(row["chosen"]), assistant(row["rejected"])
    for ours, prompt, answers in [
        ("prompt", "q", (row["chosen"], row["rejected"])),
        ("instruction", [system("s"), Q], ([chosen], [rejected])),
    ]:
        renamed = {ours if name == "question" else name: value for name, value in row.items()}
        assert parse(renamed) == Example(7, prompt, answers)
    for row, stage, message in [
        ({"question": "q", "chosen": [A], "rejected": [B]}, "dpo", "such as columns: {prompt: question}"),
        ({"chosen": "a b", "rejected": "a c"}, "sft", "to train on all of it, set columns: {text: chosen}"),
        ({"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}, "dpo", "chosen is JSON text of messages"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            parse(row, stage)
    with pytest.raises(UserError, match="'text' is not a schema for dpo"):
        parser_of("text", ["text"], [], "dpo")


def test_what_is_not_read_is_said():
    rows = [{"system": "s", "prompt": "q", "chosen": json.dumps([A]), "rejected": "[{'role': 'assistant'}]", "id": 3}]
    found = hints(parser_of("auto", list(rows[0]), rows, "dpo"), list(rows[0]), rows)
    assert found[0] == "columns that are not read: system, id"
    assert found[1].startswith(
        "system is not part of the prompt: use columns to rename it to system, and the prompt to"
    )
    said = "looks like JSON text in 1 of the first 1 rows, and is read as plain text"
    assert [line.split(":")[0] for line in found[2:]] == [f"chosen {said}", f"rejected {said}"]
    rows = [TEXT | {"weight": 1.0, "tools": None}, {"prompt": "[{x", "chosen": "{", "rejected": "[1]"}]
    assert hints(parser_of("auto", list(rows[0]), rows, "dpo"), list(rows[0]), rows) == []


def test_a_named_schema_overrules_the_columns():
    row = {"prompt": "q", "answer": "a", "text": "t"}
    assert parse(row, "sft") == Example(7, "q", ("a",))
    assert parse(row, "sft", schema="text") == Example(7, None, ("t",))


def test_every_row_of_the_documentation_is_read_as_it_says():
    """Each JSON row of docs/data.md parses, under the schema that the paragraph before it names."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    dpo, sft = text.split("## Schemas for supervised fine-tuning")
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


PROMPT_ROWS = {  # (row, schema, prompt)
    "text": ({"prompt": "q "}, "prompt", "q "),
    "messages": ({"prompt": [system("s"), Q]}, "prompt", [system("s"), Q]),
    "conversation": ({"messages": [Q]}, "messages", [Q]),
    "answered conversation": ({"messages": [Q, A, user("r"), B]}, "messages", [Q, A, user("r")]),
    "sharegpt": ({"system": "s", "conversations": [{"from": "human", "value": "q"}]}, "sharegpt", [system("s"), Q]),
    "alpaca": ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", [user("q\n\nx")]),
    "text answer": ({"prompt": "q", "answer": "a"}, "prompt_answer", "q"),
    "answer in messages": ({"prompt": "q", "completion": [A]}, "prompt_answer", [Q]),
    "pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "q"),
    "pair of conversations": ({"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, "preference", [Q]),
    "transcripts": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
                    "transcripts", "\n\nHuman: q\n\nAssistant:"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "schema", "prompt"), PROMPT_ROWS.values(), ids=PROMPT_ROWS)
def test_the_prompt_of_a_row_is_what_training_takes_as_its_prompt(row, schema, prompt):
    assert detect_schema(list(row), [row], "prompts") == schema
    assert parse(row, "prompts") == Example(7, prompt, ())


@pytest.mark.parametrize(
    ("row", "cause", "detail"),
    [
        ({"prompt": 3}, "missing_field", "prompt is 3, not text"),
        ({"prompt": []}, "empty_prompt", "there is no message to answer"),
        ({"messages": [A]}, "empty_prompt", "there is no message to answer"),
        ({"prompt": [Q, A]}, "empty_prompt", "the prompt ends with an assistant message"),
        ({"prompt": "q", "image": "cat.png"}, "missing_field", "only text is supported"),
    ],
)
def test_prompts_that_cannot_be_answered(row, cause, detail):
    problem = parse(row, "prompts")
    assert isinstance(problem, Problem)
    assert problem.cause == cause
    assert detail in problem.detail


def test_every_row_of_the_page_on_generating_is_read_as_it_says():
    page = (Path(__file__).parents[2] / "docs" / "generating.md").read_text().split("## Prompts")[1]
    schema, seen = None, set()
    for name, text in re.findall(r"^`(\w+)`[: ]|^```json\n(.*?)\n```", page, re.MULTILINE | re.DOTALL):
        schema = name or schema
        if text:
            row = json.loads(text)
            assert detect_schema(list(row), [row], "prompts") == schema
            assert isinstance(parse(row, "prompts"), Example)
            seen.add(schema)
    assert seen == {"prompt", "messages", "alpaca"}
