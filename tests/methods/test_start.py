"""A small run's start and its going on, in this process."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_tokenizer import make_tokenizer

from dpo_jax.config import DPOConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.parallel import hosts
from dpo_jax.runs.directory import read_json
from dpo_jax.train import train

NUM_PAIRS, STEPS = 8, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four steps of two pairs with a cached reference, saved after every second one; and the run itself."""
    folder = tmp_path_factory.mktemp("start")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"prompt": f"Q{i}", "chosen": "yes" * (1 + i), "rejected": "no"} for i in range(NUM_PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model": {"path": "builtin:tiny", "tokenizer": str(folder / "tokenizer")},
        "data": {"train": str(folder / "pairs.jsonl"), "workers": 1, "store": str(folder / "store")},
        "reference": {"mode": "cached"},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"pairs": 2},
        "run": {"dir": str(folder / "run"), "steps": STEPS, "progress": False, "report": False},
        "checkpoint": {"every": 2},
    }
    config = parse_config(given, {}, DPOConfig)
    train(config, devices=jax.devices()[:1])
    return config


def test_the_steps_after_the_last_save_are_done_again_to_the_same_bytes(config, tmp_path):
    """The newest save lost, the run goes on from the one before, and its log is cut back to it first."""
    run = tmp_path / "run"
    shutil.copytree(config.run.dir, run)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    before = (run / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in read_json(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    train(replace(config, run=replace(config.run, dir=str(run))), devices=jax.devices()[:1])
    assert (run / "metrics.jsonl").read_bytes() == before
    assert [event["step"] for event in read_json(run / "events.jsonl") if event["event"] == "restore"] == [STEPS // 2]


def test_hosts_that_read_other_data_are_refused(config, monkeypatch, tmp_path):
    """As if a second process had other rows; with a live reference nothing else would tell."""
    gather = hosts.gather
    other = lambda value, what, *rest: [value, ["other"]] if what == "data" else gather(value, what, *rest)  # noqa: E731
    monkeypatch.setattr(hosts, "gather", other)
    with pytest.raises(UserError, match=r"^data: process 1 reads other files than process 0: give all hosts the same$"):
        train(replace(config, run=replace(config.run, dir=str(tmp_path / "run"))), devices=jax.devices()[:1])


def test_a_stale_cache_is_refused_before_the_first_step(config, tmp_path):
    """One log-prob of a cache that is whole by its digest, but not of these weights."""
    (path,) = Path(config.data.store).glob("*/reference-*.npz")
    good = path.read_bytes()
    with np.load(path) as file:
        sums, about = file["sum"] + np.float32(0.01), json.loads(str(file["about"]))
    digest = hashlib.sha256(b"sum" + sums.tobytes()).hexdigest()
    np.savez(path, sum=sums, about=json.dumps({**about, "digest": digest}))
    other = replace(config, run=replace(config.run, dir=str(tmp_path / "run")))
    try:
        with pytest.raises(UserError, match=r"reference have the same weights, but their log-probs differ by"):
            train(other, devices=jax.devices()[:1])
    finally:
        path.write_bytes(good)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
