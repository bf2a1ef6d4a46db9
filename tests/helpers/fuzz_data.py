"""Fuzzed rows, data files, chat templates and stores: what is kept is what the file, the template and tokenizer say."""

import gzip
import io
import json
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import pyarrow as pa
from fuzzing import DEEP, HUGE, as_json, damaged, mutated, odd_values, refused
from hypothesis import strategies as st
from pyarrow import parquet
from small_tokenizer import CHAT_TEMPLATE, make_tokenizer

from dpo_jax.config import DataConfig, InvalidRowsConfig, SourceConfig
from dpo_jax.data.convert import Chunk, ConvertJob, make_convert_rows
from dpo_jax.data.infer_schema import SCHEMAS, detect_schema, parser_of
from dpo_jax.data.schemas import Example, Problem
from dpo_jax.data.sources import load_rows
from dpo_jax.data.store import build_or_open_store, open_store
from dpo_jax.data.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("DPO_JAX_SHARED", Path(__file__).parents[3] / "shared" / "data"))
DROP_ALL = InvalidRowsConfig(missing_field="drop", template_refused="drop", equal_answers="keep")


@cache
def tokenizer(name: str) -> Any:
    """Real ones: of text, and with a chat template that knows tools."""
    return make_tokenizer() if name == "bytes" else load_tokenizer(str(SHARED / name), None, None)


TOKENIZERS = ("models/stories260K", "tokenizers/minimind", "bytes")

# ---------------------------------------------------------------------------------------------------- rows

SYSTEM, USER, ANSWER = (
    {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Why?"), ("assistant", "So."))
)
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
HUMAN, GPT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
ROWS: dict[str, list[dict]] = {
    "dpo": [
        {"prompt": "Q: why?", "chosen": " So.", "rejected": " No.", "weight": 2.0},
        {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]},
        {"prompt": [USER], "chosen": "So.", "rejected": "No.", "tools": json.dumps([TOOL])},
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}],
         "chat_template_kwargs": {"enable_thinking": False}},
        {"chosen": "\n\nHuman: why?\n\nAssistant: So.", "rejected": "\n\nHuman: why?\n\nAssistant: No."},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "No."}, "system": "Be brief."},
        {"instruction": "Say", "input": "why", "chosen": "So.", "rejected": "No."},
        {"input": {"messages": [USER], "tools": [TOOL]}, "preferred_output": [CALL], "non_preferred_output": [ANSWER]},
    ],
    "sft": [
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
        {"messages": [USER, CALL, {"role": "tool", "content": "2"}, ANSWER], "tools": [TOOL]},
        {"prompt": "Q", "completion": " A"},
        {"prompt": [USER], "answer": [ANSWER]},
        {"instruction": "Say", "input": "", "output": "So."},
        {"conversations": [HUMAN, GPT]},
        {"text": "Once upon a time."},
    ],
}  # fmt: skip


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, str, list]:
    """Stage, tokenizer, and a few rows of one layout, some of them mutated."""
    stage = draw(st.sampled_from(["dpo", "sft"]))
    valid = draw(st.sampled_from(ROWS[stage]))
    found = [draw(mutated(st.just(valid), most=2)) for _ in range(draw(st.integers(1, 2)))]
    return stage, draw(st.sampled_from(TOKENIZERS)), [row for row in found if isinstance(row, dict)]


def parser(stage: str, values: list[dict]) -> Any:
    return parser_of("auto", list(dict.fromkeys(name for row in values for name in row)), values, stage)


def job(stage: str, coder: Any, invalid_rows: InvalidRowsConfig = DROP_ALL) -> ConvertJob:
    source = SourceConfig(path="x")
    data = DataConfig(train=(source,), max_length=2**16, invalid_rows=invalid_rows, append_eos=False)
    return ConvertJob(data=data, tokenizer=coder, stage=stage)


def examples(chunk: Chunk) -> Iterator[tuple[int, list[list[int]]]]:
    """Row, and the tokens of prompt + answer for each of its answers."""
    place = 0
    for row, lengths in zip(chunk.rows, chunk.lengths, strict=True):
        parts = np.split(chunk.tokens[place : place + lengths.sum()], np.cumsum(lengths)[:-1])
        place += lengths.sum()
        yield int(row), [[*parts[0].tolist(), *answer.tolist()] for answer in parts[1:]]


def texts(coder: Any, example: Example) -> list[list[int]]:
    """Tokens of prompt + answer as transformers has them; without what the tokenizer puts at the end of a text."""
    if isinstance(example.answers[0], str):
        whole = [(example.prompt or "") + answer for answer in example.answers]
        return [coder(text)["input_ids"] for text in whole]
    whole = [(example.prompt or []) + answer for answer in example.answers]
    kwargs = {"tools": example.tools, "tokenize": True, "return_dict": False, **(example.template_kwargs or {})}
    return [coder.apply_chat_template(messages, **kwargs) for messages in whole]


def assert_tokens(coder: Any, stage: str, parsed: list[Example | Problem], chunk: Chunk) -> None:
    """Each example holds the tokens of its rendering; in fine-tuning up to the last learned one."""
    for row, actual in examples(chunk):
        example = parsed[row]
        assert isinstance(example, Example)
        expected = texts(coder, example)
        if stage == "sft":
            assert actual[0] == expected[0][: len(actual[0])]
        else:
            assert actual == [without_double_bos(coder, ids) for ids in expected]


def without_double_bos(coder: Any, ids: list[int]) -> list[int]:
    bos = coder.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def check_rows(value: tuple[str, str, list]) -> bool:
    stage, name, values = value
    values = [json.loads(as_json(row)) for row in values if not {DEEP, HUGE} & set(json.dumps(row).split('"'))]
    parse, was_refused = refused(lambda: parser(stage, values))
    if was_refused:
        return False
    coder = tokenizer(name)
    parsed = [parse(number, row) for number, row in enumerate(values)]
    for number, (one, row) in enumerate(zip(parsed, values, strict=True)):
        assert one.row == number
        if isinstance(one, Problem):
            assert len(one.detail.splitlines()) <= 1, one.detail
        elif "weight" in row:
            assert one.weight == float(row["weight"])  # text too: cells of CSV files are
    strict = make_convert_rows(job(stage, coder, InvalidRowsConfig(template_refused="drop")))
    refused(lambda: strict("rows.jsonl", parse, 0, values), "rows.jsonl", "row ")
    chunk, was_refused = refused(
        lambda: make_convert_rows(job(stage, coder))("rows.jsonl", parse, 0, values), "rows.jsonl", "row "
    )
    if was_refused:
        return False
    assert len(chunk.rows) + len(chunk.dropped) == len(values)
    assert_tokens(coder, stage, parsed, chunk)
    return not chunk.dropped


any_rows = st.tuples(st.sampled_from(["dpo", "sft"]), st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "messages", "input", "preferred_output", "non_preferred_output",
                     "conversations", "instruction", "output", "text", "answer", "system", "tools", "weight",
                     "chat_template_kwargs"]), odd_values, max_size=6))  # fmt: skip


def check_any_row(value: tuple[str, dict]) -> bool:
    """Each layout gives an example or a problem of whatever row."""
    stage, row = value
    refused(lambda: detect_schema(list(row), [row], stage))
    found = [parse(0, row) for parse in SCHEMAS[stage].values()]
    assert all(isinstance(one, Example | Problem) for one in found)
    return any(isinstance(one, Example) for one in found)


# ---------------------------------------------------------------------------------------------------- files

TABLE = [{"prompt": f"Q{i}", "chosen": "yes", "rejected": "no", "n": i, "list": [{"a": i}], "none": None}
         for i in range(3)]  # fmt: skip


@cache
def valid_files() -> dict[str, bytes]:
    """Suffix to the bytes of such a file."""
    lines = "".join(json.dumps(row) + "\n" for row in TABLE).encode()
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(TABLE), table, row_group_size=2)
    return {
        ".jsonl": lines,
        ".json": json.dumps(TABLE).encode(),
        ".parquet": table.getvalue(),
        ".jsonl.gz": gzip.compress(lines, mtime=0),
    }


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A suffix, and a file for it: rows mutated as trees, or its bytes damaged."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".parquet", ".jsonl.gz"]))
    good = valid_files()[suffix]
    if suffix != ".parquet" and draw(st.booleans()):
        tree = draw(mutated(st.just(TABLE)))
        lines = isinstance(tree, list) and suffix != ".json"
        good = ("\n".join(map(as_json, tree)) if lines else as_json(tree)).encode()
        good = gzip.compress(good, mtime=0) if suffix.endswith(".gz") else good
    return suffix, draw(damaged(st.just(good)))


def by_json(suffix: str, data: bytes) -> list:
    """Rows as json and pyarrow read them."""
    if suffix == ".parquet":
        return parquet.ParquetFile(io.BytesIO(data)).read().to_pylist()
    data = gzip.decompress(data) if suffix.endswith(".gz") else data
    if suffix == ".json" and data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        return json.loads(data)
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def check_data_file(value: tuple[str, bytes]) -> bool:
    suffix, data = value
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(data)
        loaded, was_refused = refused(lambda: load_rows(SourceConfig(path=str(path))), str(path))
        if was_refused:
            return False
        read, was_refused = refused(lambda: [loaded[row] for row in range(len(loaded))], str(path))
        if not was_refused:
            assert repr(read) == repr(by_json(suffix, data))  # NaN is not equal to itself
        return not was_refused


# ---------------------------------------------------------------------------------------------------- templates

PIECES = [
    "{% for m in messages %}", "{% endfor %}", "<{{ m.role }}>{{ m.content }}</s>", "{{ m['content'] }}", "{{ 1/0 }}",
    "{{ messages[99].content.x }}", "{{ 'a' + 1 }}", "{{ raise_exception('no') }}", "{{ raise_exception(messages) }}",
    "{{ raise_exception('two\nlines') }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ x.y.z }}",
    "{{ none.split() }}", "{{ tools | tojson }}", "{{ messages | map(attribute='x') | list }}", "{{ messages | int }}",
    "{% if add_generation_prompt %}<a>{% endif %}", "{{ range(10**9) | list }}", "{{ m.content | trim }}", "{% set x =",
    "{{ '%d' % 'a' }}", "{{ [] | first }}", "{{ {}['a'] }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{{ bos_token }}", "{{ messages.__class__.__mro__ }}", "{{ strftime_now('%d %b %Y') }}", "{% break %}",
    "{{ 'x' | nofilter }}",
    "{{ m.content | float }}", "{{ 10**400 + 0.5 }}", "{{ 'a' * 10**4 }}", "{{ loop.index }}", "\ud7ff", "{# x",
    "{{ 'a'.encode('ascii').decode('utf-16') }}", "{{ '\\ud800' }}", "{{ m.content.split('.')[1] }}",
    "{{ cycler() }}", "{{ namespace(1) }}", "{{ lipsum }}", "{{ dict(1) }}", "{{ 'a' | round }}",
]  # fmt: skip


def real_templates() -> list[str]:
    return [path.read_text() for path in sorted((SHARED / "chat_templates").glob("*.jinja"))] or [CHAT_TEMPLATE]


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Pieces in a row, many of which fail; or a whole one, with a piece put in or cut out."""
    if draw(st.booleans()):
        return "".join(draw(st.lists(st.sampled_from(PIECES), max_size=6)))
    text = draw(st.sampled_from([CHAT_TEMPLATE, CHAT_TEMPLATE, *real_templates()]))
    start, end = sorted(draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    piece = draw(st.sampled_from(PIECES))
    kind = draw(st.sampled_from(["whole", "put in", "cut out", "end here"]))
    return {"whole": text, "put in": text[:start] + piece + text[start:], "cut out": text[:start] + text[end:],
            "end here": text[:start]}[kind]  # fmt: skip


def check_template(text: str) -> bool:
    coder = make_tokenizer()
    coder.chat_template = text
    kept = 0
    for stage, row in (("dpo", ROWS["dpo"][1]), ("sft", ROWS["sft"][0])):
        parse = parser(stage, [row])
        chunk, was_refused = refused(
            lambda stage=stage, parse=parse, row=row: make_convert_rows(job(stage, coder))("r.jsonl", parse, 0, [row]),
            "r.jsonl", "row 0",
        )  # fmt: skip
        if not was_refused:
            for problem in chunk.dropped:
                assert len(problem.detail.splitlines()) <= 1, problem.detail
            assert_tokens(coder, stage, [parse(0, row)], chunk)
            kept += len(chunk.rows)
    return kept > 0


# ---------------------------------------------------------------------------------------------------- stores

STORE_ROWS = [{"prompt": f"Q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)] + [{"prompt": "bad"}]


@cache
def built_store() -> tuple[Path, SourceConfig]:
    """A store of a few rows; its folder is never written to."""
    folder = Path(mkdtemp(prefix="fuzzed-store-"))
    source = SourceConfig(path=str(folder / "rows.jsonl"))
    Path(source.path).write_text("".join(json.dumps(row) + "\n" for row in STORE_ROWS))
    return build(folder / "store", source).path, source


def build(folder: Path, source: SourceConfig) -> Any:
    data = DataConfig(train=(source,), max_length=64, invalid_rows=DROP_ALL)
    return build_or_open_store(folder, (source,), data, tokenizer("bytes"), "dpo", 1)


@st.composite
def store_damage(draw: st.DrawFn, path: Path) -> tuple[str, bytes]:
    """A file of the store, and what it holds now."""
    file = draw(st.sampled_from(["manifest.json"] * 4 + sorted(one.name for one in path.iterdir())))
    good = (path / file).read_bytes()
    if file == "manifest.json" and draw(st.booleans()):
        return file, as_json(draw(mutated(st.just(json.loads(good))))).encode()
    return file, draw(damaged(st.just(good)))


def stores() -> st.SearchStrategy:
    """Damage to the store, which is built here: a strategy may not."""
    return store_damage(built_store()[0])


def check_store(value: tuple[str, bytes]) -> bool:
    """What is opened is what was written; and what cannot be opened is built again, the same."""
    file, data = value
    good, source = built_store()
    with TemporaryDirectory() as name:
        path = Path(name) / "store" / good.name
        shutil.copytree(good, path)
        (path / file).write_bytes(data)
        opened, was_refused = refused(lambda: open_store(path), str(path))
        whole = open_store(good)
        if was_refused:
            opened = build(path.parent, source)
        for field in ("tokens", "starts", "lengths", "num_targets", "rows", "sources", "weights"):
            assert np.array_equal(getattr(opened, field), getattr(whole, field))
        assert (opened.report, opened.key) == (whole.report, whole.key)
        return not was_refused
