"""The scripts of launch/: what they print when they only print, what they refuse, and what they do to two workers.

A stand-in for gcloud runs on this machine: a worker is a home directory, `ssh` a shell in it. A stand-in for the
trainer writes down how it was called, and saves and stops when it is asked to.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "launch"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

GCLOUD = r"""#!/usr/bin/env bash
# gcloud compute tpus KIND VERB ...: a code other than 0 on the next line of `exits` ends the call at once
printf '%s\n' "$*" >>"$CLOUD/calls"
pop() { [[ -s $CLOUD/$1 ]] && head -n 1 "$CLOUD/$1" && sed -i 1d "$CLOUD/$1"; }
code=$(pop exits) && [[ $code != 0 ]] && exit "$code"
workers=(0 1)
for word in "$@"; do
  case $word in
    --worker=[01]) workers=("${word#*=}") ;;
    --command=*) line=${word#*=} ;;
  esac
done
case "$3 $4" in
  "queued-resources describe") pop states || echo ACTIVE ;;
  "tpu-vm scp") for i in "${workers[@]}"; do cp "$5" "$CLOUD/$i/${6#*:}" || exit; done ;;
  "tpu-vm ssh")
    for i in "${workers[@]}"; do
      (cd "$CLOUD/$i" && HOME=$CLOUD/$i exec bash -c "$line") &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    exit "${code:-0}"
    ;;
esac
"""

TRAINER = r"""#!/usr/bin/env bash
printf '%s\n' "$DPO_JAX_COORDINATOR $JAX_COORDINATOR_PORT" "$@" >"$HOME/called.new"
mv "$HOME/called.new" "$HOME/called"
trap 'sleep 0.3; echo saved; exit 42' TERM
[[ $* != *no_such_option* ]] || { echo "dpo-jax: error: no_such_option" >&2; exit 2; }
while :; do sleep 0.05; done
"""

CASES = {
    "create": ["create.sh"],
    "create_wait": ["create.sh", "wait"],
    "sync": ["sync.sh"],
    "setup": ["setup.sh"],
    "run": ["run.sh", "configs/a.yaml", "--loss.beta", "0.05", "--data.train", "{path: /mnt/dpo/my pairs.jsonl}"],
    "status": ["status.sh"],
    "logs": ["logs.sh"],
    "logs_all": ["logs.sh", "all"],
    "stop": ["stop.sh"],
    "delete": ["delete.sh"],
}


@dataclass
class Cloud:
    """A checkout of its own, a gcloud of its own, two workers."""

    root: Path

    @property
    def repo(self) -> Path:
        """What sync.sh sends."""
        return self.root / "repo"

    def call(self, script: str, *args: str, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/, with nothing of this process's environment but the path."""
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        clean = {"PATH": path, "HOME": str(self.root), "TMPDIR": "/tmp", "CLOUD": str(self.root), "LC_ALL": "C"}
        quick = {"RETRY_SECONDS": "0", "POLL_SECONDS": "0", "WATCH_SECONDS": "1"}
        return subprocess.run(["bash", f"launch/{script}", *args], cwd=self.repo, env=clean | quick | env, input=given,
                              check=False, capture_output=True, text=True, timeout=60)  # fmt: skip

    def set(self, **settings: str) -> None:
        """Change settings in launch/env.sh."""
        with open(self.repo / "launch" / "env.sh", "a") as file:
            file.writelines(f"{name}='{value}'\n" for name, value in settings.items())

    def git(self, *args: str) -> str:
        """What git says in the checkout."""
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *args], cwd=self.repo, check=True, capture_output=True, text=True).stdout

    @property
    def calls(self) -> list[str]:
        """Arguments of every call of gcloud."""
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def install(self) -> None:
        """Do what setup.sh does on the workers, with the stand-in as the trainer."""
        assert self.call("sync.sh").returncode == 0
        for home in (self.root / "0", self.root / "1"):
            trainer = home / "dpo_jax" / "venv" / "bin" / "dpo-jax"
            trainer.parent.mkdir(parents=True)
            trainer.write_text(TRAINER)
            trainer.chmod(0o755)
            (home / "dpo_jax" / "installed").write_text(os.readlink(home / "dpo_jax" / "tree"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    cloud = Cloud(tmp_path_factory.mktemp("cloud"))
    for folder in ("bin", "0", "1", "repo/configs"):
        (cloud.root / folder).mkdir(parents=True)
    (cloud.root / "bin" / "gcloud").write_text(GCLOUD)
    (cloud.root / "bin" / "gcloud").chmod(0o755)
    shutil.copytree(ROOT / "launch", cloud.repo / "launch", ignore=shutil.ignore_patterns("env.sh"))
    (cloud.repo / "configs" / "a.yaml").write_text("loss: {beta: 0.1}\n")
    cloud.git("init", "-q")
    cloud.git("add", ".")
    cloud.git("commit", "-qm", "a")
    shutil.copy(cloud.repo / "launch" / "env.example", cloud.repo / "launch" / "env.sh")
    return cloud.root


@pytest.fixture
def cloud(fresh, tmp_path):
    shutil.copytree(fresh, tmp_path, dirs_exist_ok=True)
    yield Cloud(tmp_path)
    for pid in tmp_path.glob("?/dpo_jax/launched/*/pid"):
        if not (pid.parent / "exit_code").exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("case", CASES)
def test_dry_run_prints_the_stored_commands_and_runs_none(cloud, case):
    done = cloud.call(*CASES[case], DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.replace(cloud.git("rev-parse", "HEAD").strip(), "COMMIT")
    stored = GOLDEN / f"{case}.txt"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        stored.write_text(printed)
    assert printed == stored.read_text()
    assert cloud.calls == []


@pytest.mark.parametrize(("capacity", "flag"), [("spot", "--spot"), ("reserved", "--reserved"), ("on-demand", "")])
def test_capacity_becomes_its_flag(cloud, capacity, flag):
    cloud.set(CAPACITY=capacity)
    command = cloud.call("create.sh", DRY_RUN="1").stdout.splitlines()[0]
    assert re.findall(r"--(?:spot|reserved|guaranteed)\S*|--on\S*", command) == [flag] * bool(flag)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROJECT", ""),
        ("ZONE", "us-west4"),
        ("NAME", "Dpo_1"),
        ("TYPE", "tpu7x-8"),
        ("RUNTIME", ""),
        ("CAPACITY", "cheap"),
        ("NFS", "10.0.0.2"),
        ("MOUNT", "mnt"),
        ("RUNS", "/home/me/runs"),
        ("RUN_ID", "../other"),
        ("COMMAND", "eval"),
        ("PYTHON", "3.10"),
        ("COORDINATOR_PORT", "auto"),
        ("STOP_SECONDS", "0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(cloud, name, value):
    cloud.set(**{name: value})
    done = cloud.call("stop.sh")
    assert done.returncode == 2
    shown = value or "''"
    assert re.fullmatch(rf"launch: {name}: {re.escape(shown)} cannot be used: .+\n", done.stderr), done.stderr
    assert cloud.calls == []


def test_a_bucket_is_no_place_for_runs(cloud):
    cloud.set(NFS="", RUNS="gs://bucket/runs")
    done = cloud.call("run.sh", "configs/a.yaml")
    assert done.returncode == 2
    assert "RUNS: gs://bucket/runs cannot be used: an absolute path that every worker sees" in done.stderr


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
        (["run.sh", "--loss.beta", "1"], {}, "CONFIG"),
        (["status.sh"], {"LAUNCH_ENV": "/no/such/env.sh"}, "LAUNCH_ENV"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(cloud, words, env, name):
    done = cloud.call(*words, **env)
    assert done.returncode == 2
    assert re.fullmatch(rf"launch: {name}: .+ cannot be used: .+\n", done.stderr), done.stderr
    assert cloud.calls == []


def test_create_waits_through_the_queue_and_a_failed_question(cloud):
    (cloud.root / "states").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    (cloud.root / "exits").write_text("0\n1\n1\n")
    done = cloud.call("create.sh")
    assert (done.returncode, done.stdout.split()) == (0, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert done.stderr.count("again in") == 2
    assert sum(" create " in call for call in cloud.calls) == 1


def test_create_says_when_the_request_is_lost(cloud):
    (cloud.root / "states").write_text("PROVISIONING\nSUSPENDED\n")
    done = cloud.call("create.sh", "wait")
    assert (done.returncode, done.stdout.split()) == (1, ["PROVISIONING", "SUSPENDED"])
    assert "launch/delete.sh" in done.stderr
    assert not any(" create " in call for call in cloud.calls)


def test_a_refused_request_is_not_repeated(cloud):
    (cloud.root / "exits").write_text("1\n")  # no quota, say
    assert cloud.call("create.sh").returncode == 1
    assert len(cloud.calls) == 1


def test_sync_sends_the_commit_and_refuses_what_is_not_committed(cloud):
    (cloud.root / "exits").write_text("255\n")  # the first copy fails
    done = cloud.call("sync.sh")
    commit = cloud.git("rev-parse", "HEAD").strip()
    assert (done.returncode, done.stdout.split()) == (0, [commit])
    trees = [cloud.root / worker / "dpo_jax" / "tree" for worker in "01"]
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


def test_a_run_on_two_workers_starts_once_and_stops_saved(cloud):
    cloud.install()
    cloud.set(NFS="", RUNS=str(cloud.root / "runs"))
    words = ["--data.train", "{path: my 'own' $HOME pairs.jsonl}", "--loss.beta", "0.05"]
    started = cloud.call("run.sh", "configs/a.yaml", *words)
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("first runs, process") == 2
    for worker in "01":
        home = cloud.root / worker
        config = (home / "dpo_jax" / "tree").resolve() / "configs" / "a.yaml"
        own = ["--run.dir", str(cloud.root / "runs" / "first"), "--run.progress", "false"]
        assert (home / "called").read_text().splitlines() == ["auto 8476", "train", str(config), *own, *words]

    pids = [(cloud.root / worker / "dpo_jax/launched/first/pid").read_text() for worker in "01"]
    again = cloud.call("run.sh", "configs/a.yaml", *words)  # as after a lost connection
    assert (again.returncode, again.stdout.count("runs already")) == (0, 2)
    other = cloud.call("run.sh", "configs/a.yaml", "--loss.beta", "0.1")
    assert (other.returncode, other.stderr.count("RUN_ID: first runs with other settings")) == (2, 2)
    assert [(cloud.root / worker / "dpo_jax/launched/first/pid").read_text() for worker in "01"] == pids

    (cloud.root / "runs" / "first").mkdir(parents=True)
    (cloud.root / "runs" / "first" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 12, "loss": 1}\n')
    status = cloud.call("status.sh").stdout
    assert status.count("first runs, process") == status.count('last logged: "step": 12') == 2

    stopped = cloud.call("stop.sh")
    assert (stopped.returncode, stopped.stdout.count("first ended, exit code 42")) == (0, 2)
    assert cloud.call("logs.sh").stdout.split() == ["saved"]
    assert cloud.call("logs.sh", "all").stdout.split() == ["saved", "saved"]
    assert cloud.call("stop.sh").stdout.count("exit code 42") == 2  # nothing left to stop
    assert cloud.call("run.sh", "configs/a.yaml", "--loss.beta", "0.1").stdout.count("first runs, process") == 2


def test_a_run_that_cannot_start_says_why(cloud):
    cloud.install()
    missing = cloud.call("run.sh", "configs/b.yaml")
    assert (missing.returncode, missing.stderr.count("CONFIG: configs/b.yaml is not in the tree")) == (2, 2)

    refused = cloud.call("run.sh", "configs/a.yaml", "--no_such_option", "1")
    assert (refused.returncode, refused.stdout.count("dpo-jax: error: no_such_option")) == (2, 2)

    cloud.git("commit", "--allow-empty", "-qm", "b")
    assert cloud.call("sync.sh").returncode == 0
    stale = cloud.call("run.sh", "configs/a.yaml")
    assert (stale.returncode, stale.stderr.count("what was sent last is not installed: launch/setup.sh")) == (2, 2)


def test_packages_are_not_exchanged_under_a_run(cloud):
    cloud.install()
    assert cloud.call("run.sh", "configs/a.yaml").returncode == 0
    done = cloud.call("setup.sh")
    assert (done.returncode, done.stderr.count("RUN_ID: first runs here: launch/stop.sh first")) == (2, 2)


def test_delete_asks_for_the_name(cloud):
    for answer in ("", "y\n", "other\n"):
        done = cloud.call("delete.sh", given=answer)
        assert done.returncode == 2
        assert "nothing was deleted" in done.stderr
    assert cloud.calls == []
    assert cloud.call("delete.sh", given="dpo\n").returncode == 0
    assert cloud.call("delete.sh", YES="1").returncode == 0
    assert [call.split()[2:4] for call in cloud.calls][:3] == [
        ["queued-resources", "delete"], ["queued-resources", "list"], ["tpu-vm", "list"]]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stay_small(script):
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 120


def test_shellcheck_finds_nothing():
    beside_python = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        assert os.environ.get("CI") != "true", "CI must have the extra [test] installed"
        pytest.skip("shellcheck is missing: pip install '.[test]'")
    files = [*SCRIPTS, ROOT / "launch" / "env.example"]
    done = subprocess.run([shellcheck, *files], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
