"""launch/: what its scripts would do, what they refuse, and what they do to two workers a slice.

The stand-ins are in fake_cloud.py. `UPDATE_GOLDEN=1 pytest tests/launch` rewrites the stored output of dry
runs; read the difference before you commit it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax.storage import local_copy

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
EXAMPLES = sorted((ROOT / "launch").glob("env*.example"))

RUN = ["configs/a.yaml", "--loss.beta", "0.05", "--data.train", "{path: /mnt/dpo/my pairs.jsonl}"]
DIRECT = {"REQUEST": "direct", "CREATE_FLAGS": ""}
NFS = {"NFS": "10.0.0.2:/dpo", "RUNS": "/mnt/dpo/runs"}
TWO = {"LAUNCH_ENV": "launch/env.multislice.sh"}
CASES: dict[str, tuple[list[str], dict[str, str]]] = {
    "create": (["create.sh"], {}),
    "create_wait": (["create.sh", "wait"], {}),
    "create_direct": (["create.sh"], DIRECT),
    "sync": (["sync.sh"], {}),
    "setup": (["setup.sh"], {}),
    "setup_nfs": (["setup.sh"], NFS),
    "doctor": (["doctor.sh", *RUN], {}),
    "run": (["run.sh", *RUN], {}),
    "run_nfs": (["run.sh", *RUN], NFS),
    "status": (["status.sh"], {}),
    "status_direct": (["status.sh"], DIRECT),
    "status_nfs": (["status.sh"], NFS),
    "logs": (["logs.sh"], {}),
    "logs_all": (["logs.sh", "all"], {}),
    "logs_multislice": (["logs.sh", "3"], TWO | {"SLICE": "1"}),
    "stop": (["stop.sh"], {}),
    "stop_kill": (["stop.sh", "kill"], {}),
    "delete": (["delete.sh"], {}),
    "delete_direct": (["delete.sh"], DIRECT),
    "babysit": (["babysit.sh", *RUN], {"DELETE_WHEN_DONE": "1"}),
    "babysit_multislice": (["babysit.sh", *RUN], TWO),
}


@pytest.mark.parametrize("case", CASES)
def test_dry_run_prints_the_stored_commands_and_runs_none(cloud, case):
    words, settings = CASES[case]
    if settings in (DIRECT, NFS):
        cloud.set(**settings)
        settings = {}
    done = cloud.call(*words, DRY_RUN="1", **settings)
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.replace(cloud.git("rev-parse", "HEAD").strip(), "COMMIT")
    printed = re.sub(r"COMMIT\.\d+", "COMMIT.PID", printed)
    stored = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        stored.write_text(printed)
    assert printed == stored.read_text()
    assert cloud.calls == []


@pytest.mark.parametrize(("capacity", "flag"), [("spot", "--spot"), ("reserved", "--reserved"), ("on-demand", "")])
def test_capacity_becomes_its_flag(cloud, capacity, flag):
    cloud.set(CAPACITY=capacity)
    command = cloud.call("create.sh", DRY_RUN="1").stdout.splitlines()[1]
    assert re.findall(r"--(?:spot|reserved|guaranteed)\S*|--on\S*", command) == [flag] * bool(flag)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROJECT", ""),
        ("PROJECT", "my-project"),
        ("ZONE", "us-west4"),
        ("NAME", "Dpo_1"),
        ("TYPE", "tpu7x-8"),
        ("TYPE", "v4-08"),
        ("TYPE", "v5litepod-3"),
        ("RUNTIME", ""),
        ("RUNTIME", "v2-alpha-tpuv5"),
        ("CAPACITY", "cheap"),
        ("REQUEST", "now"),
        ("SLICES", "0"),
        ("NFS", "10.0.0.2"),
        ("RUNS_SHARED", "yes"),
        ("RUNS_SHARED", "1"),
        ("MOUNT", "mnt"),
        ("MOUNT", "/mnt/dpo/"),
        ("RUNS", ""),
        ("RUNS", "runs"),
        ("RUNS", "s3://bucket/runs"),
        ("RUNS", "gs://my-bucket/runs"),
        ("RUNS", "gs://bucket/runs/"),
        ("RUNS", "gs://bucket/a/../b"),
        ("RUNS", "/mnt/dpo/.."),
        ("RUN_ID", "../other"),
        ("COMMAND", "eval"),
        ("PYTHON", "3.10"),
        ("COORDINATOR_PORT", "auto"),
        ("COORDINATOR_PORT", "99999"),
        ("RETRY_SECONDS", "08"),
        ("SECRETS", "/no/such/file"),
        ("STOP_SECONDS", "0"),
        ("POLL_SECONDS", "soon"),
        ("STALL_SECONDS", "1h"),
        ("MAX_RESTARTS", "-1"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(cloud, name, value):
    cloud.set(**{name: value})
    done = cloud.call("stop.sh")
    assert done.returncode == 2
    shown = value or "''"
    assert re.fullmatch(rf"launch: {name}: {re.escape(shown)} cannot be used: .+\n", done.stderr), done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize("runs", ["/home/me/runs", "/mnt/dpo2/runs"])
def test_on_a_share_runs_lie_below_it(cloud, runs):
    cloud.set(**NFS)
    cloud.set(RUNS=runs)
    done = cloud.call("stop.sh")
    assert (done.returncode, cloud.calls) == (2, [])
    assert (
        done.stderr == f"launch: RUNS: {runs} cannot be used: with NFS it lies under MOUNT, /mnt/dpo, or in a bucket\n"
    )


@pytest.mark.parametrize("kind", ["tpu7x-8", "v7x-16", "tpu8-4", "v10p-8"])
def test_what_the_tpu_api_does_not_offer_is_refused_with_the_way_to_it(cloud, kind):
    cloud.set(TYPE=kind)
    why = "the TPU API, which these scripts use, ends at v6e: launch/gke/README.md, or a managed instance group"
    assert cloud.call("create.sh").stderr == f"launch: TYPE: {kind} cannot be used: {why}\n"


GRANT = "grant your account roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket"


def test_a_bucket_that_no_run_can_use_is_refused_before_a_slice_is_asked_for(cloud):
    def refused() -> str:
        done = cloud.call("create.sh")
        assert (done.returncode, done.stderr.count("\n"), cloud.calls) == (2, 1, []), done.stderr
        return done.stderr

    cloud.set(RUNS="gs://other/runs")
    absent = "gs://other not found: 404: gcloud storage buckets create gs://other --location=us-west4"
    assert absent in refused()
    cloud.set(RUNS="gs://bucket/runs")
    denied = cloud.storage.fail(403, kind="bucket")
    assert refused().endswith(f": {GRANT}\n")
    denied.times = 0
    cloud.storage.bucket_fields["billing"] = {"requesterPays": True}
    assert "use a bucket without requester pays" in refused()
    del cloud.storage.bucket_fields["billing"]
    cloud.storage.fail(503, kind="bucket", times=1)
    unanswered = cloud.call("create.sh")
    assert (unanswered.returncode, unanswered.stderr.count("\n"), cloud.calls) == (1, 1, [])  # ask again
    assert "RUNS: gs://bucket/runs cannot be read: " in unanswered.stderr
    assert cloud.call("create.sh").returncode == 0


def test_what_costs_or_deletes_in_a_bucket_is_told(cloud):
    assert cloud.call("create.sh").stderr == ""
    rule = {"action": {"type": "Delete"}, "condition": {"age": 3}}
    cloud.storage.bucket_fields |= {
        "location": "EUROPE-WEST4", "softDeletePolicy": {"retentionDurationSeconds": "604800"},
        "lifecycle": {"rule": [rule]}, "versioning": {"enabled": True}}  # fmt: skip
    assert cloud.call("delete.sh", YES="1").returncode == 0
    done = cloud.call("create.sh")
    assert done.returncode == 0
    told = [line.removeprefix("launch: RUNS: gs://bucket ") for line in done.stderr.splitlines()]
    assert [line.split(":")[0] for line in told] == [
        "is in EUROPE-WEST4, not in us-west4", "keeps and bills deleted checkpoints",
        "bills deleted checkpoints for 7 days", "has lifecycle rules",
    ]  # fmt: skip
    remedies = [line.partition(": ")[2] for line in told[1:3]]
    assert remedies == [
        f"gcloud storage buckets update gs://bucket {flag}" for flag in ("--no-versioning", "--clear-soft-delete")
    ]


IMAGES = {
    "v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e",
}  # fmt: skip


@pytest.mark.parametrize("chip", IMAGES)
def test_an_image_of_another_chip_is_refused(cloud, chip):
    cloud.set(TYPE=f"{chip}-16")
    for image in IMAGES.values():
        cloud.set(RUNTIME=image)
        done = cloud.call("stop.sh", DRY_RUN="1")
        why = f"it is another TPU's image: {chip}-16 needs {IMAGES[chip]}"
        refused = f"launch: RUNTIME: {image} cannot be used: {why}\n"
        assert (done.returncode, done.stderr) == ((0, "") if image == IMAGES[chip] else (2, refused))
    cloud.set(RUNTIME="v2-nightly")  # not known to be another's
    assert cloud.call("stop.sh", DRY_RUN="1").returncode == 0


@pytest.mark.parametrize("chip", IMAGES)
def test_only_one_host_needs_no_share(cloud, chip):
    cloud.set(RUNTIME=IMAGES[chip], TYPE=f"{chip}-16", SLICES="2")
    assert cloud.call("stop.sh", DRY_RUN="1").returncode == 0  # nor does a bucket
    cloud.set(RUNS="/var/tmp/dpo")
    for number, slices, shared, code in (("8", "1", "", 0), ("16", "1", "", 2), ("8", "2", "", 2), ("16", "2", "1", 0)):
        cloud.set(TYPE=f"{chip}-{number}", SLICES=slices, RUNS_SHARED=shared)
        done = cloud.call("stop.sh", DRY_RUN="1")
        assert (done.returncode, "launch: NFS: '' cannot be used: " in done.stderr) == (code, code == 2)


@pytest.mark.parametrize("flag", ["--valid-until-duration=6h", "--labels=a=b --valid-until-time 2030-01-01"])
def test_a_direct_request_does_not_lapse(cloud, flag):
    with open(cloud.repo / "launch" / "env.sh", "a") as file:
        file.write(f"REQUEST=direct CREATE_FLAGS=({flag})\n")
    done = cloud.call("create.sh")
    assert (done.returncode, done.stderr.count("\n"), cloud.calls) == (2, 1, [])
    assert done.stderr.startswith("launch: CREATE_FLAGS: ")


@pytest.mark.parametrize("dry", ["", "1"])
@pytest.mark.parametrize("script", ["doctor.sh", "run.sh", "babysit.sh"])
def test_a_run_that_cannot_be_is_refused_before_anything_is_called(cloud, script, dry):
    (cloud.repo / "configs" / "here_only.yaml").touch()
    configs = ("configs/no.yaml", "configs/here_only.yaml", "configs", "-", "/a", "../a")
    overrides = (["--run.dir", "/a"], ["--run.dir=/a"], ["--run", "{dir: /a}"], ["--run={dir: /a}"])
    cases = [("CONFIG", [config]) for config in configs]
    cases += [("ARGUMENT", ["configs/a.yaml", "--loss.beta", "0.1", *override]) for override in overrides]
    for name, words in cases:
        done = cloud.call(script, *words, DRY_RUN=dry)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"launch: {name}: .+ cannot be used: .+\n", done.stderr), done.stderr
    assert cloud.calls == []


def test_a_config_is_looked_for_in_the_commit_that_is_sent(cloud):
    old = cloud.git("rev-parse", "HEAD").strip()
    (cloud.repo / "configs" / "b.yaml").write_text("loss: {beta: 0.1}\n")
    cloud.git("add", "configs/b.yaml")
    for env, code in (({}, 0), ({"ALLOW_DIRTY": "1"}, 0), ({"COMMIT": old}, 2)):
        assert cloud.call("run.sh", "configs/b.yaml", DRY_RUN="1", **env).returncode == code
    assert cloud.call("babysit.sh", "configs/b.yaml", DRY_RUN="1", ALLOW_DIRTY="1").returncode == 0
    done = cloud.call("babysit.sh", "configs/b.yaml", DRY_RUN="1")
    assert done.stderr.startswith("launch: ALLOW_DIRTY: '' cannot be used: ")


@pytest.mark.parametrize(
    ("words", "env", "name"),
    [
        (["stop.sh"], {"DRY_RUN": "yes"}, "DRY_RUN"),
        (["delete.sh"], {"YES": "y"}, "YES"),
        (["sync.sh"], {"ALLOW_DIRTY": "true"}, "ALLOW_DIRTY"),
        (["logs.sh"], {"FOLLOW": "2"}, "FOLLOW"),
        (["logs.sh"], {"LINES": "many"}, "LINES"),
        (["logs.sh", "first"], {}, "WORKER"),
        (["create.sh", "now"], {}, "ARGUMENT"),
        (["delete.sh", "other"], {}, "ARGUMENT"),
        (["run.sh"], {}, "CONFIG"),
        (["run.sh", "/tmp/a.yaml"], {}, "CONFIG"),
        (["run.sh", "configs/README.md"], {}, "CONFIG"),
        (["run.sh", "--loss.beta", "1"], {}, "CONFIG"),
        (["stop.sh", "now"], {}, "ARGUMENT"),
        (["logs.sh"], {"SLICE": "1"}, "SLICE"),
        (["babysit.sh"], {}, "CONFIG"),
        (["babysit.sh", "configs/a.yaml"], {"DELETE_WHEN_DONE": "yes"}, "DELETE_WHEN_DONE"),
        (["status.sh"], {"LAUNCH_ENV": "/no/such/env.sh"}, "LAUNCH_ENV"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(cloud, words, env, name):
    done = cloud.call(*words, **env)
    assert done.returncode == 2
    assert re.fullmatch(rf"launch: {name}: .+ cannot be used: .+\n", done.stderr), done.stderr
    assert cloud.calls == []


def test_a_result_on_the_slice_s_own_disk_is_not_deleted(cloud):
    cloud.set(TYPE="v5litepod-8", NFS="", RUNS="/var/tmp/dpo", RUNS_SHARED="")
    done = cloud.call("babysit.sh", "configs/a.yaml", DELETE_WHEN_DONE="1", DRY_RUN="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch: DELETE_WHEN_DONE: 1 cannot be used: RUNS is on the slice's own disk")
    assert cloud.call("babysit.sh", "configs/a.yaml", DRY_RUN="1").returncode == 0


def test_several_slices_come_from_the_queue_only(cloud):
    cloud.set(SLICES="2", **DIRECT)
    refused = "launch: REQUEST: direct cannot be used: several slices come from a queued request only\n"
    assert cloud.call("create.sh").stderr == refused
    assert cloud.calls == []


def test_create_waits_through_the_queue_and_a_failed_question(cloud):
    cloud.next("create", "queue")
    cloud.next("describe", "-", "1", "1")
    done = cloud.call("create.sh")
    assert (done.returncode, done.stdout.split()) == (0, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert done.stderr.count("again in") == 2
    assert cloud.verbs("create") == ["create"]


def test_create_says_when_the_request_is_lost(cloud):
    (cloud.root / "request").write_text("PROVISIONING\nSUSPENDED\n")
    done = cloud.call("create.sh", "wait")
    assert (done.returncode, done.stdout.split()) == (1, ["PROVISIONING", "SUSPENDED"])
    assert "launch/delete.sh" in done.stderr
    assert cloud.verbs("create") == []


@pytest.mark.parametrize("request_by", ["queued", "direct"])
def test_a_refused_request_is_not_repeated(cloud, request_by):
    cloud.set(REQUEST=request_by, CREATE_FLAGS="")
    cloud.next("create", "refuse")
    done = cloud.call("create.sh")
    assert (done.returncode, "RESOURCE_EXHAUSTED" in done.stderr) == (1, True)
    assert len(cloud.calls) == 1


def test_a_slice_by_direct_request(cloud):
    cloud.set(**DIRECT)
    assert cloud.call("status.sh").stdout.splitlines()[0] == "tpu-vm dpo: NOT_FOUND"
    assert cloud.call("create.sh").returncode == 0
    assert cloud.call("status.sh").stdout.splitlines()[0] == "tpu-vm dpo: READY\tHEALTHY"
    assert cloud.call("delete.sh", YES="1").returncode == 0
    assert cloud.call("status.sh").stdout.splitlines()[0] == "tpu-vm dpo: NOT_FOUND"
    assert not any("queued-resources" in call for call in cloud.calls if " list " not in call)


def test_sync_sends_the_commit_and_refuses_what_is_not_committed(cloud):
    cloud.call("create.sh")
    cloud.next("scp", "255")  # the first copy fails
    done = cloud.call("sync.sh")
    commit = cloud.git("rev-parse", "HEAD").strip()
    assert (done.returncode, done.stdout.split()) == (0, [commit])
    trees = [cloud.home(worker) / "dpo_jax" / "tree" for worker in (0, 1)]
    assert all(os.readlink(tree) == f"trees/{commit}" for tree in trees)
    assert not any((tree / "launch" / "env.sh").exists() for tree in trees)

    (cloud.repo / "configs" / "a.yaml").write_text("loss: {beta: 0.2}\n")
    before = len(cloud.calls)
    refused = cloud.call("sync.sh")
    assert refused.returncode == 2
    assert refused.stderr.startswith("launch: ALLOW_DIRTY: '' cannot be used: ")
    assert len(cloud.calls) == before

    sent = cloud.call("sync.sh", ALLOW_DIRTY="1").stdout.strip()
    assert sent != commit
    assert all((tree / "configs" / "a.yaml").read_text() == "loss: {beta: 0.2}\n" for tree in trees)
    assert cloud.git("rev-parse", "HEAD").strip() == commit
    assert "a.yaml" in cloud.git("status", "--porcelain")
    assert cloud.call("sync.sh", COMMIT=commit).stdout.strip() == commit  # whatever is in the checkout


def test_secrets_reach_the_run_and_no_command_line(cloud):
    secrets = cloud.root / "secrets"
    secrets.write_text("SECRET_WORD=hush\n")
    cloud.set(SECRETS=str(secrets))
    cloud.install()
    assert cloud.call("run.sh", "configs/a.yaml", WATCH_SECONDS="1").returncode == 0
    assert sorted((cloud.root / "starts").read_text().splitlines()) == ["dpo/0 hush", "dpo/1 hush"]
    assert not any("hush" in call for call in cloud.calls)


def test_secrets_are_data(cloud):
    values = {
        "SPACES": "  two  words ", "EQUALS": "a=b==", "SHELL_WORDS": "a & b; c | d > e * ? ~ !x #y", "EMPTY": "",
        "DOLLAR": "$HOME ${HOME} $1", "EXECUTED": f"$(touch {cloud.root}/bad) `touch {cloud.root}/bad`",
        "QUOTES": "it's \"so\"", "OPEN": "\"", "BACKSLASH": "a\\nb\\", "UNICODE": "pässwörd é 日本",
        "run": "x", "code": "5", "LONG": "x" * 10_000, "LAST": "no line end",
    }  # fmt: skip
    lines = ["# a comment", "", "export HF_TOKEN=hf_1", 'DOUBLE="in $HOME\'s quotes"', "SINGLE=' kept '"]
    lines += ["WINDOWS=w\r"]
    secrets = cloud.root / "secrets"
    secrets.write_text("\n".join(lines + [f"{name}={value}" for name, value in values.items()]))
    cloud.set(SECRETS=str(secrets))
    cloud.install()
    started = cloud.call("run.sh", "configs/a.yaml", WATCH_SECONDS="1")
    assert (started.returncode, started.stdout.count("first runs, process")) == (0, 2), started.stdout + started.stderr
    actual = dict(one.split("=", 1) for one in (cloud.home(0) / "environment").read_text().split("\0") if one)
    expected = values | {"HF_TOKEN": "hf_1", "DOUBLE": "in $HOME's quotes", "SINGLE": " kept ", "WINDOWS": "w"}
    assert {name: actual.get(name) for name in expected} == expected
    assert not (cloud.root / "bad").exists()

    secrets.write_text("A=1\nmy secret without a name\n")
    refused = cloud.call("sync.sh")
    assert (refused.returncode, refused.stderr) == (
        2, f"launch: SECRETS: {secrets} cannot be used: line 2 is not NAME=value\n")  # fmt: skip


def test_doctor_runs_on_all_workers_as_the_run_would(cloud):
    secrets = cloud.root / "secrets"
    secrets.write_text("SECRET_WORD=hush\n")
    cloud.set(SECRETS=str(secrets), COMMAND="reward")
    cloud.install()
    done = cloud.call("doctor.sh", "configs/a.yaml", "--loss.beta", "0.05")
    assert done.returncode == 1, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"dpo-w-{worker}: FAIL  a check: hush" for worker in (0, 1)]
    options = ["--for", "reward", "--run.dir", "gs://bucket/runs/first", "--loss.beta", "0.05"]
    for home in (cloud.home(0), cloud.home(1)):
        config = (home / "dpo_jax" / "tree").resolve() / "configs" / "a.yaml"
        assert (home / "called").read_text().splitlines() == ["auto 8476", "doctor", str(config), *options]
    assert cloud.starts == []

    assert cloud.call("run.sh", "configs/a.yaml").returncode == 0
    refused = cloud.call("doctor.sh", "configs/a.yaml")
    assert (refused.returncode, refused.stderr.count("RUN_ID: first runs here: launch/stop.sh first")) == (2, 2)


def test_a_trainer_that_never_starts_is_a_failure(cloud):
    cloud.install()
    (cloud.home(0) / "dpo_jax" / "launched" / "first" / "log").mkdir(parents=True)  # its parent cannot run either
    (cloud.home(1) / "dpo_jax" / "secrets.env").write_text("UID=0\n")  # a variable that bash lets nobody set
    failed = cloud.call("run.sh", "configs/a.yaml")
    assert (failed.returncode, cloud.starts) == (1, [])
    assert "dpo-w-0: first does not run: it was not started here" in failed.stdout
    assert "UID: readonly variable" in failed.stdout


def test_a_run_on_two_workers_starts_once_and_stops_saved(cloud):
    cloud.install()
    words = ["--data.train", "{path: my 'own' $HOME pairs.jsonl}", "--loss.beta", "0.05"]
    started = cloud.call("run.sh", "configs/a.yaml", *words, WATCH_SECONDS="1")
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("first runs, process") == 2
    for home in (cloud.home(0), cloud.home(1)):
        config = (home / "dpo_jax" / "tree").resolve() / "configs" / "a.yaml"
        own = ["--run.dir", "gs://bucket/runs/first", "--run.progress", "false"]
        assert (home / "called").read_text().splitlines() == ["auto 8476", "train", str(config), *own, *words]

    pids = cloud.pids()
    again = cloud.call("run.sh", "configs/a.yaml", *words)  # as after a lost connection
    assert (again.returncode, again.stdout.count("runs already")) == (0, 2)
    other = cloud.call("run.sh", "configs/a.yaml", "--loss.beta", "0.1")
    assert (other.returncode, other.stderr.count("RUN_ID: first runs with other settings")) == (2, 2)
    assert cloud.pids() == pids

    status = cloud.call("status.sh").stdout
    assert status.startswith(
        "queued-resources dpo: ACTIVE\ntpu-vm dpo: READY\tHEALTHY\ngs://bucket/runs/first: in use by "
    )
    assert status.count("first runs, process") == status.count("newest step: logged 0\n") == 2

    stopped = cloud.call("stop.sh")
    assert (stopped.returncode, stopped.stdout.count("first ended, exit code 42")) == (0, 2)
    assert cloud.call("logs.sh").stdout.split() == ["saved"]
    assert cloud.call("logs.sh", "all").stdout.split() == ["saved", "saved"]
    assert cloud.call("stop.sh").stdout.count("exit code 42") == 2  # nothing left to stop
    assert cloud.call("run.sh", "configs/a.yaml", "--loss.beta", "0.1").stdout.count("first runs, process") == 2


def test_a_run_on_a_share(cloud):
    cloud.share()
    cloud.install()
    assert cloud.call("run.sh", "configs/a.yaml", WATCH_SECONDS="1").returncode == 0
    assert f"--run.dir {cloud.runs / 'first'} " in " ".join((cloud.home(1) / "called").read_text().splitlines())
    (cloud.runs / "first" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 12, "loss": 1}\n')
    for name in ("5", "10", "15.orbax-checkpoint-tmp", "11.damaged"):
        (cloud.runs / "first" / "checkpoints" / name).mkdir()
    status = cloud.call("status.sh").stdout
    assert status.count("first runs, process") == status.count("newest step: logged 12, saved 10") == 2
    assert "gs://" not in status + cloud.call("delete.sh", YES="1").stdout
    assert cloud.storage.objects == {}


URL = "gs://bucket/runs/first"
NEWEST = f"{URL}: newest step: logged 12, saved 10\n"
END = {"event": "end", "step": 12}
ERROR = {"event": "error", "exit_code": 43, "text": 'a "quoted" cause: a remedy'}
HELD = "in use by process 7 on w-0, or it was killed there"
ENDS = {  # the last event, the lock, and what is said of them
    "done": (END, "", "done at 2026-09-21T14:13:20Z"),
    "stopped": ({"event": "preempt", "step": 12}, "", "stopped and saved at 2026-09-21T14:13:20Z"),
    "refused": (ERROR, "", r"ended at 2026-09-21T14:13:20Z with exit code 43: a \"quoted\" cause: a remedy"),
    "running": ({"event": "save", "step": 10}, "process 7 on w-0\n", HELD),
    "killed while it wrote its end": (END, "process 7 on w-0\n", HELD),
}


def put_run(cloud, last: dict, holder: str = "", num_events: int = 1) -> None:
    """A run in the bucket that has come to step 12."""
    events = [{"event": "save", "time": 1.5, "pid": 1, "step": 999}] * num_events
    events.append({"event": last["event"], "time": 1790000000.75, "pid": 1, **last})
    cloud.storage.put("bucket", "runs/first/events.jsonl", "".join(f"{json.dumps(row)}\n" for row in events).encode())
    cloud.storage.put("bucket", "runs/first/metrics.jsonl", b'{"step": 1, "loss": 1}\n{"step": 12, "loss": 1}\n')
    for name in ("5/commit_success.txt", "10/commit_success.txt", "15/state/d", "11.damaged/commit_success.txt"):
        cloud.storage.put("bucket", f"runs/first/checkpoints/{name}", b"x")
    if holder:
        cloud.storage.put("bucket", "runs/first/run.lock", holder.encode())


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("num_events", [1, 1000])  # of which not all are read
def test_status_says_what_the_bucket_knows(cloud, end, num_events):
    last, holder, line = ENDS[end]
    put_run(cloud, last, holder, num_events)
    done = cloud.call("status.sh")
    expected = f"queued-resources dpo: NOT_FOUND\n{URL}: {line}\n{NEWEST}"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_status_goes_on_where_the_bucket_cannot_be_read(cloud):
    assert cloud.call("status.sh").stdout.splitlines()[1:] == [f"{URL}: no run was saved there so far"]
    put_run(cloud, END)
    cloud.storage.fail(403, kind="list", times=1)
    fault = "[None] does not have permission to access b instance [bucket] (or it may not exist): an injected fault"
    assert cloud.call("status.sh").stdout.splitlines()[1:] == [f"{URL}: cannot be read: {fault}: {GRANT}"]
    cloud.storage.fail(503, kind="read")
    cloud.call("create.sh")
    done = cloud.call("status.sh")
    assert f"{URL}: cannot be read: HTTPError 503: an injected fault.\n" in done.stdout
    assert (done.returncode, done.stdout.count("first does not run: nothing was sent here")) == (0, 2)


def test_a_worker_s_own_logs_are_ahead_of_the_bucket(cloud):
    cloud.install()
    for process, step in ((3, 20), (0, 14)):  # in the order in which they were written
        copy = cloud.home(0) / ".cache" / "dpo_jax" / "runs" / local_copy("runs", URL, process).name
        copy.mkdir(parents=True)
        (copy / "metrics.jsonl").write_text(f'{{"step": {step}, "loss": 1}}\n')
        os.utime(copy / "metrics.jsonl", (100 - process, 100 - process))
    status = cloud.call("status.sh").stdout.splitlines()
    assert sorted(line for line in status if "newest" in line) == [
        "dpo-w-0: newest step: logged 14", "dpo-w-1: newest step: logged 0"]  # fmt: skip


def test_logs_of_a_slice_that_is_gone_are_those_of_the_bucket(cloud):
    put_run(cloud, ERROR)
    done = cloud.call("logs.sh", "3", LINES="1")
    assert (done.returncode, done.stderr) == (
        0, "launch: dpo is NOT_FOUND, and its logs with it; this is in the bucket:\n")  # fmt: skip
    assert done.stdout.splitlines() == [
        f"==> {URL}/events.jsonl <==", json.dumps({"event": "error", "time": 1790000000.75, "pid": 1, **ERROR}),
        f"==> {URL}/metrics.jsonl <==", '{"step": 12, "loss": 1}']  # fmt: skip
    followed = cloud.call("logs.sh", FOLLOW="1")
    assert (followed.returncode, followed.stdout) == (2, "")
    assert followed.stderr == "launch: FOLLOW: 1 cannot be used: dpo is NOT_FOUND: there is nothing to follow\n"
    cloud.storage.fail(403, kind="read")
    denied = cloud.call("logs.sh")
    assert (denied.returncode, denied.stdout, denied.stderr.count("\n")) == (2, "", 2)
    assert denied.stderr.endswith(f": {GRANT}\n")


def test_a_run_on_two_slices_is_one_run(cloud):
    cloud.set(SLICES="2")
    cloud.install()
    assert cloud.call("run.sh", "configs/a.yaml", WATCH_SECONDS="1").returncode == 0
    assert sorted(cloud.starts) == ["dpo-0/0", "dpo-0/1", "dpo-1/0", "dpo-1/1"]
    status = cloud.call("status.sh").stdout
    running = re.findall(r"(dpo-\d-w-\d): first runs, process", status)
    assert sorted(running) == ["dpo-0-w-0", "dpo-0-w-1", "dpo-1-w-0", "dpo-1-w-1"]
    assert cloud.call("logs.sh", "1", SLICE="1").returncode == 0
    assert " ssh dpo-1 " in cloud.calls[-1]
    assert cloud.call("stop.sh").stdout.count("first ended, exit code 42") == 4
    cloud.next("ssh", "3")  # one of the slices cannot be reached
    assert cloud.call("stop.sh").returncode == 3
    assert cloud.call("delete.sh", YES="1").returncode == 0
    assert not (cloud.root / "slices").exists()


def test_a_run_that_hangs_is_killed_only_when_asked(cloud):
    cloud.install()
    cloud.plan(1, "deaf wait")
    cloud.call("run.sh", "configs/a.yaml", WATCH_SECONDS="1")
    cloud.set(STOP_SECONDS="5")  # enough for the process that listens, on a busy machine too
    stopped = cloud.call("stop.sh")
    assert (stopped.returncode, stopped.stdout.count("first runs, process")) == (1, 1)
    killed = cloud.call("stop.sh", "kill")
    assert (killed.returncode, killed.stdout.count("exit code 137"), killed.stdout.count("exit code 42")) == (0, 1, 1)


def test_a_run_that_cannot_start_says_why(cloud):
    cloud.install()
    (cloud.repo / "configs" / "b.yaml").write_text("loss: {beta: 0.1}\n")
    cloud.git("add", "configs/b.yaml")  # after sync.sh
    missing = cloud.call("run.sh", "configs/b.yaml")
    assert (missing.returncode, missing.stderr.count("CONFIG: configs/b.yaml is not in the tree")) == (2, 2)

    refused = cloud.call("run.sh", "configs/a.yaml", "--no_such_option", "1", WATCH_SECONDS="2")
    assert (refused.returncode, refused.stdout.count("dpo-jax: error: no_such_option")) == (2, 2)

    cloud.git("commit", "-qm", "b")
    assert cloud.call("sync.sh").returncode == 0
    stale = cloud.call("run.sh", "configs/a.yaml")
    assert (stale.returncode, stale.stderr.count("what was sent last is not installed: launch/setup.sh")) == (2, 2)


def test_packages_are_not_exchanged_under_a_run(cloud):
    cloud.install()
    assert cloud.call("run.sh", "configs/a.yaml").returncode == 0
    done = cloud.call("setup.sh")
    assert (done.returncode, done.stderr.count("RUN_ID: first runs here: launch/stop.sh first")) == (2, 2)


def test_a_package_index_that_fails_is_asked_again(cloud):
    cloud.share()
    assert cloud.call("create.sh").returncode == cloud.call("sync.sh").returncode == 0
    python = cloud.root / "worker" / "python3"
    python.write_text(python.read_text().replace("\n[[", "\n[[ -e ~/asked ]] || { touch ~/asked; exit 2; }\n[[", 1))
    done = cloud.call("setup.sh")
    assert (done.returncode, done.stderr.count("launch: exit code 1, again in 0 s")) == (0, 1)


def test_delete_asks_for_the_name(cloud):
    cloud.call("create.sh")
    put_run(cloud, {"event": "save", "step": 10})
    before = len(cloud.calls)
    for answer in ("", "y\n", "other\n"):
        done = cloud.call("delete.sh", given=answer)
        assert done.returncode == 2
        assert NEWEST in done.stderr
        assert "nothing was deleted" in done.stderr
    assert len(cloud.calls) == before
    assert cloud.call("delete.sh", given="dpo\n").returncode == 0
    assert [call.split()[2:4] for call in cloud.calls[before:]] == [
        ["queued-resources", "delete"], ["queued-resources", "list"], ["tpu-vm", "list"]]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stay_small(script):
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_the_readme_knows_the_scripts_and_their_settings():
    readme = (ROOT / "launch" / "README.md").read_text()
    helpers = ("worker-", "babysit-lib", "bucket-lib", "lib.sh")
    missing = [path.name for path in SCRIPTS if not path.name.startswith(helpers) and path.name not in readme]
    assert not missing
    scripts = "".join(path.read_text() for path in [*SCRIPTS, *EXAMPLES])
    named = set(re.findall(r"`(?:[\w./]+ )?([A-Z][A-Z_]{3,})[=`]", readme))
    assert "STALL_SECONDS" in named
    assert not {name for name in named if name not in scripts}


def tool(name: str) -> str:
    """Path of a linter for shell scripts, which the extra [test] installs beside Python."""
    beside_python = Path(sys.executable).parent / name
    path = str(beside_python) if beside_python.exists() else shutil.which(name)
    if path is None:
        assert os.environ.get("CI") != "true", "CI must have the extra [test] installed"
        pytest.skip(f"{name} is missing: pip install '.[test]'")
    return path


def test_shellcheck_finds_nothing():
    done = subprocess.run([tool("shellcheck"), *SCRIPTS, *EXAMPLES], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shfmt_changes_nothing():  # its style is in launch/.editorconfig
    done = subprocess.run([tool("shfmt"), "-d", *SCRIPTS], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
