"""The store: what goes in is what comes out, once, whole, and for its own key only."""

import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edits import edits
from small_tokenizer import make_tokenizer

from dpo_jax.config import DataConfig, InvalidRowsConfig, SourceConfig
from dpo_jax.data import convert, sources, store
from dpo_jax.data.infer_schema import parser_of
from dpo_jax.data.schemas import Problem
from dpo_jax.data.store import (
    DamagedStore,
    build_or_open_store,
    ids_by_source,
    open_store,
    split_held_out,
)
from dpo_jax.data.tokenize import make_tokenize
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.errors import UserError
from dpo_jax.storage import claim

TOKENIZER = make_tokenizer()
PAIRS = [{"prompt": f"Q{i // 2}?", "chosen": f"yes {i}", "rejected": f"no, no {i}"} for i in range(40)]


def write_rows(path: Path, rows) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def config(*given: SourceConfig, **options) -> DataConfig:
    return DataConfig(train=given, max_length=options.pop("max_length", 64), **options)


def build(folder: Path, *given, data=None, tokenizer=TOKENIZER, stage="dpo", workers=1):
    return build_or_open_store(folder, given, data or config(*given), tokenizer, stage, workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hh(shared) -> tuple[SourceConfig, DataConfig, object]:
    """The real pairs, 1697 rows, and the real tokenizer."""
    source = SourceConfig(path=str(shared / "preference" / "hh_harmless_dev.jsonl"))
    tokenizer = load_tokenizer(str(shared / "models" / "stories260K"), None, None)
    return source, config(source, max_length=512), tokenizer


# ------------------------------------------------------------------------------------------------------- contents


def test_every_real_row_is_kept_as_tokenized_or_named_with_its_cause(hh, tmp_path):
    source, data, tokenizer = hh
    built = build(tmp_path, source, data=data, tokenizer=tokenizer)
    rows = sources.load_rows(source)
    parse = parser_of("auto", list(rows[0]), [rows[0]], "dpo")
    tokenize = make_tokenize(data, tokenizer, "dpo")
    problems = [json.loads(line) for line in (built.path / "problems.jsonl").read_text().splitlines()]
    dropped = {line["row"]: line["cause"] for line in problems if line["kind"] == "dropped"}
    assert sorted([*built.rows, *dropped]) == list(range(1697))
    place = {row: i for i, row in enumerate(built.rows.tolist())}
    for row in range(0, 1697, 7):
        example = parse(row, rows[row])
        made = example if isinstance(example, Problem) else tokenize(example)
        if isinstance(made, Problem):
            assert dropped[row] == made.cause
            continue
        prompt, answers, learned = built.example(place[row])
        assert prompt.tolist() == made.prompt
        assert [a.tolist() for a in answers] == list(made.answers)
        assert learned is None
        assert built.lengths[place[row]].tolist() == [len(prompt), *map(len, answers)]
    (report,) = built.report
    assert report["rows"] == 1697
    assert report["kept"] == len(built) == 1697 - len(dropped)
    for kind in ("dropped", "notes"):
        for cause, found in report[kind].items():
            lines = [line for line in problems if line["kind"] == kind and line["cause"] == cause]
            assert found["count"] == len(lines) > 0
            assert [one["row"] for one in found["first"]] == [line["row"] for line in lines][: store.MAX_LISTED_ROWS]


def test_several_sources_and_row_weights(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", [row | {"weight": 0.5} for row in PAIRS[:3]])
    margins = {"margin": "0.25"}, {"margin": "large"}
    second = write_rows(
        tmp_path / "b.jsonl", [PAIRS[3] | margins[0], PAIRS[4] | {"chosen": None}, PAIRS[5] | margins[1]]
    )
    data = config(first, second, invalid_rows=InvalidRowsConfig(missing_field="drop"))
    built = build(tmp_path / "store", first, second, data=data)
    assert built.sources.tolist() == [0, 0, 0, 1, 1]
    assert built.rows.tolist() == [0, 1, 2, 0, 2]
    assert built.weights.tolist() == [0.5, 0.5, 0.5, 1, 1]
    np.testing.assert_array_equal(built.margins, [0, 0, 0, 0.25, np.nan])
    assert [report["dropped"].get("missing_field", {}).get("count") for report in built.report] == [None, 1]
    assert [ids.tolist() for ids in ids_by_source(built, np.array([4, 0, 3]))] == [[0], [4, 3]]


def test_fine_tuning_keeps_which_tokens_are_learned(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"},
            {"role": "user", "content": "so"}, {"role": "assistant", "content": "c"}]  # fmt: skip
    source = write_rows(tmp_path / "talk.jsonl", [{"messages": talk}, {"messages": talk[:2]}])
    built = build(tmp_path / "store", source, stage="sft")
    prompt, (answer,), learned = built.example(0)
    assert TOKENIZER.decode(prompt) == "<user>hi</s><assistant>"
    assert TOKENIZER.decode(answer[learned]) == "ab</s>c</s>"
    assert built.num_targets.tolist() == [[5], [3]]
    assert len(learned) == len(answer) == built.lengths[0, 1]
    plain = build(tmp_path / "store", write_rows(tmp_path / "plain.jsonl", PAIRS))
    assert [(report["rendered"], report["kept"]) for report in (*built.report, *plain.report)] == [
        (2, 2),
        (0, len(plain)),
    ]


def test_a_file_that_changes_while_it_is_tokenized_leaves_no_store(tmp_path):
    """Its first rows are read before the change, the others after it: neither content's key may name the mixture."""
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    other = [row | {"chosen": row["chosen"].upper()} for row in PAIRS]

    class Changes:
        """The tokenizer, which finds at the first text that somebody writes to the file."""

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def __call__(self, texts, **options):
            if "Q1?" in str(texts):
                write_rows(tmp_path / "a.jsonl", other)
            return TOKENIZER(texts, **options)

    with pytest.raises(UserError, match="the data changed while it was tokenized; start again"):
        build(tmp_path / "store", source, tokenizer=Changes())
    assert list((tmp_path / "store").iterdir()) == []
    built = build(tmp_path / "store", source)
    assert TOKENIZER.decode(built.example(0)[1][0]) == "YES 0</s>"


def test_a_dataset_object_is_a_source(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(PAIRS)
    file = write_rows(tmp_path / "a.jsonl", PAIRS)
    built = build_or_open_store(tmp_path / "s", [rows], config(file), TOKENIZER, "dpo", 1)
    assert np.array_equal(built.tokens, build(tmp_path / "t", file).tokens)
    again = build_or_open_store(tmp_path / "s", [datasets.Dataset.from_list(PAIRS)], config(file), TOKENIZER, "dpo", 1)
    assert again.path == built.path


# ------------------------------------------------------------------------------------------------------- once


def test_a_second_start_tokenizes_nothing(hh, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    source, data, tokenizer = hh
    start = time.process_time()
    built = build(tmp_path, source, data=data, tokenizer=tokenizer)
    first = time.process_time() - start
    assert "tokenizing 1697 rows" in caplog.text
    caplog.clear()

    def nothing_may_be_converted(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(store, "converted_chunks", nothing_may_be_converted)
    start = time.process_time()
    again = build(tmp_path, source, data=data, tokenizer=tokenizer)
    assert time.process_time() - start < first / 4
    assert again.key == built.key
    assert again.report == built.report
    assert not caplog.text
    assert np.array_equal(again.tokens, built.tokens)
    assert np.array_equal(again.starts, built.starts)
    assert not list(tmp_path.glob(".building-*"))


def test_workers_give_the_same_bytes(tmp_path, monkeypatch):
    """Two real processes against none, with chunks that end in several places, one without an example among them."""
    monkeypatch.setattr(convert, "MIN_ROWS_PER_PROCESS", 100)
    monkeypatch.setattr(convert, "CHUNK_ROWS", 50)  # more chunks than are handed out at a time
    many = [row | {"chosen": "" if 512 <= i < 800 else row["chosen"]} for i, row in enumerate(PAIRS * 30)]
    source, other = write_rows(tmp_path / "a.jsonl", many), write_rows(tmp_path / "b.jsonl", PAIRS)
    alone = build(tmp_path / "1", source, other, workers=1)
    parallel = build(tmp_path / "2", source, other, workers=2)
    assert convert.num_processes(len(many), 2) == 2
    assert len(alone) == 1240 - 288
    assert contents(alone.path) == contents(parallel.path)


# ------------------------------------------------------------------------------------------------------- whole


def cut_tokens(path):
    os.truncate(path / "tokens.bin", 100)


def flip_bit(path):
    data = bytearray((path / "tokens.bin").read_bytes())
    data[50] ^= 1
    (path / "tokens.bin").write_bytes(data)


def lose_manifest(path):
    (path / "manifest.json").unlink()


def cut_manifest(path):
    os.truncate(path / "manifest.json", 200)


def edit_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"num_answers": 2', '"num_answers": 1'))


def empty_manifest(path):
    (path / "manifest.json").write_text("{}")


def nest_manifest(path):
    (path / "manifest.json").write_text("[" * 100_000)


def lose_problems(path):
    (path / "problems.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [(cut_tokens, "tokens.bin: the file has 100 bytes, expected"), (flip_bit, "tokens.bin: its checksum"),
     (lose_manifest, "no readable manifest.json"), (cut_manifest, "no readable manifest.json"),
     (edit_manifest, "manifest.json: checksum mismatch"), (empty_manifest, "manifest.json: checksum mismatch"),
     (nest_manifest, "manifest.json: not JSON: RecursionError"),
     (lose_problems, "problems.jsonl: the file is missing")],
)  # fmt: skip
def test_a_damaged_store_is_built_again_and_said(damage, said, tmp_path, caplog):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    built = build(tmp_path / "s", source)
    before = contents(built.path)
    damage(built.path)
    with pytest.raises(DamagedStore, match=said):
        open_store(built.path)
    again = build(tmp_path / "s", source)
    assert said in caplog.text
    assert "tokenizing the data again" in caplog.text
    assert not [arg for record in caplog.records for arg in record.args if isinstance(arg, Exception)]
    assert again.path == built.path
    assert contents(again.path) == before


def test_every_edit_of_a_manifest_damages_the_store(tmp_path):
    built = build(tmp_path / "s", write_rows(tmp_path / "a.jsonl", PAIRS))
    path = built.path / "manifest.json"
    intact = path.read_bytes()
    for name, text in edits(intact).items():
        path.write_bytes(text)
        with pytest.raises(DamagedStore) as damage:
            open_store(built.path)
        assert len(str(damage.value).splitlines()) == 1, name
    path.write_bytes(intact)
    assert len(open_store(built.path)) == len(built)


def test_a_store_of_another_key_is_not_used(tmp_path):
    """Neither found, nor opened under a name that is not its own."""
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    built = build(tmp_path / "s", source)
    built.path.rename(tmp_path / "s" / "0123456789abcdef")
    with pytest.raises(DamagedStore, match="its manifest belongs to store"):
        open_store(tmp_path / "s" / "0123456789abcdef")


def test_builders_at_once(tmp_path):
    """Whoever comes first wins; every one of them gets a whole store, over a damaged one too."""
    source = write_rows(tmp_path / "a.jsonl", PAIRS * 8)
    one = build(tmp_path / "one", source)
    tokenizers = [make_tokenizer() for _ in range(4)]
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            stores = list(pool.map(lambda tokenizer: build(tmp_path / "s", source, tokenizer=tokenizer), tokenizers))
        for built in stores:
            assert np.array_equal(built.tokens, one.tokens)
            assert built.key == one.key
        assert [path.name for path in (tmp_path / "s").iterdir()] == [one.path.name]
        flip_bit(stores[0].path)


def test_leftovers_of_a_killed_build_go_in_time(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    old, young = tmp_path / "s" / ".building-old", tmp_path / "s" / ".building-young"
    for path in (old, young):
        (path / "store").mkdir(parents=True)
        (path / "store" / "tokens.bin").write_bytes(b"half")
    past = time.time() - 2 * store.STALE_SECONDS
    for path in (old / "store" / "tokens.bin", old / "store", old):
        os.utime(path, (past, past))
    claim(young).close()
    with claim(young):  # by a build that goes on
        build(tmp_path / "s", source)
        assert not old.exists()
        assert young.exists()
    build(tmp_path / "s", source)  # that build was killed; this one finds its own store
    assert not young.exists()


# ------------------------------------------------------------------------------------------------------- the key


def test_all_that_affects_the_content_is_in_the_key(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", PAIRS)
    data = config(source)
    other_template = make_tokenizer()
    other_template.chat_template += " "
    same = build(tmp_path / "s", source).key
    others = [
        build(tmp_path / "s", source, data=replace(data, max_length=63)),
        build(tmp_path / "s", source, data=replace(data, truncation="keep_end")),
        build(tmp_path / "s", source, data=replace(data, append_eos=False)),
        build(tmp_path / "s", source, data=replace(data, invalid_rows=InvalidRowsConfig(too_long="drop"))),
        build(tmp_path / "s", source, tokenizer=other_template),
        build(tmp_path / "s", source, stage="sft"),
        build(tmp_path / "s", source, source),
        build(tmp_path / "s", replace(source, limit=10)),
        build(tmp_path / "s", replace(source, columns={"chosen": "rejected", "rejected": "chosen"})),
        build(tmp_path / "s", replace(source, schema="preference")),
        build(tmp_path / "s", write_rows(tmp_path / "b.jsonl", PAIRS[::-1])),
    ]
    assert len({same, *(built.key for built in others)}) == 12
    assert build(tmp_path / "s", source, data=replace(data, template_date="2025-01-01")).key == same
    other_template.chat_template += "{{ strftime_now('%d') }}"
    dates = ("2024-07-26", "2025-01-01")
    dated = [build(tmp_path / "s", source, data=replace(data, template_date=date), tokenizer=other_template)
             for date in dates]  # fmt: skip
    assert dated[0].key != dated[1].key

    (tmp_path / "elsewhere").mkdir()
    moved = write_rows(tmp_path / "elsewhere" / "c.jsonl", PAIRS)
    reweighted = replace(source, weight=2.0)
    for one, options in ((moved, data), (reweighted, data), (source, replace(data, shuffle=False, workers=3))):
        assert build(tmp_path / "s", one, data=options).key == same


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_set_of_which_nothing_is_left(tmp_path):
    rows = [PAIRS[0] | {"chosen": ""}, PAIRS[1] | {"chosen": "", "rejected": ""}, PAIRS[2] | {"prompt": "x" * 70}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a.jsonl: none of its 3 rows.*empty_answer 2 \(row 0: .*too_long 1 \(row 2"):
        build(tmp_path / "s", source)
    assert list((tmp_path / "s").iterdir()) == []


def test_an_invalid_row_that_is_an_error(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "p", "chosen": 3, "rejected": "r"}])
    with pytest.raises(
        UserError, match=r"a.jsonl, row 40: missing_field: chosen is 3.*data.invalid_rows.missing_field"
    ):
        build(tmp_path / "s", source)


def test_layout_and_folder_errors_name_the_thing(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"question": "?", "answer": "!"}])
    with pytest.raises(UserError, match=r"a.jsonl: columns \['answer', 'question'\]"):
        build(tmp_path / "s", source)
    with pytest.raises(UserError, match=r"data.store: .*a.jsonl"):
        build(tmp_path / "a.jsonl", write_rows(tmp_path / "b.jsonl", PAIRS))


# ------------------------------------------------------------------------------------------------------- held out


def test_held_out_prompts_are_on_one_side(hh, tmp_path):
    source, data, tokenizer = hh
    built = build(tmp_path, source, data=data, tokenizer=tokenizer)
    train, held = split_held_out(built, 0.1)
    assert sorted([*train, *held]) == list(range(len(built)))
    assert len(held) == round(0.1 * len(built))
    assert not set(built.prompts[train]) & set(built.prompts[held])
    assert (np.diff(train) > 0).all()
    assert (np.diff(held) > 0).all()


def test_held_out_does_not_depend_on_the_order_of_rows(tmp_path):
    one, other = (build(tmp_path / "s", write_rows(tmp_path / "a.jsonl", rows)) for rows in (PAIRS, PAIRS[::-1]))
    held_of = lambda built: set(built.prompts[split_held_out(built, 0.25)[1]])  # noqa: E731
    assert held_of(one) == held_of(other)
    assert len(held_of(one)) == 5
    assert split_held_out(one, 0.25)[1].tolist() == [6, 7, 20, 21, 26, 27, 32, 33, 34, 35]


def test_held_out_prompts_are_taken_one_by_one(tmp_path):
    """By their hashes, each that is not too large for what is left, in arrays and one by one."""
    built = build(tmp_path / "s", write_rows(tmp_path / "a.jsonl", PAIRS))
    for seed in range(20):
        chance = np.random.Generator(np.random.Philox(seed))
        prompts = chance.integers(0, 2**64, 12, np.uint64)[chance.geometric(0.3, 40).clip(max=12) - 1]
        expected: list[int] = []
        for prompt in np.unique(prompts):
            members = np.flatnonzero(prompts == prompt).tolist()
            if len(expected) + len(members) <= 15:
                expected += members
        held = split_held_out(replace(built, prompts=prompts, rows=built.rows[:40]), 15 / 40)[1]
        assert held.tolist() == sorted(expected)


def test_texts_without_a_prompt_are_split_one_by_one(tmp_path):
    texts = [{"text": f"story {i // 2}"} for i in range(20)]
    built = build(tmp_path / "s", write_rows(tmp_path / "a.jsonl", texts), stage="sft")
    train, held = split_held_out(built, 0.3)
    assert len(held) == 6
    assert not {i // 2 for i in train.tolist()} & {i // 2 for i in held.tolist()}


def test_nothing_held_out_and_splits_that_cannot_be(tmp_path):
    built = build(tmp_path / "s", write_rows(tmp_path / "a.jsonl", PAIRS))
    train, held = split_held_out(built, 0.0)
    assert len(train) == 40
    assert len(held) == 0
    for fraction in (0.01, 0.99):
        with pytest.raises(UserError, match=f"data.eval_fraction: {fraction} of 40 examples"):
            split_held_out(build(tmp_path / "s", write_rows(tmp_path / "a.jsonl", [PAIRS[0]] * 40)), fraction)


def test_data_imports_no_jax():
    code = "import sys, dpo_jax.data.store, dpo_jax.batching.order; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
