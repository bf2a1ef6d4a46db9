"""Run directories in a bucket: who holds one, what is where at any time, and storage that fails."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import signals
from dpo_jax.bucket import RIGHTS as OUTPUT_RIGHTS
from dpo_jax.bucket import Bucket, prepare_clients, probe, split_url
from dpo_jax.config import CheckpointConfig
from dpo_jax.errors import Preempted, RunStopped, StorageDenied, StorageUnreachable, Terminated, UserError
from dpo_jax.runs import bucket_lock, checkpoint
from dpo_jax.runs.bucket_lock import InUse, locked
from dpo_jax.runs.checkpoint import Checkpoints
from dpo_jax.runs.directory import append_json, locked_run, log_event
from dpo_jax.runs.manifest import make_manifest
from dpo_jax.runs.restore import restore_part
from dpo_jax.runs.session import lock_run
from dpo_jax.signals import ending_signals

ROOT = str(Path(__file__).parents[2])
URL = "gs://bucket/runs/one"
FOLDER = "runs/one"
LOCK = f"{FOLDER}/run.lock"
pytestmark = pytest.mark.usefixtures("cache")


def bucket() -> Bucket:
    return Bucket.named("run.dir", URL)


def opened(url: str = URL) -> None:
    """A run is opened and closed."""
    with locked_run(url):
        pass


# Which urls


@pytest.mark.parametrize("url", ["s3://bucket/run", "az://bucket/run", "http://bucket/run", "GS://bucket/run"])
def test_other_storage_is_refused_by_name(url):
    with pytest.raises(UserError, match=f"run.dir: {url} is neither a local path nor in a bucket of Google"):
        opened(url)


@pytest.mark.parametrize("url", ["gs://bucket", "gs://bucket/", "gs:///run", "gs://b/run", "gs://BUCKET/run"])
def test_what_is_no_folder_in_a_bucket(url):
    with pytest.raises(UserError, match=f"run.dir: {url} names no folder in a bucket: give gs://BUCKET/FOLDER"):
        split_url("run.dir", url)


def test_slashes_at_the_end_are_nothing():
    assert split_url("run.dir", "gs://bucket/a/b//") == ("bucket", "a/b")


def test_without_the_extra_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'dpo_jax\[gcs\]'") as refused:
        prepare_clients.__wrapped__()
    assert refused.value.exit_code == 2


def test_nothing_of_the_extra_is_loaded_for_local_paths(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a row"}]')
    code = f"""
import sys, dpo_jax.train
from dpo_jax.config import SourceConfig
from dpo_jax.data.sources import load_rows
from dpo_jax.runs.directory import locked_run
from dpo_jax.weights.open import find_model
with locked_run({str(tmp_path / "run")!r}):
    load_rows(SourceConfig(path={str(tmp_path / "rows.json")!r}))
    find_model("builtin:tiny", None)
assert not {{"gcsfs", "google.auth"}} & set(sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": ROOT})
    assert child.returncode == 0


# What is in the bucket, and when


def test_a_run_is_filled_from_the_bucket_whatever_the_disk_has(storage, cache):
    with locked_run(URL) as run:
        log_event(run, "start")
        append_json(run.metrics, {"step": 1})
        (run.root / "model").mkdir()
        (run.root / "model" / "config.json").write_text("{}")
        run.push()
        assert storage.data("bucket", f"{FOLDER}/metrics.jsonl") == b'{"step": 1}\n'
        append_json(run.metrics, {"step": 2})
        assert storage.data("bucket", f"{FOLDER}/metrics.jsonl") == b'{"step": 1}\n'
    assert storage.data("bucket", f"{FOLDER}/metrics.jsonl") == b'{"step": 1}\n{"step": 2}\n'  # as it has ended
    assert LOCK not in storage.names("bucket")
    storage.put("bucket", f"{FOLDER}/metrics.jsonl", b'{"step": 1}\n')
    run.metrics.write_text("of an earlier life")
    (run.root / "leftover").write_text("")
    with locked_run(URL) as run:
        assert run.metrics.read_bytes() == b'{"step": 1}\n'
        assert not (run.root / "leftover").exists()
        (run.root / "model" / "config.json").unlink()
    assert storage.names("bucket") == [f"{FOLDER}/events.jsonl", f"{FOLDER}/metrics.jsonl"]


def test_only_what_changed_is_uploaded(storage):
    with locked_run(URL) as run:
        log_event(run, "start")
        append_json(run.metrics, {"step": 1})
        run.push()
        storage.requests.clear()
        append_json(run.metrics, {"step": 2})
        run.push()
        written = [request.name for request in storage.requests if request.kind == "write"]
        assert set(written) == {LOCK, f"{FOLDER}/metrics.jsonl"}


def test_what_says_that_files_are_whole_comes_last(storage):
    with locked_run(URL) as run:
        (run.root / "export").mkdir()
        names = ("a.safetensors", "tokenizer_config.json", "config.json", "model.safetensors.index.json")
        for name in names:
            (run.root / "export" / name).write_text(name)
        run.push()
        requests = [request for request in storage.requests if "/export/" in request.name]
        assert [request.name.rpartition("/")[2] for request in requests] == [*names]
        storage.requests.clear()
        for name in names:
            (run.root / "export" / name).write_text(f"new {name}")
    requests = [request for request in storage.requests if "/export/" in request.name]
    kinds = [(request.kind, request.name.rpartition("/")[2]) for request in requests]
    assert sorted(kinds[:2]) == [("delete", "config.json"), ("delete", "model.safetensors.index.json")]
    assert kinds[2:] == [("write", name) for name in names]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RunStopped("loss: nan: a remedy"), 43, "loss: nan: a remedy"),
        (StorageUnreachable("gone"), 1, "gone"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (Preempted("stopped"), None, None),
    ],
)
def test_the_bucket_says_why_a_run_ended(storage, error, code, text):
    with pytest.raises(type(error)), lock_run(URL):
        raise error
    last = json.loads(storage.data("bucket", f"{FOLDER}/events.jsonl").splitlines()[-1])
    expected = ("start", None, None) if code is None else ("error", code, text)
    assert (last["event"], last.get("exit_code"), last.get("text")) == expected


def test_a_run_that_fails_leaves_its_logs_in_the_bucket(storage):
    def fail() -> None:
        with locked_run(URL) as run:
            append_json(run.metrics, {"step": 1})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert storage.data("bucket", f"{FOLDER}/metrics.jsonl") == b'{"step": 1}\n'


SIGNALS = {signal.SIGTERM: Terminated, signal.SIGHUP: Terminated, signal.SIGINT: KeyboardInterrupt}


def raise_later(number: int, seconds: float) -> None:
    """A signal arrives in so many seconds, if the command has not ended by then."""
    handler = signal.getsignal(number)

    def arrive() -> None:
        if signal.getsignal(number) is handler:
            signal.raise_signal(number)

    threading.Timer(seconds, arrive).start()


def end_by(number: int, when: str, storage) -> None:
    """A run is ended by a signal; what it has to upload takes longer than the main thread has to end."""
    with ending_signals(), locked_run(URL) as run:
        log_event(run, "start")
        append_json(run.metrics, {"step": 1})
        storage.fail(200, kind="write", name="metrics", times=1, delay=0.7)
        if when == "inside":
            signal.raise_signal(number)
        else:
            raise_later(number, 0.1)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize(
    ("number", "when"), [*((number, "inside") for number in SIGNALS), (signal.SIGTERM, "during the last upload")]
)
def test_a_signal_ends_a_run_when_its_logs_are_in_the_bucket(storage, number, when, monkeypatch):
    codes = []
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(SIGNALS[number]):
        end_by(number, when, storage)
    assert storage.data("bucket", f"{FOLDER}/metrics.jsonl") == b'{"step": 1}\n'
    assert LOCK not in storage.names("bucket")
    assert codes == []


BUSY = f"""
import signal, sqlite3, sys, threading
from dpo_jax import cli, signals
from dpo_jax.runs.directory import append_json, locked_run
signals.GRACE_SECONDS = 0.3
def run(argv):
    with locked_run({URL!r}) as run:
        append_json(run.metrics, {{"step": 1}})
        threading.Timer(0.5, print, ("busy",), {{"flush": True}}).start()  # from within the call
        count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        sqlite3.connect(":memory:").execute(count).fetchone()  # in C, without Python's lock: as a compilation
cli._run = run
sys.exit(cli.main(["train"]))
"""


def test_a_long_call_of_a_library_is_broken_off_when_the_logs_are_in_the_bucket(storage, cache):
    environment = {**os.environ, **storage.env, "PYTHONPATH": ROOT, "XDG_CACHE_HOME": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", BUSY], env=environment, text=True, **pipes) as child:
        assert child.stdout.readline() == "busy\n"
        storage.fail(200, kind="write", name="metrics", times=1, delay=0.5)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 42
        assert child.stderr.read() == f"\ndpo-jax: {Terminated('SIGTERM')}\n"
    assert storage.data("bucket", f"{FOLDER}/metrics.jsonl") == b'{"step": 1}\n'
    assert LOCK not in storage.names("bucket")


@pytest.mark.usefixtures("default_handlers")
def test_a_second_signal_leaves_a_run_that_can_be_opened_again(storage):
    def end() -> None:
        with ending_signals(), locked_run(URL) as run:
            log_event(run, "start")
            append_json(run.distributions, {"step": 0})
            raise_later(signal.SIGTERM, 0.2)
            signal.raise_signal(signal.SIGTERM)

    storage.fail(503, kind="write", name="distributions", delay=0.5, times=1)
    with pytest.raises(Terminated):
        end()
    assert storage.names("bucket") == [f"{FOLDER}/events.jsonl"]  # the rest was not uploaded in time
    opened()


def test_other_files_are_left_alone(storage):
    storage.put("bucket", f"{FOLDER}/notes.txt", b"mine")
    with pytest.raises(UserError, match=f"{URL} has other files but no run of this program: choose an empty directory"):
        opened()
    assert storage.names("bucket") == [f"{FOLDER}/notes.txt"]


# Who holds it


def hold(results: list[str], release: threading.Event) -> None:
    try:
        with locked(bucket(), "run.lock", time.time(), lambda line: None):
            results.append("held")
            if len(results) < 6:
                release.wait(60)
    except InUse as error:
        results.append(str(error))
        if len(results) == 6:
            release.set()


def test_of_six_starters_one_holds_it(storage):
    results, release = [], threading.Event()
    threads = [threading.Thread(target=hold, args=(results, release)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results).count("held") == 1
    assert len(results) == 6
    assert all(result == "held" or result.startswith("process ") for result in results)
    assert LOCK not in storage.names("bucket")


def elsewhere(storage, token="theirs", process="7 100 other-boot pid:[1]") -> None:
    """A process on another machine writes the lock."""
    storage.put("bucket", LOCK, b"", metadata={"owner": "process 7 on far", "token": token, "process": process})


def test_a_holder_that_renews_it_elsewhere_is_left_alone(storage, monkeypatch):
    elsewhere(storage)
    said = []

    def renewed_when_said(line: str) -> None:
        said.append(line)
        elsewhere(storage)

    with pytest.raises(InUse, match="process 7 on far"), locked(bucket(), "run.lock", time.time(), renewed_when_said):
        pass
    assert len(said) == 1
    assert "was in use by process 7 on far" in said[0]


def test_a_holder_that_died_elsewhere_is_waited_for(storage):
    elsewhere(storage)
    start = bucket_lock.time.monotonic()
    with locked(bucket(), "run.lock", time.time(), lambda line: None) as lock:
        assert bucket_lock.time.monotonic() - start > bucket_lock.STALE_SECONDS - 5
        lock.renew()


def test_the_servers_clock_decides_what_is_stale(storage):
    storage.clock_offset = -10_000.0
    elsewhere(storage)
    storage.clock_offset = 0.0
    start = bucket_lock.time.monotonic()
    with locked(bucket(), "run.lock", time.time(), pytest.fail):
        assert bucket_lock.time.monotonic() - start < bucket_lock.STALE_SECONDS


def test_a_holder_of_this_machine_that_died_is_not_waited_for(storage):
    _, _, boot, namespace = bucket_lock._identity(os.getpid()).split()
    elsewhere(storage, process=f"4194305 100 {boot} {namespace}")
    with locked(bucket(), "run.lock", time.time(), pytest.fail) as lock:
        lock.renew()
        assert lock.lost_to is None


def test_one_that_was_stopped_and_wakes_finds_that_it_has_lost(storage, monkeypatch):
    monkeypatch.setattr(bucket_lock, "BEAT_SECONDS", 3600.0)

    def pause() -> None:
        with locked_run(URL) as run:
            append_json(run.metrics, {"step": 1})
            run.push()
            elsewhere(storage)
            append_json(run.metrics, {"step": 2})
            run.push()

    with pytest.raises(RunStopped, match=r"was taken over by process 7 on far.*nothing more is written"):
        pause()
    assert storage.data("bucket", f"{FOLDER}/metrics.jsonl") == b'{"step": 1}\n'
    assert storage.objects["bucket", LOCK].fields["metadata"]["token"] == "theirs"


def test_an_answer_that_was_lost_is_no_lost_lock(storage):
    with locked(bucket(), "run.lock", time.time(), pytest.fail) as lock:
        storage.fail(503, kind="write", name="run.lock", times=1, after=True)
        lock.renew()
        lock.renew()
        assert lock.lost_to is None
    assert LOCK not in storage.names("bucket")
    storage.fail(0, kind="write", name="run.lock", times=1, after=True)  # also of the first one
    with locked(bucket(), "run.lock", time.time(), pytest.fail) as lock:
        lock.renew()


# What is missing


RIGHTS = {
    "write": "storage.objects.create",
    "read": "storage.objects.get",
    "list": "storage.objects.list",
    "delete": "storage.objects.delete",
    "bucket": "storage.buckets.get",
}


@pytest.mark.parametrize("kind", RIGHTS)
def test_each_right_is_asked_for_at_the_start(storage, kind):
    storage.fail(403, kind=kind)
    with pytest.raises(UserError, match=f"run.dir: missing rights: {RIGHTS[kind]}: .*grant roles/storage") as refused:
        opened()
    assert (refused.value.exit_code, str(refused.value).count("\n")) == (2, 0)
    assert not storage.names("bucket", LOCK)


@pytest.mark.parametrize("has_project", [True, False])
def test_a_requester_pays_bucket_is_refused_for_a_run_alone(storage, has_project, monkeypatch):
    monkeypatch.setattr(storage, "bucket_fields", {"billing": {"requesterPays": True}})
    if has_project:
        monkeypatch.setenv("DPO_JAX_GCS_USER_PROJECT", "payer")
    problem = "gs://bucket/runs/one is in a requester-pays bucket, which checkpoints do not support: use another bucket"
    with pytest.raises(UserError, match=f"^run.dir: {problem}$"):
        opened()
    assert storage.names("bucket") == []
    if has_project:
        probe(bucket(), "--output", OUTPUT_RIGHTS)
    assert {request.params.get("userProject") for request in storage.requests} == {"payer" if has_project else None}


def test_a_bucket_that_does_not_exist(storage):
    with pytest.raises(UserError, match=r"the bucket does not exist: create it, or correct its name") as refused:
        opened("gs://another/run")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("status", [503, 429, 0])
def test_storage_that_does_not_answer_at_a_start_is_waited_for(storage, status):
    storage.fail(status, seconds=0.45)
    with locked_run(URL) as run:
        log_event(run, "start")
    assert storage.names("bucket") == [f"{FOLDER}/events.jsonl"]
    storage.fail(status)
    with (
        pytest.raises(StorageUnreachable, match=r"not answer.*\): run the same command again") as refused,
        lock_run(URL),
    ):
        pass
    assert refused.value.exit_code == 1


# Checkpoints

STATE = {"w": jnp.arange(4096.0).reshape(64, 64), "n": jnp.int32(3)}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
MANIFEST = {**make_manifest({"run": {"dir": URL}}, {"weights": "w"}, {}), "offsets": {}, "extras": {}}
STEPS = f"{FOLDER}/checkpoints"


def state(step: int) -> dict:
    return jax.tree.map(lambda x: x + step, STATE)


def opened_checkpoints(report=pytest.fail, **options) -> Checkpoints:
    return Checkpoints(f"{URL}/checkpoints", CheckpointConfig(**{"keep": 9, **options}), report)


@pytest.fixture(scope="module")
def two_steps(fake_storage) -> dict:
    """The objects of steps 1 and 2."""
    fake_storage.objects.clear()
    with opened_checkpoints() as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), MANIFEST)
    return dict(fake_storage.objects)


@pytest.fixture
def saved(storage, two_steps):
    storage.objects.update(two_steps)
    return storage


def assert_restores(step: int, report=pytest.fail) -> None:
    restored, manifest = opened_checkpoints(report).restore(ABSTRACT)
    assert manifest["step"] == step
    for name, array in restored.items():
        np.testing.assert_array_equal(array, state(step)[name])


def test_what_is_saved_comes_back_and_old_steps_go(storage):
    with opened_checkpoints(keep=2) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, state(step), MANIFEST)
        assert not checkpoints.save(3, state(3), MANIFEST)
    assert opened_checkpoints().steps() == [2, 3]
    assert not storage.names("bucket", f"{STEPS}/1/")
    assert_restores(3)
    fields, manifest = restore_part(f"{URL}/checkpoints", "newest", {"w": ABSTRACT["w"]})
    assert manifest["step"] == 3
    np.testing.assert_array_equal(fields["w"], state(3)["w"])


def test_a_save_that_was_not_finished_is_no_step_and_is_replaced(saved):
    del saved.objects["bucket", f"{STEPS}/2/commit_success.txt"]
    assert_restores(1)
    assert not [name for name in saved.names("bucket") if ".damaged" in name]
    leftover = f"{STEPS}/2/state/d/leftover"
    saved.put("bucket", leftover, b"of the killed one")
    with opened_checkpoints() as checkpoints:
        checkpoints.save(2, state(2), MANIFEST)
    assert leftover not in saved.names("bucket")
    assert_restores(2)


def objects_of(storage, step: int) -> list[str]:
    return storage.names("bucket", f"{STEPS}/{step}/")


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_damaged_step_is_set_aside_and_the_one_before_taken(saved, two_steps, harm):
    outcomes = set()
    for name in objects_of(saved, 2):
        saved.objects.clear()
        saved.objects.update(two_steps)
        if harm == "missing":
            del saved.objects["bucket", name]
        else:
            saved.put("bucket", name, saved.data("bucket", name)[:20])
        said = []
        restored, manifest = opened_checkpoints(said.append).restore(ABSTRACT)
        step = manifest["step"]
        np.testing.assert_array_equal(restored["w"], state(step)["w"])
        set_aside = [name for name in saved.names("bucket") if "/2.damaged/" in name]
        was_whole = not name.endswith("/2/commit_success.txt")
        assert bool(set_aside) == (step == 1 and (was_whole or harm == "cut")) == bool(said), name
        assert not (set_aside and objects_of(saved, 2)), name
        outcomes.add(step)
    assert outcomes == {1, 2}


@pytest.mark.parametrize("status", [503, 429, 0])
def test_no_fault_of_the_storage_damages_a_step(saved, status):
    """Each object in turn is not answered for longer than a client asks; tensorstore asks for a quarter of an hour."""
    names = objects_of(saved, 2)
    for name in names:
        is_read_by_tensorstore = "/d/" in name or name.endswith(".ocdbt")
        saved.fail(status, kind="read get", name=f"^{name}$", times=1 if is_read_by_tensorstore else 8)
        assert_restores(2)
        saved.faults.clear()
    assert objects_of(saved, 2) == names
    saved.fail(status, kind="list", times=8)
    assert_restores(2)


def test_a_right_that_is_missing_damages_no_step(saved):
    names = objects_of(saved, 2)
    outcomes = set()
    for name in names:
        saved.fail(403, kind="read get", name=f"^{name}$")
        denied = None
        try:
            assert_restores(2)
        except StorageDenied as error:
            denied = error
        saved.faults.clear()
        outcomes.add(denied and (denied.exit_code, str(denied).count("\n")))
    assert outcomes == {None, (43, 0)}  # Orbax may do without an object
    assert objects_of(saved, 2) == names


def test_storage_that_stays_away_ends_the_run_with_a_code_for_starting_again(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "READ_ATTEMPTS", 3)
    saved.fail(503, kind="read", name="state/_METADATA")
    with pytest.raises(StorageUnreachable, match="storage does not answer") as unreachable:
        opened_checkpoints().restore(ABSTRACT)
    assert unreachable.value.exit_code == 1
    assert opened_checkpoints().steps() == [1, 2]


# Tensorstore may report to an event loop that Orbax has closed after an error.
unheard = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unheard
@pytest.mark.parametrize("name", ["_METADATA", "manifest/", "2?/commit_success"])
def test_a_save_that_is_not_answered_can_be_tried_again(saved, name):
    saved.fail(503, kind="write", name=f"{STEPS}/3/.*{name}")
    with opened_checkpoints() as checkpoints:
        with pytest.raises(StorageUnreachable, match="cannot save step 3: storage does not answer"):
            checkpoints.save(3, state(3), MANIFEST, wait=True)
        saved.faults.clear()
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.save(3, state(3), MANIFEST, wait=True)
    assert_restores(3)


@unheard
def test_a_save_that_is_not_allowed_stops_the_run(saved):
    saved.fail(403, kind="write", name=f"{STEPS}/3/")
    with pytest.raises(StorageDenied, match="access is denied"), opened_checkpoints() as checkpoints:
        checkpoints.save(3, state(3), MANIFEST, wait=True)
    assert opened_checkpoints().steps() == [1, 2]
