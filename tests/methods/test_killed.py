"""Runs on sampled answers, killed at random moments: what they come to is what a run never killed comes to."""

import json
import random

import pytest
from runs import ended, events, killed, saved_bits, write_config

STEPS = 12
DATA = {"max_length": 64, "workers": 1, "eval_fraction": 0.25}
JUDGE = {"function": "rewards:vowels"}
COMMANDS = {
    "ppo": {
        "data": DATA, "reward": JUDGE, "sampling": {"max_tokens": 8}, "ppo": {"epochs": 2}, "batch": {"prompts": 8}
    },
    "train": {
        "data": DATA | {"online": {"reward": JUDGE, "answers": 3, "sampling": {"max_tokens": 8}}}, "batch": {"pairs": 8}
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_killed_at_five_random_moments_is_as_one_that_never_was(shared, tmp_path, command):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Once there were {i}"}) + "\n" for i in range(32)))
    whole, run, said = tmp_path / "whole", tmp_path / "run", tmp_path / "said"
    sections = COMMANDS[command]
    config = write_config(
        tmp_path / "config.yaml",
        sections
        | {
            "model": {"path": str(shared / "models" / "stories260K")},
            "data": sections["data"] | {"train": str(prompts), "store": str(tmp_path / "store")},
            "optimizer": {"learning_rate": 1e-3},
            "run": {"dir": str(run), "steps": STEPS, "eval_every": 4, "progress": False, "report": False},
            "checkpoint": {"every": 2},
        },
    )
    assert ended(command, config, "--run.dir", whole, output=said) == (0, "")
    chance = random.Random(2)
    killed(sorted(chance.sample(range(STEPS), 5)), command, config, run=run, output=said, chance=chance)
    assert ended(command, config, output=said) == (0, "")
    assert len(events(run, "start")) == 6
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert saved_bits(run, STEPS) == saved_bits(whole, STEPS)
