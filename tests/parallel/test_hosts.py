"""Processes that start, agree and stop together: real ones, joined over this machine's own network."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import called, free_port

from dpo_jax.config import CheckpointConfig
from dpo_jax.errors import RunStopped, UserError
from dpo_jax.parallel import hosts, rendezvous
from dpo_jax.runs.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Two processes with two devices each went through host_worker.py; process 1 alone was sent SIGTERM."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "file").write_text("")
    settings = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        rendezvous.COORDINATOR: f"localhost:{free_port()}",
        rendezvous.NUM_PROCESSES: "2",
        rendezvous.START_TIMEOUT: "60",
    }
    worker = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "host_worker.py"), str(folder)]
    logs = [folder / f"log-{me}" for me in range(2)]
    children = []
    for me, path in enumerate(logs):
        with open(path, "w") as log:
            environment = {**settings, rendezvous.PROCESS_ID: str(me)}
            children.append(subprocess.Popen(worker, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + 90
        while not all((folder / f"ready-{me}").exists() for me in range(2)) and time.monotonic() < deadline:
            if any(child.poll() is not None for child in children):
                break
            time.sleep(0.05)
        children[1].send_signal(signal.SIGTERM)
        codes = [child.wait(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    return folder, [json.loads((folder / f"facts-{me}.json").read_text()) for me in range(2)]


def test_two_processes_are_one_run(two):
    _, facts = two
    assert [fact["writer"] for fact in facts] == [True, False]
    assert [fact["devices"] for fact in facts] == [[2, 4]] * 2
    assert [fact["gathered"] for fact in facts] == [[{"me": 0}, {"me": 1}]] * 2


def test_an_error_of_one_process_is_raised_on_all(two):
    _, facts = two
    assert [fact["agreed"] for fact in facts] == ["RunStopped: only process 1 knows"] * 2
    assert [fact["no folder"].split(" (")[1] for fact in facts] == ["Not a directory): choose another run.dir"] * 2


def test_the_writer_comes_first_and_an_error_of_another_is_raised_on_all(two):
    _, facts = two
    assert [fact["refused"] for fact in facts] == ["UserError: process 1 cannot"] * 2
    assert [(fact["made first"], fact["made then"]) for fact in facts] == [(False, True)] * 2


def test_a_directory_that_is_not_shared_is_refused_on_all(two):
    folder, facts = two
    for me, fact in enumerate(facts):
        assert f"own-{me} is not shared: process 1 does not see what process 0 wrote there" in fact["not shared"]
    assert not list((folder / "own-0").iterdir())


def test_sigterm_to_one_process_stops_both_at_the_same_step(two):
    _, facts = two
    assert facts[0]["stopped"] == facts[1]["stopped"] < 3999
    assert all(fact["asked in order"] for fact in facts)  # an old step, asked for by a save, would part them


def test_a_damaged_step_is_passed_over_by_both(two):
    folder, facts = two
    step = facts[0]["stopped"]
    assert [fact["restored"] for fact in facts] == [[step, step]] * 2
    assert (folder / "checkpoints" / f"{step + 1}.damaged").is_dir()


def test_a_process_that_does_not_come_is_named(two):
    _, facts = two
    assert facts[0]["absent"].startswith("HostsMissing: the end: timed out after 1 s waiting for process 1 of 2: ")


def test_what_two_processes_saved_is_restored_in_one(two):
    folder, facts = two
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        "w": jax.ShapeDtypeStruct((64, 3), np.float32, sharding=one),
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=one),
    }
    state, manifest = Checkpoints(folder / "checkpoints", CheckpointConfig()).restore(target)
    expected = json.loads((folder / "expected-0.json").read_text())
    assert int(state["step"]) == manifest["step"] == facts[0]["stopped"]
    np.testing.assert_array_equal(np.asarray(state["w"]), np.array(expected, np.float32))
    assert expected[0][0] > 0


# The roll call, before jax is involved


def start_all(settings: list[tuple], timeout: int) -> list[str]:
    """Start processes as threads that stop at the roll call; gives what each was told."""
    told: list[str] = [""] * len(settings)

    def start(place, arguments):
        with pytest.raises(UserError) as error:
            rendezvous.start_hosts(*arguments, timeout=timeout)
        told[place] = f"{type(error.value).__name__}: {error.value}"

    threads = [threading.Thread(target=start, args=item) for item in enumerate(settings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_processes_that_do_not_start_are_named_to_all_that_did():
    address = f"localhost:{free_port()}"
    told = start_all([(address, 4, 0), (address, 4, 2)], timeout=2)
    assert told[0] == told[1]
    assert told[0].startswith("HostsMissing: timed out after 2 s waiting for process 1, 3 of 4 at ")
    assert "\n" not in told[0]
    assert hosts.HostsMissing.exit_code == 1


def test_a_coordinator_that_does_not_start_is_named():
    address = f"localhost:{free_port()}"
    (told,) = start_all([(address, 2, 1)], timeout=1)
    assert told.startswith(f"HostsMissing: process 1 timed out after 1 s waiting for process 0 of 2 at {address}: ")


def test_one_id_for_two_processes():
    address = f"localhost:{free_port()}"
    told = start_all([(address, 3, 0), (address, 3, 1), (address, 3, 1)], timeout=10)
    assert all("two processes have process id 1" in line for line in told), told


def test_processes_that_count_differently():
    address = f"localhost:{free_port()}"
    told = start_all([(address, 2, 0), (address, 3, 1)], timeout=10)
    assert all("process 1 expects 3 processes and process 0 expects 2" in line for line in told), told


def test_strangers_at_the_port_do_not_matter():
    port = free_port()
    said = []

    def call():
        for _ in range(100):
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n")
                    return
            except OSError:
                time.sleep(0.02)

    def process(function, *arguments):
        function(*arguments)
        said.append(arguments)

    threads = [
        threading.Thread(target=call),
        threading.Thread(target=process, args=(rendezvous._wait_for_all, port, 2, 20)),
        threading.Thread(target=process, args=(rendezvous._connect, "localhost", port, 2, 1, 20)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 2
    with socket.create_server(("", port)):  # the port is free at once for jax's own service
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "DPO_JAX_NUM_PROCESSES, DPO_JAX_PROCESS_ID: not set"),
        (("localhost", 2, 0), "DPO_JAX_COORDINATOR: 'localhost' cannot be used: write host:port"),
        (("localhost:1", 2, 2), "DPO_JAX_PROCESS_ID: 2 cannot be used: it must be at least 0 and below"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        rendezvous.start_hosts(*arguments)
    assert "\n" not in str(error.value)


# What jax finds out by itself, from a cluster that is but its variables


def slurm(count: int, process_id: int, port: int) -> dict[str, str]:
    """What Slurm tells a process of one host."""
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(process_id), "SLURM_LOCALID": str(process_id), "JAX_COORDINATOR_PORT": str(port),
            rendezvous.COORDINATOR: "auto", rendezvous.START_TIMEOUT: "60"}  # fmt: skip


@pytest.mark.parametrize(
    ("process_id", "told"),
    [
        (0, "timed out after 1 s waiting for process 1, 2 of 3 at "),
        (1, "process 1 timed out after 1 s waiting for process 0 of 3 at localhost:"),
    ],
)
def test_auto_names_who_is_missing(monkeypatch, process_id, told):
    for name, value in slurm(3, process_id, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hosts.HostsMissing, match=told) as error:
        rendezvous.start_hosts(timeout=1)
    assert "\n" not in str(error.value)


def test_auto_without_a_cluster_is_refused(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(
        UserError, match=r"DPO_JAX_COORDINATOR: auto found neither a TPU nor a cluster that jax supports"
    ):
        rendezvous.start_hosts("auto")


def test_auto_with_a_coordinator_that_has_no_address(monkeypatch):
    """As on a TPU whose first host does not come up: jax's own wait for its name ends without it."""
    from jax._src import clusters

    def wait(*args):
        raise RuntimeError("Failed to recognize coordinator address no-such-host")

    monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", wait)
    with pytest.raises(
        hosts.HostsMissing, match=r"auto could not detect the processes \(Failed .* no-such-host\): restart"
    ):
        rendezvous.start_hosts("auto", timeout=1)


def meet(count: int) -> int:
    rendezvous.start_hosts()
    return 0 if hosts.gather(jax.process_index(), "a test") == list(range(count)) else 1


def test_auto_joins(tmp_path):
    port = free_port()
    with ExitStack() as stack:
        processes = [
            stack.enter_context(called(meet, 2, output=tmp_path / f"said-{i}", env=slurm(2, i, port))) for i in range(2)
        ]
        assert [process.code() for process in processes] == [0, 0], "\n".join(p.said() for p in processes)


def test_wrong_environment(monkeypatch):
    monkeypatch.setenv(rendezvous.PROCESS_ID, "one")
    with pytest.raises(UserError, match="DPO_JAX_PROCESS_ID must be an integer, got 'one'"):
        rendezvous.start_hosts()


def test_a_port_in_use():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"DPO_JAX_COORDINATOR: port {port} cannot be opened"):
            rendezvous.start_hosts(f"localhost:{port}", 2, 0)


# One process


def test_one_process_is_immediate():
    rendezvous.start_hosts()
    rendezvous.start_hosts("localhost:1", 1, 0)
    assert jax.process_count() == 1
    assert hosts.is_writer()
    assert hosts.gather(3, "x") == [3]
    hosts.barrier("x")
    hosts.agree(None, "x")
    assert hosts.writer_first(lambda: 3, "x") == 3
    with pytest.raises(RunStopped, match=r"^mine$"):
        hosts.agree(RunStopped("mine"), "x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_after_the_step(number, capsys):
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with hosts.stop_signals() as stop_requested:
        assert not stop_requested(1)
        signal.raise_signal(number)
        assert stop_requested(2)
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    signal.signal(signal.SIGINT, outside)
