"""The real trainer, two processes of it on a stand-in slice that is taken away: babysit.sh brings the run to the end,
and what it comes to is what a run comes to that nothing happened to.
"""

import json
import shlex
import signal
import socket
import sys
import time

import fake_cloud
import pytest
from runs import events, num_lines

from dpo_jax.task import write_task

pytestmark = pytest.mark.slow
STEPS = 30
CONFIG = "configs/task.yaml"

TRAINER = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
worker = os.environ["HOME"][-1]
os.environ.update(DPO_JAX_COORDINATOR="localhost:{port}", DPO_JAX_NUM_PROCESSES="2", DPO_JAX_PROCESS_ID=worker,
                  JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR={cache!r} + worker)
from dpo_jax.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """A cloud whose workers install the real trainer, and a run there to which nothing happened."""
    cloud = fake_cloud.build(tmp_path_factory.mktemp("cloud"))
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    settings = {"python": sys.executable, "root": str(fake_cloud.ROOT), "port": port, "cache": str(cloud.root / "cache")}
    (cloud.root / "trainer").write_text(TRAINER.format(**settings))
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
    cloud.set(NFS="", RUNS=str(cloud.runs))
    done = babysit(cloud, "whole", lambda: None)
    assert "-> kept" in done
    yield cloud
    cloud.clean()


def babysit(cloud, run_id: str, meanwhile) -> str:
    """All that babysit.sh says until the run is done."""
    cloud.set(RUN_ID=run_id)
    with cloud.started("babysit.sh", CONFIG, "--loss.beta", "0.2", WATCH_SECONDS="1", HALT_SECONDS="60") as process:
        meanwhile()
        process.wait(300)
    said = cloud.said()
    log = cloud.home(0) / "dpo_jax" / "launched" / run_id / "log"
    assert process.returncode == 0, said + (log.read_text() if log.exists() else shlex.join(cloud.calls[-3:]))
    return said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["with-notice", "without"])
def test_a_run_that_is_preempted_is_as_if_it_never_was(cloud, number):
    run, whole = cloud.runs / number.name, cloud.runs / "whole"

    def preempt() -> None:
        deadline = time.monotonic() + 120
        while num_lines(run / "metrics.jsonl") < 10:
            assert time.monotonic() < deadline, cloud.said()
            time.sleep(0.01)
        cloud.preempt(number)

    said = babysit(cloud, number.name, preempt)
    assert num_lines(whole / "metrics.jsonl") == STEPS
    assert "-> deleting: tpu-vm dpo: PREEMPTED" in said or "-> deleting: queued-resources dpo: SUSPENDED" in said
    (first, *_), restored = events(run, "start"), events(run, "restore")
    assert 0 < restored[0]["step"] < STEPS, first
    assert len(events(run, "preempt")) >= (number == signal.SIGTERM)
    for name in ("metrics.jsonl", "distributions.jsonl"):
        assert (run / name).exists() == (whole / name).exists()
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
