"""A cloud on this machine, for the scripts of launch/: the settings that they get, and two workers a slice.

A stand-in for gcloud keeps requests and slices as files. A worker is a home directory that goes with its slice, `ssh` a
shell in it, its `python3` a stand-in that installs the trainer: one that does what a plan says, or the real one.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fake_bucket import FakeBucket
from fake_gcloud_storage import GcloudStorage

ROOT = Path(__file__).parents[2]

# gcloud compute tpus KIND VERB ...: the next line of `next/VERB` says what comes of the call, if not what it should:
# a number is its exit code at once; of create also `refuse`, `queue` and `fail`
GCLOUD = r"""#!/usr/bin/env bash
if [[ $1 == storage ]]; then
  exec 3<>"/dev/tcp/127.0.0.1/$STORAGE_PORT"
  printf '%s\n' $(($# - 1)) "${@:2}" >&3
  eval "$(cat <&3)"
fi
printf '%s\n' "$*" >>"$CLOUD/calls"
action=
[[ ! -s $CLOUD/next/$4 ]] || { read -r action <"$CLOUD/next/$4" && sed -i 1d "$CLOUD/next/$4"; }
[[ ! $action =~ ^[1-9] ]] || exit "$action"
say() { printf 'ERROR: (gcloud.%s) %s\n' "$1" "$2" >&2 && exit 1; }
names=("$5") workers=(0 1)
for word in "$@"; do
  case $word in
    --node-count=*) names=() && for ((i = 0; i < ${word#*=}; i++)); do names+=("$5-$i"); done ;;
    --worker=[01]) workers=("${word#*=}") ;;
    --command=*) line=${word#*=} ;;
  esac
done
slices=$CLOUD/slices request=$CLOUD/request
make() { for name in "${names[@]}"; do mkdir -p "$slices/$name"/{0,1} && echo READY >"$slices/$name/state"; done; }
reach() { [[ $(<"$slices/$1/state") == READY ]] || say "$3.$4" "the TPU is in state $(<"$slices/$1/state")"; }
case "$3 $4" in
  *" create")
    [[ $action != refuse ]] || say "$3.create" "RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded"
    [[ ! -e $request && ! -d $slices/$5 ]] || say "$3.create" "ALREADY_EXISTS: Resource '$5' already exists"
    case $action in
      fail) printf '%s\n' WAITING_FOR_RESOURCES FAILED ;;
      queue) printf '%s\n' WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE ;;
      *) echo ACTIVE ;;
    esac >"$request"
    [[ $3 == queued-resources ]] || rm "$request"
    [[ $action == fail ]] || make
    ;;
  "queued-resources describe")
    [[ -e $request ]] || say "$3.$4" "NOT_FOUND: Resource '$5' was not found"
    head -n 1 "$request"
    (($(wc -l <"$request") == 1)) || sed -i 1d "$request"
    ;;
  "tpu-vm describe")
    [[ -d $slices/$5 ]] || say "$3.$4" "NOT_FOUND: Resource '$5' was not found"
    [[ $* == *health* ]] && health=$'\tHEALTHY'
    printf '%s\n' "$(<"$slices/$5/state")${health:-}"
    ;;
  *" delete")
    [[ -e $request || -d $slices/$5 ]] || say "$3.$4" "NOT_FOUND: Resource '$5' was not found"
    for file in "$slices"/*/*/dpo_jax/launched/*/pid; do # a trainer, and the shell that waits for it
      [[ -e $file ]] && group=$(ps -o pgid= -p "$(<"$file")") && kill -KILL -- "-${group// /}"
    done
    rm -rf "$slices" "$request"
    ;;
  "tpu-vm scp")
    name=${6%%:*} && reach "$name" . "$3" "$4"
    for i in "${workers[@]}"; do cp "$5" "$slices/$name/$i/${6#*:}" || exit; done
    ;;
  "tpu-vm ssh")
    reach "$5" . "$3" "$4"
    for i in "${workers[@]}"; do
      home=$slices/$5/$i
      (cd "$home" && PATH=$CLOUD/worker:$PATH HOME=$home exec bash -c "$line") &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do code=0 && wait "$pid" || code=$? && codes+=("$code"); done
    for code in "${codes[@]}"; do ((code == 0)) || exit "$code"; done # as gcloud does: the first worker's
    ;;
esac
"""

PYTHON = r"""#!/usr/bin/env bash
# python3 of a worker: -m pip install, -m uv venv ... DIRECTORY, -m uv pip install
[[ "$2 $3" == "uv venv" ]] || exit 0
bin=${!#}/bin
mkdir -p "$bin" && cp "$CLOUD/trainer" "$bin/dpo-jax"
printf '#!/bin/sh\necho started JAX\n' >"$bin/python"
chmod +x "$bin"/*
"""

HOSTNAME = r"""#!/usr/bin/env bash
slice=${HOME%/*}
printf '%s-w-%s\n' "${slice##*/}" "${HOME##*/}"
"""

# The next line of plan/WORKER says what it does; without one it waits until it is asked to stop. `preempt` takes
# the slices away, this process with them. A run in a bucket has local logs, which the first worker uploads as the real
# trainer does; `end` and `error` upload the last, `ending` has not done all of it, a kill, 137, leaves its lock there.
TRAINER = r"""#!/usr/bin/env bash
shopt -s extglob
slice=${HOME%/*} me=${HOME##*/}
printf '%s\n' "$DPO_JAX_COORDINATOR $JAX_COORDINATOR_PORT" "$@" >"$HOME/called.new"
mv "$HOME/called.new" "$HOME/called"
env -0 >"$HOME/environment"
[[ $1 != doctor ]] || { echo "FAIL  a check: ${SECRET_WORD:-}"; exit 1; }
plan=wait
[[ ! -s $CLOUD/plan/$me ]] || { read -r plan <"$CLOUD/plan/$me" && sed -i 1d "$CLOUD/plan/$me"; }
echo "${slice##*/}/$me ${SECRET_WORD:-}" >>"$CLOUD/starts"
[[ $* != *no_such_option* ]] || { echo "dpo-jax: error: no_such_option" >&2; exit 2; }
[[ "$*" =~ --run.dir\ ([^ ]+) ]] && run=${BASH_REMATCH[1]} url=
if [[ $run == gs://* ]]; then
  url=$run run=$HOME/.cache/dpo_jax/runs/$(printf %s "$url" | sha256sum | head -c 16)-$me
  rm -rf "$run"
fi
mkdir -p "$run/checkpoints"
stored() { [[ -z $url || ${slice##*/}/$me != dpo?(-0)/0 ]] || "$CLOUD/bin/gcloud" storage "$@"; }
push() { for log in "$run"/*.jsonl; do stored cp "$log" "$url/${log##*/}"; done; }
log() { printf '{"event": "%s", "time": %s.5, "pid": 1%s}\n' "$1" "$EPOCHSECONDS" "${2:-}" >>"$run/events.jsonl"; }
end() { log "$@" && push && stored rm "$url/run.lock"; }
error() { end error ", \"exit_code\": $1, \"text\": \"this is \\\"planned\\\"\""; }
for name in metrics events; do
  touch "$run/$name.jsonl"
  stored cat "$url/$name.jsonl" >>"$run/$name.jsonl" 2>/dev/null
done
echo "process $$ on $(hostname)" >"$HOME/lock" && stored cp "$HOME/lock" "$url/run.lock"
log start
trap 'sleep 0.1; echo saved; end preempt; exit 42' TERM
for word in $plan; do
  case $word in
    step=*) printf '{"step": %s, "loss": 1}\n' "${word#*=}" >>"$run/metrics.jsonl" ;;
    save=*)
      mkdir -p "$run/checkpoints/${word#*=}"
      push && stored cp "$HOME/lock" "$url/checkpoints/${word#*=}/commit_success.txt"
      ;;
    pause=*) sleep "${word#*=}" ;;
    exit=*)
      code=${word#*=} && echo "exit code $code is planned"
      case $code in
        0) end end ;;
        42) end preempt ;;
        137) ;;
        *) error "$code" ;;
      esac
      exit "$code"
      ;;
    end) end end ;;
    ending) log end && push ;;
    error=*) error "${word#*=}" ;;
    deaf) trap '' TERM ;;
    preempt)
      for state in "$CLOUD"/slices/*/state; do echo PREEMPTED >"$state"; done
      echo SUSPENDED >"$CLOUD/request"
      kill -KILL 0
      ;;
    wait) while :; do sleep 0.05; done ;;
  esac
done
"""

QUICK = {
    "POLL_SECONDS": "0.1", "RETRY_SECONDS": "0", "WATCH_SECONDS": "0", "HALT_SECONDS": "1", "BACKOFF_SECONDS": "0",
}  # fmt: skip


@dataclass
class Cloud:
    """A checkout of its own, a gcloud and a bucket of its own; use it as a context manager."""

    root: Path
    storage: FakeBucket = field(init=False)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Cloud":
        self.storage = self._open.enter_context(FakeBucket("bucket"))
        self.storage.bucket_fields["location"] = "US-WEST4"  # of the example's zone
        self._storage_port = self._open.enter_context(GcloudStorage(self.storage)).port
        return self

    def __exit__(self, *error) -> None:
        self.clean()
        self._open.close()

    @property
    def repo(self) -> Path:
        """What sync.sh sends."""
        return self.root / "repo"

    @property
    def runs(self) -> Path:
        """What the workers share, if they do."""
        return self.root / "runs"

    def home(self, worker: int, slice_name: str = "dpo") -> Path:
        """A worker's own disk."""
        return self.root / "slices" / slice_name / str(worker)

    def environment(self, **more: str) -> dict[str, str]:
        """Nothing of this process's environment but the path."""
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        clean = {"PATH": path, "HOME": str(self.root), "TMPDIR": "/tmp", "CLOUD": str(self.root), "LC_ALL": "C",
                 "STORAGE_PORT": str(self._storage_port)}  # fmt: skip
        return clean | QUICK | more

    def call(self, script: str, *args: str, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/."""
        return subprocess.run(["bash", f"launch/{script}", *args], cwd=self.repo, env=self.environment(**env),
                              input=given, check=False, capture_output=True, text=True, timeout=60)  # fmt: skip

    @contextmanager
    def started(self, script: str, *args: str, **env: str) -> Iterator[subprocess.Popen[str]]:
        """A script of launch/ that goes on by itself; what it says goes to the files out and err."""
        with open(self.root / "out", "w") as out, open(self.root / "err", "w") as err:
            command = ["bash", f"launch/{script}", *args]
            process = subprocess.Popen(command, cwd=self.repo, env=self.environment(**env), stdout=out, stderr=err,
                                       text=True)  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(30)

    def said(self) -> str:
        """What a started script said so far, to stdout or stderr."""
        return (self.root / "out").read_text() + (self.root / "err").read_text()

    def set(self, **settings: str) -> None:
        """Change settings in launch/env.sh."""
        with open(self.repo / "launch" / "env.sh", "a") as file:
            file.writelines(f"{name}='{value}'\n" for name, value in settings.items())

    def share(self) -> None:
        """Runs lie on this machine, which all workers see, and in no bucket."""
        self.set(NFS="", RUNS=str(self.runs), RUNS_SHARED="1")

    def plan(self, worker: int, *lines: str) -> None:
        """What the stand-in trainer does on a worker, start by start."""
        (self.root / "plan" / str(worker)).write_text("".join(f"{line}\n" for line in lines))

    def next(self, verb: str, *actions: str) -> None:
        """What comes of the next calls of gcloud with this verb; nothing unusual, if ``-``."""
        (self.root / "next" / verb).write_text("".join(f"{action}\n" for action in actions))

    def install(self) -> None:
        """Make the slices and install the stand-in of the trainer on them."""
        for script in ("create.sh", "sync.sh", "setup.sh"):
            done = self.call(script)
            assert done.returncode == 0, done.stderr

    def git(self, *args: str) -> str:
        """What git says in the checkout."""
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *args], cwd=self.repo, check=True, capture_output=True, text=True).stdout

    @property
    def calls(self) -> list[str]:
        """Arguments of every call of gcloud."""
        return self._lines("calls")

    @property
    def starts(self) -> list[str]:
        """SLICE/WORKER of every start of the stand-in trainer."""
        return [line.split(" ")[0] for line in self._lines("starts")]

    def _lines(self, name: str) -> list[str]:
        path = self.root / name
        return path.read_text().splitlines() if path.exists() else []

    def verbs(self, *wanted: str) -> list[str]:
        """The verbs among these, call by call."""
        return [verb for verb in (call.split()[3] for call in self.calls) if verb in wanted]

    def pids(self) -> list[int]:
        """The trainers that were started and have not ended."""
        started = self.root.glob("slices/*/?/dpo_jax/launched/*/pid")
        return [int(pid.read_text()) for pid in started if not (pid.parent / "exit_code").exists()]

    def preempt(self, number: signal.Signals) -> None:
        """Take the slices away from their trainers: with notice and time to save (SIGTERM), or without (SIGKILL)."""
        pids = self.pids()
        for pid in pids:
            os.kill(pid, number)
        deadline = time.monotonic() + 120
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline, "a trainer did not end"
            time.sleep(0.01)
        for state in self.root.glob("slices/*/state"):
            state.write_text("PREEMPTED\n")
        (self.root / "request").write_text("SUSPENDED\n")

    def clean(self) -> None:
        """End what still runs."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)


def build(root: Path) -> Cloud:
    """A cloud without slices, and a checkout with its settings filled in; still to be opened."""
    cloud = Cloud(root)
    for folder in ("bin", "worker", "next", "plan", "runs", "repo/configs"):
        (root / folder).mkdir(parents=True)
    scripts = {"bin/gcloud": GCLOUD, "worker/python3": PYTHON, "worker/hostname": HOSTNAME, "trainer": TRAINER}
    for name, text in scripts.items():
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    shutil.copytree(ROOT / "launch", cloud.repo / "launch", ignore=shutil.ignore_patterns("env*.sh"))
    (cloud.repo / "configs" / "a.yaml").write_text("loss: {beta: 0.1}\n")
    cloud.git("init", "-q")
    cloud.git("add", ".")
    cloud.git("commit", "-qm", "a")
    for name in ("env", "env.multislice"):
        example = (cloud.repo / "launch" / f"{name}.example").read_text()
        settings = example.replace("PROJECT=my-project", "PROJECT=a-project").replace("gs://my-bucket", "gs://bucket")
        (cloud.repo / "launch" / f"{name}.sh").write_text(settings)
    return cloud
