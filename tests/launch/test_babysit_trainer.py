"""The real trainer, two processes of it on a slice that is taken away: babysit.sh brings it to the very same end.

The two share a bucket, and no disk.
"""

import json
import os
import signal
import socket
import sys
import time

import fake_cloud
import pytest
from runs import num_lines

from dpo_jax.commands.task import write_task
from dpo_jax.storage import local_copy

STEPS = 30
CONFIG = "configs/task.yaml"

TRAINER = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
worker = os.environ["HOME"][-1]
os.environ.update(DPO_JAX_COORDINATOR="localhost:{port}", DPO_JAX_NUM_PROCESSES="2", DPO_JAX_PROCESS_ID=worker,
                  JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR={cache!r} + worker, **{storage!r})
from dpo_jax.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """A cloud whose workers install the real trainer, and a run there to which nothing happened."""
    with fake_cloud.build(tmp_path_factory.mktemp("cloud")) as cloud:
        install(cloud)
        assert "-> kept" in babysit(cloud, "whole", lambda: None)
        yield cloud


def install(cloud) -> None:
    """Put the real trainer, a task and its config into a cloud."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    cache = str(cloud.root / "cache")
    words = {"python": sys.executable, "root": str(fake_cloud.ROOT), "storage": cloud.storage.env}
    trainer = TRAINER.format(port=port, cache=cache, **words)
    (cloud.root / "trainer").write_text(trainer)
    write_task(cloud.root / "task", 0)
    config = {
        "model": {"path": "builtin:tiny", "tokenizer": str(cloud.root / "task" / "tokenizer"), "dtype": "float32"},
        "data": {"train": {"path": str(cloud.root / "task" / "data" / "train.jsonl")}, "max_length": 64, "workers": 1},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 3},
        "batch": {"pairs": 8},
        "run": {"steps": STEPS, "report": False},
        "checkpoint": {"every": 4},
    }
    (cloud.repo / CONFIG).write_text(json.dumps(config))
    cloud.git("add", ".")
    cloud.git("commit", "-qm", "a config")


def babysit(cloud, run_id: str, meanwhile) -> str:
    """All that babysit.sh says until the run is done."""
    cloud.set(RUN_ID=run_id)
    with cloud.started("babysit.sh", CONFIG, "--loss.beta", "0.2", WATCH_SECONDS="1", HALT_SECONDS="5") as process:
        meanwhile()
        process.wait(300)
    said = cloud.said()
    log = cloud.home(0) / "dpo_jax" / "launched" / run_id / "log"
    assert process.returncode == 0, said + (log.read_text() if log.exists() else "")
    return said


def preempted(cloud, number: signal.Signals) -> None:
    cloud.preempt(number)


def one_worker_killed(cloud, number: signal.Signals) -> None:
    os.kill(cloud.pids()[1], number)


@pytest.mark.parametrize(
    ("accident", "number"),
    [
        pytest.param(preempted, signal.SIGTERM, id="preempted with notice", marks=pytest.mark.weekly),
        pytest.param(preempted, signal.SIGKILL, id="preempted without", marks=pytest.mark.slow),
        pytest.param(one_worker_killed, signal.SIGKILL, id="one worker killed", marks=pytest.mark.weekly),
    ],
)
def test_a_run_to_which_something_happened_is_as_if_it_had_not(cloud, accident, number):
    run_id = f"{accident.__name__}-{number.name}"
    copy = local_copy("runs", f"gs://bucket/runs/{run_id}").name
    local = cloud.home(0) / ".cache" / "dpo_jax" / "runs" / copy / "metrics.jsonl"

    def stored(run: str, log: str) -> bytes:
        return cloud.storage.data("bucket", f"runs/{run}/{log}.jsonl")

    def in_the_midst() -> None:
        deadline = time.monotonic() + 120
        while num_lines(local) < 10:
            assert time.monotonic() < deadline, cloud.said()
            time.sleep(0.01)
        accident(cloud, number)

    said = babysit(cloud, run_id, in_the_midst)
    assert ("-> deleting" in said) == (accident is preempted)
    events = [json.loads(line) for line in stored(run_id, "events").splitlines()]
    restored = [event["step"] for event in events if event["event"] == "restore"]
    assert 0 < restored[0] < STEPS
    assert any(event["event"] == "preempt" for event in events) == (number == signal.SIGTERM)
    assert stored("whole", "metrics").count(b"\n") == STEPS
    assert stored(run_id, "metrics") == stored("whole", "metrics")
