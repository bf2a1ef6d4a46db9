"""Runs that are killed, stopped, or stop themselves: what they come to is what an uninterrupted run comes to."""

import hashlib
import json
import random
import signal
import socket
import time
from contextlib import contextmanager

import numpy as np
import pytest
from runs import ended, events, num_lines, saved_bits, started, write_config

from dpo_jax.config import FatesConfig
from dpo_jax.rundir import read_json

STEPS = 24


@pytest.fixture
def config(shared, tmp_path):
    """A short run: 4 pairs a step, saved every 5 steps, evaluated at the start, in the middle and at the end."""
    return write_config(
        tmp_path / "config.yaml",
        {
            "model": {"path": str(shared / "models" / "stories260K")},
            "data": {"train": {"path": str(shared / "reference_curves" / "pairs.jsonl"), "limit": 80},
                     "eval_fraction": 0.1, "max_length": 160, "workers": 1, "store": str(tmp_path / "store")},
            "optimizer": {"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 3},
            "batch": {"pairs": 4},
            "run": {"dir": str(tmp_path / "run"), "steps": STEPS, "eval_every": 12, "progress": False, "report": False},
            "checkpoint": {"every": 5},
        },
    )  # fmt: skip


def test_killed_and_stopped_anywhere_a_run_is_as_if_it_never_was(config, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ended("train", config, "--run.dir", whole, output=tmp_path / "said") == (0, "")

    def restart():
        return started("train", config, output=tmp_path / "said")

    def restored() -> int:
        return len(events(run, "restore"))

    with restart() as running:  # killed before the first save
        running.wait_for(lambda: num_lines(run / "metrics.jsonl") >= 4)
        running.kill()
    with restart() as running:  # killed in the midst of a save: frozen, to be sure of it
        while True:
            running.wait_for(lambda: list((run / "checkpoints").glob("*tmp*")))
            running.send(signal.SIGSTOP)
            if under_way := list((run / "checkpoints").glob("*tmp*")):
                break
            running.send(signal.SIGCONT)  # that save had just come to its end
        running.kill()
    assert under_way[0].exists()
    with restart() as running:  # killed some steps after a save
        running.wait_for((run / "checkpoints" / "10").exists)
        lines = num_lines(run / "metrics.jsonl")
        running.wait_for(lambda: num_lines(run / "metrics.jsonl") >= lines + 2)
        running.kill()
    before = restored()
    with restart() as running:  # asked to stop
        running.wait_for(lambda: restored() > before)
        lines = num_lines(run / "metrics.jsonl")
        running.wait_for(lambda: num_lines(run / "metrics.jsonl") > lines)
        running.send(signal.SIGTERM)
        assert running.code() == 42
    stopped = events(run, "preempt")[0]["step"]
    assert f"stopped after step {stopped} of {STEPS}, the state is saved: run the same command again" in running.said()
    assert ended("train", config, output=tmp_path / "said") == (0, "")

    assert events(run, "restore")[-1]["step"] == stopped  # nothing that was done is done again
    for name in ("metrics.jsonl", "distributions.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert [row["step"] for row in read_json(run / "timings.jsonl")] == list(range(1, STEPS + 1))
    assert saved_bits(run, STEPS) == saved_bits(whole, STEPS)


def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_step(config, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    wild = ["--optimizer.learning_rate", "1e30", "--optimizer.schedule", "constant", "--optimizer.warmup_steps", "0"]
    code, said = ended("train", config, *wild, output=tmp_path / "said")
    assert code == 43
    good = events(run, "save")[-1]["step"]
    assert good > 0
    assert said.count("\n") == 1
    assert said.startswith(f"dpo-jax: error: step {good + 1}: loss ")
    assert f"the state after step {good} is saved; lower optimizer.learning_rate or look at rows " in said
    rows = said.split("look at rows ")[1].split(", ")
    assert len(rows) == 4
    assert all(row.rpartition(":")[0].endswith("pairs.jsonl") and int(row.rpartition(":")[2]) < 80 for row in rows)
    assert read_json(run / "metrics.jsonl")[-1]["step"] == good

    again = ended("train", config, *wild, output=tmp_path / "said")  # it goes on from there, and comes no further
    assert again == (43, said)
    assert events(run, "restore")[-1]["step"] == good
    every_step = ["--checkpoint.every", "1", "--run.dir", whole]  # there that step is saved before the bad one is made
    assert ended("train", config, *wild, *every_step, output=tmp_path / "said") == (43, said)
    assert saved_bits(run, good) == saved_bits(whole, good)


def test_a_stale_reference_cache_is_refused_at_step_0(config, tmp_path):
    options = ["--reference.mode", "cached", "--data.shuffle", "false", "--data.eval_fraction", "0", "--run.steps", "2"]
    assert ended("train", config, *options, output=tmp_path / "said") == (0, "")  # equal starts pass
    first = read_json(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=3e-6)
    (cache,) = (tmp_path / "store").glob("*/reference-*.npz")
    with np.load(cache) as file:
        sums, about = file["sum"].copy(), json.loads(str(file["about"]))
    sums[1, 0] += 0.05  # of a pair of the first step, a little
    about["digest"] = hashlib.sha256(b"sum" + sums.tobytes()).hexdigest()
    with open(cache, "wb") as file:
        np.savez(file, sum=sums, about=json.dumps(about))

    other = tmp_path / "other"
    code, said = ended("train", config, *options, "--run.dir", other, output=tmp_path / "said")
    assert code == 2
    assert said.count("\n") == 1
    assert "step 0: policy and reference are the same weights, but their log-probs differ by " in said
    assert "remove its reference-*.npz" in said
    assert num_lines(other / "metrics.jsonl") == 0
    assert not list((other / "checkpoints").iterdir())

    cache.unlink()  # the remedy
    assert ended("train", config, *options, "--run.dir", other, output=tmp_path / "said") == (0, "")
    equal = [(path / "metrics.jsonl").read_bytes() for path in (tmp_path / "run", other)]
    assert equal[0] == equal[1]


# A whole epoch of real preferences


@pytest.fixture
def hh(shared, tmp_path):
    """One epoch of human preferences, a tenth held out; dialogues lose their oldest turns beyond 512 tokens."""
    return write_config(
        tmp_path / "hh.yaml",
        {
            "model": {"path": str(shared / "models" / "stories260K")},
            "data": {"train": str(shared / "preference" / "hh_harmless_dev.jsonl"), "eval_fraction": 0.1,
                     "max_length": 512, "truncation": "keep_end", "workers": 1, "store": str(tmp_path / "store")},
            "optimizer": {"learning_rate": 5e-4, "schedule": "constant"},
            "batch": {"pairs": 32},
            "run": {"dir": str(tmp_path / "run"), "progress": False, "report": False},
            "checkpoint": {"every": 4},
        },
    )  # fmt: skip


@pytest.mark.slow
def test_an_epoch_killed_at_random_is_the_epoch(hh, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ended("train", hh, "--run.dir", whole, output=tmp_path / "said") == (0, "")
    rows = read_json(whole / "metrics.jsonl")
    (data,) = events(whole, "data")
    trained = sum(row.get("pairs", 0) for row in rows)
    dropped = sum(data["dropped"].values())
    print("rows:", data, "trained:", trained)
    assert set(data["dropped"]) <= set(FatesConfig.__dataclass_fields__)
    assert (data["rows"], trained) == (1697, data["train"])
    assert trained + data["evals"]["held_out"] + dropped == 1697
    accuracy = [row["eval_held_out_rewards/accuracies"] for row in (rows[0], rows[-1])]
    print("held-out accuracy of the implicit reward, before and after:", accuracy)
    assert accuracy[0] == 0  # every reward is 0 then, and ties count as wrong
    assert accuracy[1] > 0.5

    num_steps, chance = rows[-1]["step"], random.Random(3)
    for lines in sorted(chance.sample(range(2, num_steps), 3)):
        starts = len(events(run, "start")) if run.exists() else 0
        with started("train", hh, output=tmp_path / "said") as running:
            running.wait_for(lambda: run.exists() and len(events(run, "data")) > starts)  # noqa: B023
            running.wait_for(lambda: num_lines(run / "metrics.jsonl") > lines)  # noqa: B023
            time.sleep(chance.random())
            running.kill()
    assert ended("train", hh, output=tmp_path / "said") == (0, "")
    print("restored at", [event["step"] for event in events(run, "restore")])
    assert len(events(run, "start")) == 4
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert saved_bits(run, num_steps) == saved_bits(whole, num_steps)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextmanager
def two_processes(*argv, folder):
    """The command in two processes of four devices each, joined over the network."""
    port = free_port()
    env = [{"DPO_JAX_COORDINATOR": f"localhost:{port}", "DPO_JAX_NUM_PROCESSES": "2", "DPO_JAX_PROCESS_ID": str(i),
            "DPO_JAX_START_TIMEOUT": "300"} for i in range(2)]  # fmt: skip
    with (
        started(*argv, output=folder / "said-0", devices=4, env=env[0]) as first,
        started(*argv, output=folder / "said-1", devices=4, env=env[1]) as second,
    ):
        yield first, second


def largest_difference(ours, theirs, keys) -> float:
    """Between two logs, as a share of the value, of values of at least 1."""
    return max(abs(a[key] - b[key]) / max(1.0, abs(b[key])) for a, b in zip(ours, theirs, strict=True) for key in keys)


@pytest.mark.slow
def test_two_processes_of_four_devices_go_on_as_one_of_four(hh, shared, tmp_path):
    run, whole, steps = tmp_path / "run", tmp_path / "whole", 12
    pairs = (shared / "preference" / "hh_harmless_dev.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "dev.jsonl").write_text("".join(pairs[:40]))
    options = ["--batch.pairs", 8, "--run.steps", steps, "--data.eval_fraction", 0, "--checkpoint.keep", 9]
    assert ended("train", hh, *options, "--run.dir", whole, output=tmp_path / "said") == (0, "")

    with two_processes("train", hh, *options, folder=tmp_path) as both:
        both[0].wait_for((run / "checkpoints" / "4").exists)
        lines = num_lines(run / "metrics.jsonl")
        both[0].wait_for(lambda: num_lines(run / "metrics.jsonl") > lines)
        for process in both:
            process.kill()
    assert (events(run, "start")[0]["devices"], events(run, "start")[0]["processes"]) == (8, 2)

    # One save, three layouts, by the pair: log-probs at equal parameters.
    scored = []
    judge = ["eval", hh, *options, "--data.eval.dev", tmp_path / "dev.jsonl", "--output"]
    with two_processes(*judge, tmp_path / "2x4.jsonl", folder=tmp_path) as both:
        assert [process.code() for process in both] == [0, 0], both[0].said() + both[1].said()
        assert '"pairs"' in both[0].said()
        assert '"pairs"' not in both[1].said()  # it is printed once
    scored.append(read_json(tmp_path / "2x4.jsonl"))
    for devices in (4, 1):
        output = tmp_path / f"1x{devices}.jsonl"
        assert ended(*judge, output, output=tmp_path / "said", devices=devices)[0] == 0
        scored.append(read_json(output))
    keys = [f"{whose}/{answer}" for whose in ("logps", "reference_logps") for answer in ("chosen", "rejected")]
    at_equal = [largest_difference(one, scored[-1], keys) for one in scored[:-1]]
    print("log-probs of one save, 2 x 4 and 1 x 4 devices against 1 device:", at_equal)
    assert max(at_equal) <= 2e-6

    # The rest of the run on half of the devices.
    code, said = ended("train", hh, *options, output=tmp_path / "said", devices=4)
    assert code == 0, said
    assert events(run, "restore")[-1]["step"] >= 4
    ours, theirs = read_json(run / "metrics.jsonl"), read_json(whole / "metrics.jsonl")
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    for key in ("step", "pairs", "num_tokens", "epoch", "learning_rate"):
        assert [row[key] for row in ours] == [row[key] for row in theirs], key
    # Over a few steps Adam has not yet made more of the rounding than one step's own tolerance allows.
    allowed = {"loss": 2e-5, "grad_norm": 1e-4, "logps/chosen": 2e-6, "logps/rejected": 2e-6}
    found = {key: largest_difference(ours, theirs, [key]) for key in allowed}
    print("largest differences over the steps:", found)
    assert {key: value for key, value in found.items() if value > allowed[key]} == {}
