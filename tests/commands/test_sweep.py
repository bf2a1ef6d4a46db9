"""Runs that are compared with runs: a reference that follows the policy, and one config at several betas."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_tokenizer import make_tokenizer

from dpo_jax import cli
from dpo_jax.commands.evaluate import evaluate
from dpo_jax.commands.sweep import sampled_rows_of
from dpo_jax.config import DPOConfig
from dpo_jax.config.file import config_to_yaml, parse_config
from dpo_jax.errors import UserError
from dpo_jax.runs.directory import read_json
from dpo_jax.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Thirty-two pairs, eight of which are held out, and a tokenizer."""
    folder = tmp_path_factory.mktemp("sweep")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"prompt": f"Q{i}", "chosen": "yes" * (1 + i % 3), "rejected": f"no {i}"} for i in range(32)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder: Path, run: str, **overrides) -> DPOConfig:
    source = {
        "model": {"path": "builtin:tiny", "tokenizer": str(folder / "tokenizer")},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.25, "workers": 1},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "batch": {"pairs": 8},
        "mesh": {"fsdp": 1},
        "run": {"dir": str(folder / run), "steps": 6, "progress": False, "report": False},
        "checkpoint": {"every": 3},
    }
    return parse_config(source, {name.replace("__", "."): value for name, value in overrides.items()}, DPOConfig)


def run(config: DPOConfig):
    return train(config, devices=jax.devices()[:1])


@pytest.mark.slow
def test_a_reference_that_follows_the_policy_is_resumed_and_judged_as_saved(folder):
    """Step 4 is the first that sees the mixture of step 3, which the save of step 3 holds."""
    sync = {"reference__sync_every": 3, "reference__sync_mix": 1.0}
    run(config_of(folder, "whole", **sync))
    run(config_of(folder, "cut", run__steps=3, **sync))
    last = run(config_of(folder, "cut", **sync))
    whole, cut = (folder / name / "metrics.jsonl" for name in ("whole", "cut"))
    steps = {row["step"]: row for row in read_json(whole) if "loss" in row}
    assert [row for row in read_json(cut) if "loss" in row] == list(steps.values())
    # after a hard copy every reward is 0 again
    assert abs(steps[3]["rewards/margins"]) > 1e-3
    assert steps[4]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert steps[4]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["eval_held_out_rewards/margins"] == 0  # step 6 ends with a copy, before it is judged
    with pytest.raises(UserError, match=r"run\.dir: .* it was trained against another reference"):
        evaluate(config_of(folder, "whole", mesh__fsdp=-1), folder / "pairs_out.jsonl")
    summary = evaluate(config_of(folder, "whole", mesh__fsdp=-1, **sync), folder / "pairs_out.jsonl")
    assert summary["sets"]["held_out"]["rewards/margins"] == 0


@pytest.mark.slow
def test_a_larger_beta_moves_less(folder, capsys):
    config = config_of(folder, "sweep", run__steps=12, checkpoint__every=12)
    (folder / "sweep.yaml").write_text(config_to_yaml(config))
    argv = ["sweep", str(folder / "sweep.yaml"), "--betas", "0.1,10", "--mesh.fsdp", "-1"]
    assert cli.main(argv) == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| beta | set | accuracy | reward margin | KL | displacement | margin, nats |"
    rows = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert [row["beta"] for row in rows] == [0.1, 10]
    assert len(table) == 2 + len(rows)
    distances = [row["KL"] for row in rows]
    assert distances[0] > distances[1] > 0
    for row in rows:
        kept = {}
        for line in read_json(folder / "sweep" / f"beta-{row['beta']:g}" / "metrics.jsonl"):
            kept |= line
        assert row["KL"] == kept["eval_held_out_kl"]
        assert row["margin, nats"] == pytest.approx(kept["eval_held_out_rewards/margins"] / row["beta"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--betas", "0.1,x"], "--betas: '0.1,x' cannot be used: write numbers separated by commas"),
        (["--betas", "0.1,-1"], "loss.beta must be positive, got -1.0"),
        (["--betas", "0.1,0.1"], "--betas: [0.1, 0.1] has duplicates"),
        (["--betas", "0.1", "--loss.type", "simpo"], "reference.mode: with none, a sweep cannot compare KLs"),
    ],
)
def test_what_a_sweep_refuses(folder, capsys, words, line):
    (folder / "refused.yaml").write_text(config_to_yaml(config_of(folder, "refused")))
    assert cli.main(["sweep", str(folder / "refused.yaml"), *words]) == 2
    assert line in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_a_sweep_of_online_dpo_compares_answers_and_needs_prompts_for_it(folder, capsys):
    metrics = {"score": 9.0, "eval_x_score": 1.5, "eval_x_sampled_kl": 0.5, "eval_x_win_rate": 0.75}
    metrics |= {"eval_x_length": 8.0, "eval_x_ended": 1.0}
    row = {"beta": 0.1, "set": "x", "score": 1.5, "KL": 0.5, "win rate": 0.75, "length": 8.0, "ended": 1.0}
    assert sampled_rows_of(0.1, metrics) == [row]
    config = folder / "online.yaml"
    online = {"data__online__reward__function": "rewards:vowels", "data__eval_fraction": 0.0}
    config.write_text(config_to_yaml(config_of(folder, "online", **online)))
    assert cli.main(["sweep", str(config), "--betas", "0.1,0.2"]) == 2
    assert "data.eval: a sweep of online DPO needs an evaluation set" in capsys.readouterr().err
