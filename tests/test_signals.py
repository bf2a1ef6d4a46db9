"""Signals: a command ends with its line and code wherever it is, and what it started ends with it."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import called, ended, saved_bits, write_config

from dpo_jax import cli, signals
from dpo_jax.errors import Terminated

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("default_handlers")
CODES = {signal.SIGTERM: 42, signal.SIGHUP: 42, signal.SIGINT: 130}
LINES = {
    signal.SIGTERM: "dpo-jax: stopped by SIGTERM: what was saved is kept; run the same command again",
    signal.SIGHUP: "dpo-jax: stopped by SIGHUP: what was saved is kept; run the same command again",
    signal.SIGINT: "dpo-jax: interrupted",
}


@pytest.mark.parametrize("number", CODES)
def test_a_command_ends_with_a_line_and_its_code(number, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda argv: signal.raise_signal(number))
    before = [signal.getsignal(other) for other in CODES]
    assert cli.main(["train", "config.yaml"]) == CODES[number]
    assert capsys.readouterr().err == f"{LINES[number]}\n"
    assert [signal.getsignal(other) for other in CODES] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    with signals.ending_signals():
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)


BUSY = """
import signal, sqlite3, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from dpo_jax import cli
def run(argv):
    threading.Timer(1.0, print, ("busy",), {"flush": True}).start()  # from within the call
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 2000000000) SELECT count(*) FROM n"
    sqlite3.connect(":memory:").execute(count).fetchone()  # minutes in C, without Python's lock: as a compilation
cli._run = run
sys.exit(cli.main(["train"]))
"""


@pytest.mark.parametrize("number", CODES)
def test_a_long_call_of_a_library_is_broken_off(number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUSY]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as child:
        assert child.stdout.readline() == "busy\n"
        start = time.monotonic()
        child.send_signal(number)
        assert child.wait(30) == CODES[number]
        assert child.stderr.read() == f"\n{LINES[number]}\n"
        assert signals.GRACE_SECONDS <= time.monotonic() - start < signals.GRACE_SECONDS + 10


STEPS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from dpo_jax import cli, signals
from dpo_jax.parallel import hosts
signals.GRACE_SECONDS = 0.2
def work(seconds):  # in Python, with its lock, as a reward function
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
def run(argv):
    with hosts.stop_signals() as stop_requested:
        assert not stop_requested(0)
        signal.raise_signal(signal.SIGINT)
        work(1)
        assert stop_requested(1)
        print("saved", flush=True)
        signal.raise_signal(signal.SIGINT)
cli._run = run
sys.exit(cli.main(["train"]))
"""


def test_ctrl_c_leaves_a_step_all_its_time_and_a_second_one_does_not():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout == "saved\n"
    assert ran.returncode == CODES[signal.SIGINT]
    assert ran.stderr.endswith(f"{LINES[signal.SIGINT]}\n")


# Each phase of a run

OTHERS = (signal.SIGHUP, signal.SIGINT)
PHASES = {  # name -> function at which the run stands still, and the name of the module that holds it
    "config": ("dpo_jax.cli", "parse_config"),
    "tokenization": ("dpo_jax.data.store", "_arrays"),
    "reference cache": ("dpo_jax.inference.reference_cache", "_refuse_gaps"),
    "compilation": ("dpo_jax.methods.offline.Offline", "update"),
    "evaluation": ("dpo_jax.methods.offline.Offline", "evaluate"),
    "last save": ("dpo_jax.runs.checkpoint.Checkpoints", "close"),
    "export": ("dpo_jax.weights.huggingface", "_copy_companions"),
    "report": ("dpo_jax.train", "report_done"),
}


def run_until(phase: str, reached: str, argv: list[str]) -> int:
    """The command, which stands still where a phase begins; its tokenizers are processes of their own."""
    from dpo_jax.data import convert

    convert.MIN_ROWS_PER_PROCESS = 10
    convert.CHUNK_ROWS = 8
    module, name = PHASES[phase]
    owner, _, class_name = module.rpartition(".") if module[module.rfind(".") + 1].isupper() else (module, "", "")
    target = importlib.import_module(owner)
    target = getattr(target, class_name) if class_name else target
    function = getattr(target, name)

    def stand_still(*args, **kwargs):
        Path(reached).touch()
        for _ in range(20 if phase == "last save" else 3000):
            time.sleep(0.1)
        return function(*args, **kwargs)

    setattr(target, name, stand_still)
    return cli.main(argv)


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and those that they have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def leftovers(folder: Path) -> list[Path]:
    return [path for pattern in (".building-*", "*.partial", "*tmp*") for path in folder.rglob(pattern)]


def all_gone(pids: set[int]) -> bool:
    """Whether the processes have ended within 5 seconds."""
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive


@pytest.mark.slow
def test_whatever_a_run_is_doing_a_signal_ends_it_and_the_next_start_cleans_up(shared, tmp_path):
    """In each phase SIGTERM and SIGKILL, in some others too; what it comes to in the end is the undisturbed run."""
    config = write_config(
        tmp_path / "config.yaml",
        {
            "model": {"path": str(shared / "models" / "stories260K")},
            "data": {"train": {"path": str(shared / "reference_curves" / "pairs.jsonl"), "limit": 48},
                     "eval_fraction": 0.1, "max_length": 160, "workers": 2, "store": str(tmp_path / "store")},
            "reference": {"mode": "cached"},
            "batch": {"pairs": 4},
            "run": {"dir": str(tmp_path / "run"), "steps": 3, "export": True, "progress": False},
            "checkpoint": {"every": 1},
        },
    )  # fmt: skip
    argv, outcomes = ["train", str(config)], []
    for phase in PHASES:
        for number in (signal.SIGTERM, *(OTHERS if phase in ("tokenization", "report") else ()), signal.SIGKILL):
            reached, output = tmp_path / f"{phase} {number.name}", tmp_path / "said"
            with called(run_until, phase, str(reached), argv, output=output) as running:
                running.wait_for(reached.exists)
                children = descendants(running.process.pid)
                assert len(children) >= 2 or phase != "tokenization"
                start = time.monotonic()
                running.send(number)
                code = running.code()
                seconds = time.monotonic() - start
                assert all_gone(children), f"{phase}, {number.name}: processes are left"
            said = running.said().splitlines()
            outcomes.append((phase, number.name, code, f"{seconds:.1f} s", *said))
            print(*outcomes[-1], sep=" | ")
            assert code == CODES.get(number, -number)
            assert said[-1:] == ([LINES[number]] if number in LINES else []), said
            assert len(said) <= 3  # what asks a run to stop is said at once too, after an empty line
            if number != signal.SIGKILL and said[0]:  # an empty line: it was ended by force
                assert leftovers(tmp_path) == [], (phase, number)
    assert ended(*argv, output=tmp_path / "said") == (0, "")
    assert leftovers(tmp_path) == []
    assert ended(*argv, "--run.dir", tmp_path / "whole", output=tmp_path / "said") == (0, "")
    assert saved_bits(tmp_path / "run", 3) == saved_bits(tmp_path / "whole", 3)
    for name in ("metrics.jsonl", "distributions.jsonl", "export/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
