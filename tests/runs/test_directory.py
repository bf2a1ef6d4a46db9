"""Run directories: what is taken for one, who holds it, and logs that can be cut off anywhere."""

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.errors import RunStopped, UserError
from dpo_jax.runs import directory as rundir
from dpo_jax.runs.directory import (
    RunDir,
    append_json,
    empty_logs,
    find_run,
    is_run_dir,
    locked_run,
    log_event,
    log_offsets,
    read_json,
    truncate_logs,
)

ROOT = str(Path(__file__).parents[2])


def refused(path, message, function=locked_run):
    """The error is one line with the path's own text, and the directory is as it was."""

    def listing():
        return sorted(path.rglob("*")) if isinstance(path, Path) and path.is_dir() else None

    before = listing()
    with pytest.raises(UserError, match=message) as error:
        contextlib.ExitStack().enter_context(locked_run(path)) if function is locked_run else function(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert error.value.exit_code == 2
    assert listing() == before


def test_a_run_is_made_held_and_reopened(tmp_path):
    path = tmp_path / "runs" / "a"
    assert not is_run_dir(path)
    with locked_run(path) as run:
        assert run == RunDir(path)
        assert is_run_dir(path)
        log_event(run, "start", version="1")
    with locked_run(path) as run:
        log_event(run, "end")
    events = read_json(run.events)
    assert [event["event"] for event in events] == ["start", "end"]
    assert events[0]["pid"] == os.getpid()
    assert find_run(path) == run


def test_an_empty_directory_becomes_a_run(tmp_path):
    (tmp_path / ".probe-1").mkdir()  # of a doctor that was killed
    with locked_run(tmp_path):
        assert is_run_dir(tmp_path)


# Bad run directories


def test_other_files(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1")
    refused(tmp_path, "has other files but no run of this program: choose an empty directory")


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "run").write_text("")
    refused(tmp_path / "run", "cannot be written or locked .*: choose another directory")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "run", "cannot be written or locked .Not a directory.")


def test_no_run_to_read(tmp_path):
    refused(tmp_path / "none", "does not exist; check the path", find_run)
    refused(tmp_path, "has no events.jsonl, so it is not a run of this program", find_run)


HOLDS = """
import sys
from dpo_jax.runs.directory import locked_run
with locked_run(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_in_use_names_the_process_and_a_killed_one_leaves_it_free(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], env={**os.environ, "PYTHONPATH": ROOT},
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    with child:
        assert child.stdout.readline() == "held\n"
        refused(tmp_path, f"is in use by process {child.pid} on .*: wait for it, stop it, or choose another directory")
        child.send_signal(signal.SIGKILL)
        child.wait()
        with locked_run(tmp_path):
            pass


def test_a_log_that_is_shorter_than_the_checkpoint_says(tmp_path):
    with locked_run(tmp_path) as run:
        append_json(run.metrics, {"step": 1})
        offsets = log_offsets(run)
        run.metrics.write_text("")
        append_json(run.timings, {"step": 2})
        with pytest.raises(UserError, match=r"metrics.jsonl: has 0 bytes, but had 12 at the step") as error:
            truncate_logs(run, offsets)
        assert "\n" not in str(error.value)
        assert run.timings.stat().st_size == 12


def test_a_log_that_was_changed(tmp_path):
    with locked_run(tmp_path) as run:
        append_json(run.metrics, {"step": 1})
        offsets = log_offsets(run)
        run.metrics.write_text('{"step": 1, "note": "mine"}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl: was edited: its first 12 bytes are not those of the save"):
            truncate_logs(run, offsets)
        assert run.metrics.read_text().endswith('mine"}\n')
        run.metrics.write_text('{"step": 2}\n')  # as long, and one digit is another
        with pytest.raises(UserError, match=r"metrics.jsonl: was edited"):
            truncate_logs(run, offsets)


# Logs


def test_logs_are_cut_back_to_the_byte(tmp_path):
    with locked_run(tmp_path) as run:
        names = ("metrics.jsonl", "timings.jsonl", "distributions.jsonl", "samples.jsonl")
        nothing = {"size": 0, "digest": hashlib.sha256().hexdigest()}
        assert log_offsets(run) == dict.fromkeys(names, nothing)
        for step in range(3):
            append_json(run.metrics, {"step": step, "loss": math.log(2)})
        append_json(run.timings, {"step": 0})
        offsets, expected = log_offsets(run), run.metrics.read_bytes()
        append_json(run.metrics, {"step": 3})
        with open(run.metrics, "a") as file:
            file.write('{"step": 4, "lo')  # killed while it wrote
        truncate_logs(run, offsets)
        assert run.metrics.read_bytes() == expected
        assert len(read_json(run.timings)) == 1
        empty_logs(run)
        assert run.metrics.read_bytes() == b""


def test_an_event_cut_off_while_written_does_not_spoil_the_next(tmp_path):
    with locked_run(tmp_path) as run:
        log_event(run, "start")
    with open(run.events, "a") as file:
        file.write('{"event": "sa')
    assert len(read_json(run.events)) == 1
    with locked_run(tmp_path) as run:
        log_event(run, "restore", step=3)
    assert [event["event"] for event in read_json(run.events)] == ["start", "restore"]


def test_values_of_every_kind_read_back_as_they_are(tmp_path):
    path = tmp_path / "log"
    third = np.float32(1 / 3)
    values = {"a": third, "b": jnp.float32(0.1), "c": np.int64(3), "d": True, "e": None, "f": "\u2028é\n", "g": [1.5]}
    append_json(path, values)
    append_json(path, {"loss": float("nan"), "low": -math.inf, "high": np.float32(np.inf)})
    first, second = read_json(path)
    assert first == {**values, "a": float(third), "b": float(np.float32(0.1)), "c": 3}
    assert np.float32(first["a"]) == third
    assert second == {"loss": "NaN", "low": "-Infinity", "high": "Infinity"}
    assert math.isnan(float(second["loss"]))
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_equal_values_are_equal_bytes(tmp_path):
    for name, value in (("a", np.float32(0.1)), ("b", float(np.float32(0.1))), ("c", jnp.float32(0.1))):
        append_json(tmp_path / name, {"x": value})
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


def test_importing_needs_no_jax():
    code = "import sys, dpo_jax.runs.directory, dpo_jax.runs.manifest; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ROOT})


def test_a_full_disk_is_no_half_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(RunStopped, match=r"/dev/full: cannot be written \(No space left on device\)") as error:
        append_json(Path("/dev/full"), {"step": 1})
    assert (error.value.exit_code, str(error.value).count("\n")) == (43, 0)


def test_names_are_those_of_the_design():
    run = RunDir(Path("r"))
    names = [run.config, run.checkpoints, run.export, run.metrics, run.timings, run.events, run.report]
    assert [path.name for path in names] == [
        "config.yaml", "checkpoints", "export", "metrics.jsonl", "timings.jsonl", "events.jsonl", "report.html",
    ]  # fmt: skip
    assert rundir.LOCK == "run.lock"
