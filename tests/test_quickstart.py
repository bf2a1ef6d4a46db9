"""The newcomer's first command, run as they run it; and the made language that it teaches."""

import json
import re
import subprocess
import sys

import pytest

from dpo_jax.rundir import read_json
from dpo_jax.task import answer, obeys_rule, prompt, visits, wants_goods_first, write_task


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
    given = rows(task, "sft")
    asked = {prompt(visit): visit for group in visits(0).values() for visit in group}
    obeys = [obeys_rule(asked[row["prompt"]], row["answer"].strip()) for row in given if row["prompt"] in asked]
    assert len(obeys) > 1000
    assert abs(sum(obeys) / len(obeys) - 0.5) < 0.02


def test_the_rule_is_what_the_pairs_prefer(task):
    held_out = visits(0)["held_out"]
    for visit, row in zip(held_out, rows(task, "held_out"), strict=True):
        assert row["prompt"] == prompt(visit)
        assert obeys_rule(visit, row["chosen"].strip())
        assert not obeys_rule(visit, row["rejected"].strip())
        farewell = row["chosen"].split(". ")[-1].rstrip("!")
        assert answer(visit, wants_goods_first(visit), farewell).strip() == row["chosen"].strip()


def test_held_out_visits_are_new(task):
    seen = {row["prompt"] for name in ("sft", "train") for row in rows(task, name)}
    assert not seen & {row["prompt"] for row in rows(task, "held_out")}


def test_quickstart_teaches_the_rule(tmp_path):
    command = [sys.executable, "-m", "dpo_jax", "quickstart", "--dir", str(tmp_path / "quickstart")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    logged = read_json(tmp_path / "quickstart" / "dpo" / "metrics.jsonl")
    evaluations = [row for row in logged if "eval_held_out_loss" in row]
    assert evaluations[0]["eval_held_out_logps/accuracies"] <= 0.65
    assert evaluations[-1]["eval_held_out_rewards/accuracies"] >= 0.95
    before, after = map(float, re.search(r"obey the rule +([\d.]+)% +([\d.]+)%", done.stdout).groups())
    assert after - before >= 30
    assert "<img" in (tmp_path / "quickstart" / "report.html").read_text()
