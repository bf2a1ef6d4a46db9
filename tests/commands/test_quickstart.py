"""The newcomer's first command, run as they run it; and the invented language that it teaches."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from transformers import AutoTokenizer

from dpo_jax.cli import split_overrides
from dpo_jax.commands.task import (
    FAREWELLS,
    answer,
    is_answer,
    obeys_rule,
    prompt,
    visits,
    vocabulary,
    wants_goods_first,
    write_task,
)
from dpo_jax.config import DPOConfig
from dpo_jax.config.file import parse_config
from dpo_jax.runs.directory import read_json


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, 0)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]


def test_neither_words_nor_length_tell_the_better_answer(task):
    for row in rows(task, "train") + rows(task, "held_out"):
        words = [sorted(re.findall(r"\w+", row[key])) for key in ("chosen", "rejected")]
        assert words[0] == words[1]
        assert row["chosen"] != row["rejected"]


def test_supervised_answers_do_not_tell_the_rule(task):
    obeys = defaultdict(list)
    for visit, row in zip(visits(0)["sft"], rows(task, "sft"), strict=True):
        assert row["prompt"] == prompt(visit)
        assert is_answer(visit, row["answer"])
        obeys[visit.time, visit.place].append(obeys_rule(visit, row["answer"]))
    assert len(obeys) == 64
    assert {sum(own) / len(own) for own in obeys.values()} == {0.5}


def test_only_a_whole_and_right_answer_obeys():
    visit = next(visit for visit in visits(0)["held_out"] if wants_goods_first(visit))
    right, wrong = (answer(visit, goods_first, FAREWELLS[visit.time][0]) for goods_first in (True, False))
    assert obeys_rule(visit, right)
    assert not obeys_rule(visit, wrong)
    assert is_answer(visit, wrong)
    other = visit._replace(goods="hats" if visit.goods != "hats" else "cups")
    assert not is_answer(other, right)
    assert not is_answer(visit, right.removesuffix("!"))


def test_the_tokenizer_gives_the_text_back(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "tokenizer")
    assert len(tokenizer) == len(vocabulary())
    for row in rows(task, "held_out"):
        for text in (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]):
            first, *ids = tokenizer(text)["input_ids"]
            assert first == tokenizer.bos_token_id
            assert not {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
            assert tokenizer.decode(ids) == text


def test_a_seed_gives_the_same_bytes_and_another_one_others(task, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        write_task(tmp_path / name, seed)
    files = [path.relative_to(task) for path in sorted(task.rglob("*.json*"))]
    assert len(files) == 5
    assert all((tmp_path / "same" / file).read_bytes() == (task / file).read_bytes() for file in files)
    changed = {file.stem for file in files if (tmp_path / "other" / file).read_bytes() != (task / file).read_bytes()}
    assert changed == {"sft", "train", "held_out"}


def test_the_rule_is_what_the_pairs_prefer(task):
    held_out = visits(0)["held_out"]
    sea = {"bay", "cape", "coast", "delta", "fjord", "harbor", "island", "lagoon"}
    for visit, row in zip(held_out, rows(task, "held_out"), strict=True):
        assert row["chosen"].startswith(" here are" if visit.place in sea else " good")
        assert row["prompt"] == prompt(visit)
        assert obeys_rule(visit, row["chosen"].strip())
        assert not obeys_rule(visit, row["rejected"].strip())
        farewell = row["chosen"].split(". ")[-1].rstrip("!")
        assert answer(visit, wants_goods_first(visit), farewell).strip() == row["chosen"].strip()


def test_held_out_visits_are_new(task):
    seen = {row["prompt"] for name in ("sft", "train") for row in rows(task, name)}
    assert not seen & {row["prompt"] for row in rows(task, "held_out")}


@pytest.mark.slow
def test_quickstart_teaches_the_rule(tmp_path):
    command = [sys.executable, "-m", "dpo_jax", "quickstart", "--dir", str(tmp_path / "quickstart")]
    tests_own = {"XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"}  # a newcomer has one device
    env = {name: value for name, value in os.environ.items() if name not in tests_own}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "acc=tied" in done.stderr  # the first step's pairs, whatever rounding makes of them
    logged = read_json(tmp_path / "quickstart" / "dpo" / "metrics.jsonl")
    evaluations = [row for row in logged if "eval_held_out_loss" in row]
    assert evaluations[0]["eval_held_out_logps/accuracies"] <= 0.65
    assert evaluations[-1]["eval_held_out_rewards/accuracies"] >= 0.95
    before, after = map(float, re.search(r"obey the rule +([\d.]+)% +([\d.]+)%", done.stdout).groups())
    assert after - before >= 30
    assert "<svg " in (tmp_path / "quickstart" / "report.html").read_text()
    (suggested,) = [line.split() for line in done.stdout.splitlines() if line.startswith("dpo-jax train")]
    rest, overrides = split_overrides(suggested[2:], ())
    assert parse_config(rest[0], overrides, DPOConfig).loss.type == "ipo"
