"""Runs that are killed, stopped, or stop themselves: what they come to is what an uninterrupted run comes to."""

import errno
import hashlib
import json
import os
import random
import signal

import numpy as np
import pytest
from edits import edits
from runs import called, ended, events, killed, num_lines, saved_bits, started, write_config

from dpo_jax import cli, storage
from dpo_jax.config import InvalidRowsConfig
from dpo_jax.config.file import load_yaml
from dpo_jax.runs import logs
from dpo_jax.runs.directory import read_json

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


@pytest.mark.slow
def test_killed_and_stopped_anywhere_a_run_is_as_if_it_never_was(config, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    samples = ["--run.samples", "3", "--sampling.max_tokens", "6"]
    assert ended("train", config, *samples, "--run.dir", whole, output=tmp_path / "said") == (0, "")

    def restart():
        return started("train", config, *samples, output=tmp_path / "said")

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
    assert "error" not in running.said()
    assert ended("train", config, *samples, output=tmp_path / "said") == (0, "")

    assert events(run, "restore")[-1]["step"] == stopped  # nothing that was done is done again
    for name in ("metrics.jsonl", "distributions.jsonl", "samples.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert num_lines(run / "samples.jsonl") == 9
    assert [row["step"] for row in read_json(run / "timings.jsonl")] == list(range(1, STEPS + 1))
    assert saved_bits(run, STEPS) == saved_bits(whole, STEPS)


def with_a_failing_tracker(argv: list[str]) -> int:
    """The command, whose tracker raises at the fourth row."""
    rows = iter(range(3))
    logs.TRACKERS["wandb"] = lambda run: (lambda step, row: next(rows), print)
    return cli.main([*argv, "--run.trackers", "[wandb]"])


def with_a_full_disk(argv: list[str]) -> int:
    """The command; the disk is full in the middle of the tenth line of the logs."""
    append, lines = storage.append_line, iter(range(10))

    def half_a_line(path, text):
        if path.name == "metrics.jsonl" and next(lines, None) is None:
            path.open("a").write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, text)

    storage.append_line = half_a_line
    return cli.main(argv)


def with_closed_pipes(argv: list[str]) -> int:
    """The command, with progress to pipes that nobody reads; its code goes to a file."""
    for number in (1, 2):
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(reader)
    return cli.main([*argv, "--run.progress", "true"])


@pytest.mark.slow
def test_what_fails_beside_a_run_changes_no_bit(config, tmp_path):
    said, whole = tmp_path / "said", tmp_path / "whole"
    short = ["train", str(config), "--run.steps", "12", "--run.export", "true"]
    assert ended(*short, "--run.dir", whole, output=said) == (0, "")
    for function, code, line in (
        (with_a_failing_tracker, 0, "tracker wandb failed: StopIteration"),
        (with_a_full_disk, 43, "metrics.jsonl: cannot be written (No space left on device)"),
        (with_closed_pipes, 0, ""),
    ):
        run = tmp_path / function.__name__
        with called(function, [*short, "--run.dir", str(run)], output=said) as running:
            assert running.code() == code
            assert line in running.said()
            assert running.said().count("\n") <= 1
        if code:
            assert ended(*short, "--run.dir", run, output=said) == (0, "")
        for name in ("metrics.jsonl", "distributions.jsonl", "export/model.safetensors"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), function
        assert saved_bits(run, 12) == saved_bits(whole, 12)


@pytest.mark.slow
def test_an_edited_manifest_costs_its_step_and_no_bit(config, tmp_path):
    """Of the last step, in each way; the run goes on from the one before and comes to the same end."""
    run, said = tmp_path / "run", tmp_path / "said"
    short = ["train", str(config), "--run.steps", "7"]
    assert ended(*short, output=said) == (0, "")
    path, logs_before = run / "checkpoints" / "7" / "manifest" / "metadata", (run / "metrics.jsonl").read_bytes()
    intact, bits = path.read_bytes(), saved_bits(run, 7)
    kinds = [
        "leaves gone",
        "offsets wrong",
        "step, a digit",
        "config nested",
        "extras gone, sealed",
        "leaves wrong, sealed",
    ]
    for kind in kinds:
        path.write_bytes(edits(intact)[kind])
        code, text = ended(*short, output=said)
        assert code == 0, (kind, text)
        assert text.count("\n") == 1, (kind, text)
        assert "checkpoint of step 7 is damaged (its manifest cannot be used: " in text
        assert events(run, "restore")[-1]["step"] == 5
        assert (run / "metrics.jsonl").read_bytes() == logs_before
        assert saved_bits(run, 7) == bits


@pytest.mark.slow
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_step(config, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    wild = ["--optimizer.learning_rate", "1e30", "--optimizer.schedule", "constant", "--optimizer.warmup_steps", "0"]
    code, said = ended("train", config, *wild, output=tmp_path / "said")
    assert code == 43
    good = events(run, "save")[-1]["step"]
    assert good > 0
    assert said.count("\n") == 1
    assert said.startswith(f"dpo-jax: error: step {good + 1}: loss ")
    assert f"the state after step {good} is saved; inspect rows " in said
    rows = said.split("inspect rows ")[1].split(", or start a new run with ")[0]
    rows = rows.split(", ")
    assert len(rows) == 4
    assert all(row.rpartition(":")[0].endswith("pairs.jsonl") and int(row.rpartition(":")[2]) < 80 for row in rows)
    assert read_json(run / "metrics.jsonl")[-1]["step"] == good
    (failure,) = events(run, "error")
    assert (failure["exit_code"], f"dpo-jax: error: {failure['text']}\n") == (43, said)

    free = ["--run.log_every", "2"]  # it goes on from there, and comes no further; config.yaml says how it runs now
    again = ended("train", config, *wild, *free, output=tmp_path / "said")
    assert load_yaml(run / "config.yaml")["run"]["log_every"] == 2
    assert again == (43, said)
    assert events(run, "restore")[-1]["step"] == good
    every_step = ["--checkpoint.every", "1", "--run.dir", whole]  # there that step is saved before the bad one is made
    assert ended("train", config, *wild, *every_step, output=tmp_path / "said")[0] == 43
    assert saved_bits(run, good) == saved_bits(whole, good)


@pytest.mark.slow
def test_the_remedy_for_what_is_not_finite_works(config, shared, tmp_path):
    code, said = ended("train", config, "--loss.beta", "1e37", output=tmp_path / "said")  # the first gradient overflows
    assert code == 43
    options = f"--run.dir NEW --model.path {tmp_path / 'run'} --reference.path {shared / 'models' / 'stories260K'}"
    assert said.endswith(f": {options}\n")
    new = [*options.replace("NEW", str(tmp_path / "new")).split(), "--run.steps", "1"]
    assert ended("train", config, *new, output=tmp_path / "said") == (0, "")
    before, after = (read_json(tmp_path / name / "metrics.jsonl") for name in ("run", "new"))
    assert [row["step"] for row in after] == [0, 1, 1]
    for name in ("logps/chosen", "rewards/chosen"):  # the save is the start here: the same policy and reference
        assert after[0][f"eval_held_out_{name}"] == before[0][f"eval_held_out_{name}"]


@pytest.mark.slow
def test_a_stale_reference_cache_is_refused_at_step_0(config, tmp_path):
    options = ["--reference.mode", "cached", "--data.shuffle", "false", "--data.eval_fraction", "0", "--run.steps", "2"]
    assert ended("train", config, *options, output=tmp_path / "said") == (0, "")  # equal starts pass
    first = read_json(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=3e-6)
    (cache,) = (tmp_path / "store").glob("*/reference-*.npz")
    with np.load(cache) as file:  # a part: two steps do not use all rows
        ids, sums, about = file["ids"], file["sum"].copy(), json.loads(str(file["about"]))
    sums[1, 0] += 0.05  # of a pair of the first step, a little
    about["digest"] = hashlib.sha256(b"ids" + ids.tobytes() + b"sum" + sums.tobytes()).hexdigest()
    with open(cache, "wb") as file:
        np.savez(file, ids=ids, sum=sums, about=json.dumps(about))

    other = tmp_path / "other"
    code, said = ended("train", config, *options, "--run.dir", other, output=tmp_path / "said")
    assert code == 2
    assert said.count("\n") == 1
    assert "step 0: policy and reference have the same weights, but their log-probs differ by " in said
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


@pytest.mark.weekly
def test_an_epoch_killed_at_random_is_the_epoch(hh, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ended("train", hh, "--run.dir", whole, output=tmp_path / "said") == (0, "")
    rows = read_json(whole / "metrics.jsonl")
    (data,) = events(whole, "data")
    trained = sum(row.get("pairs", 0) for row in rows)
    dropped = sum(data["dropped"].values())
    print("rows:", data, "trained:", trained)
    assert set(data["dropped"]) <= set(InvalidRowsConfig.__dataclass_fields__)
    assert (data["rows"], trained) == (1697, data["train"])
    assert trained + data["evals"]["held_out"] + dropped == 1697
    accuracy = [row["eval_held_out_rewards/accuracies"] for row in (rows[0], rows[-1])]
    print("held-out accuracy of the implicit reward, before and after:", accuracy)
    assert accuracy[0] == 0  # every reward is 0 then, and ties count as wrong
    assert accuracy[1] > 0.5

    num_steps, chance = rows[-1]["step"], random.Random(3)
    killed(sorted(chance.sample(range(2, num_steps), 3)), "train", hh, run=run, output=tmp_path / "said", chance=chance)
    assert ended("train", hh, output=tmp_path / "said") == (0, "")
    print("restored at", [event["step"] for event in events(run, "restore")])
    assert len(events(run, "start")) == 4
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert saved_bits(run, num_steps) == saved_bits(whole, num_steps)
