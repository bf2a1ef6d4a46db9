"""Whole runs in a bucket, killed at any point and started on an empty disk: they come to what a local run does."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from fake_bucket import FakeBucket
from hastened import hastened_command
from runs import called, ended, num_lines, started, started_jointly, write_config

STEPS = 9
URL = "gs://bucket/runs/one"
FOLDER = "runs/one"
SAME = ("metrics.jsonl", "distributions.jsonl", "export/model.safetensors", "export/config.json")


@pytest.fixture
def fake():
    """A storage of this test alone, as the processes that it starts each have clients of their own."""
    with FakeBucket("bucket") as fake:
        yield fake


@pytest.fixture
def config(shared, tmp_path):
    """A short run: 2 pairs a step, saved every 4 steps, with an export and a report."""
    return write_config(
        tmp_path / "config.yaml",
        {
            "model": {"path": str(shared / "models" / "stories260K")},
            "data": {"train": {"path": str(shared / "reference_curves" / "pairs.jsonl"), "limit": 40},
                     "eval_fraction": 0.1, "max_length": 96, "workers": 1},
            "optimizer": {"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 3},
            "batch": {"pairs": 2},
            "run": {"dir": URL, "steps": STEPS, "eval_every": 6, "progress": False, "export": True},
            "checkpoint": {"every": 4},
        },
    )  # fmt: skip


@pytest.fixture
def inputs(shared, fake) -> list[str]:
    """Options that name the same model and data in the bucket."""
    for path in (*(shared / "models" / "stories260K").iterdir(), shared / "reference_curves" / "pairs.jsonl"):
        fake.put("bucket", f"inputs/{path.name}", path.read_bytes())
    return ["--model.path", "gs://bucket/inputs", "--data.train.0.path", "gs://bucket/inputs/pairs.jsonl"]


class Disks:
    """Empty disks, one a start, for runs in one bucket."""

    def __init__(self, fake: FakeBucket, folder: Path):
        self.fake, self.folder, self.count = fake, folder, 0

    def env(self, process: int = 0) -> dict[str, str]:
        """Variables of a process of the present start."""
        return {**self.fake.env, "XDG_CACHE_HOME": str(self.folder / f"disk-{self.count}-{process}")}

    def new(self) -> dict[str, str]:
        """Variables of a start on a disk of its own."""
        self.count += 1
        return self.env()

    def lines(self) -> int:
        """Lines of metrics.jsonl on the present disk."""
        return sum(num_lines(path) for path in self.folder.glob(f"disk-{self.count}-0/dpo_jax/runs/*/metrics.jsonl"))


def asked(fake: FakeBucket, ending: str) -> bool:
    """Whether somebody wrote an object whose name ends so, or tries to."""
    return any(request.kind == "write" and request.name.endswith(ending) for request in list(fake.requests))


def stalled(fake: FakeBucket, disks: Disks, name: str):
    """The writing of this object never ends, and comes to nothing."""
    fake.fail(0, kind="write", name=name, delay=10_000)
    return lambda: asked(fake, name)


MOMENTS = {
    "tokenizing or compiling": lambda fake, disks: lambda: asked(fake, "run.lock"),
    "before the first save": lambda fake, disks: lambda: disks.lines() >= 2,
    "in a save": lambda fake, disks: stalled(fake, disks, "4/commit_success.txt"),
    "after a save": lambda fake, disks: lambda: asked(fake, "/4/commit_success.txt") and disks.lines() >= 7,
    "in the last save": lambda fake, disks: stalled(fake, disks, f"{STEPS}/state/_METADATA"),
    "in the export": lambda fake, disks: stalled(fake, disks, "export/model.safetensors"),
    "in the report": lambda fake, disks: stalled(fake, disks, "report.html"),
}


def assert_same(fake: FakeBucket, whole: Path) -> None:
    for name in SAME:
        assert fake.data("bucket", f"{FOLDER}/{name}") == (whole / name).read_bytes(), name


def events(fake: FakeBucket, kind: str) -> list[dict]:
    rows = map(json.loads, fake.data("bucket", f"{FOLDER}/events.jsonl").splitlines())
    return [row for row in rows if row["event"] == kind]


def lines_of(said: str) -> list[str]:
    """What a command said, but for tensorstore's line on the token of such a storage."""
    return [line for line in said.splitlines() if "GOOGLE_AUTH_TOKEN_FOR_TESTING" not in line]


def resumed(config: Path, disks: Disks, tmp_path: Path, *options: str) -> tuple[int, list[str]]:
    """Exit code and lines of a start on an empty disk."""
    code, said = ended("train", config, *options, output=tmp_path / "said", env=disks.new())
    return code, lines_of(said)


@pytest.mark.weekly
def test_killed_anywhere_and_started_on_an_empty_disk(config, fake, tmp_path):
    whole, disks, chance = tmp_path / "whole", Disks(fake, tmp_path), random.Random(5)
    assert ended("train", config, "--run.dir", whole, output=tmp_path / "said") == (0, "")
    for moment in MOMENTS.values():
        fake.requests.clear()
        with started("train", config, output=tmp_path / "said", env=disks.new()) as running:
            running.wait_for(moment(fake, disks))
            time.sleep(0 if fake.faults else chance.random())
            running.kill()
        fake.faults.clear()
    assert resumed(config, disks, tmp_path) == (0, [])
    assert_same(fake, whole)
    assert f"{FOLDER}/report.html" in fake.names("bucket")
    assert not [name for name in fake.names("bucket") if ".damaged" in name or "run.lock" in name or ".probe" in name]
    restored = {event["step"] for event in events(fake, "restore")}
    assert restored >= {4, STEPS}
    assert ended("export", URL, tmp_path / "exported", output=tmp_path / "said", env=disks.new())[0] == 0
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (whole / SAME[2]).read_bytes()


@pytest.mark.slow
def test_stopped_and_started_elsewhere(config, inputs, fake, tmp_path):
    """Model and data are in the bucket, too; those of the whole run are on the disk."""
    whole, disks = tmp_path / "whole", Disks(fake, tmp_path)
    assert ended("train", config, "--run.dir", whole, output=tmp_path / "said") == (0, "")
    with started("train", config, *inputs, output=tmp_path / "said", env=disks.new()) as running:
        running.wait_for(lambda: disks.lines() >= 3)
        code, said = ended("train", config, output=tmp_path / "second", env=disks.env())  # of the same disk
        assert (code, said.count("\n")) == (2, 1)
        assert f"run.dir: {URL} is in use by process {running.process.pid} on " in said
        running.send(signal.SIGTERM)
        assert running.code() == 42
    assert f"{URL}: stopped after step" in running.said()
    (stopped,) = events(fake, "preempt")
    assert resumed(config, disks, tmp_path, *inputs) == (0, [])
    assert events(fake, "restore")[-1]["step"] == stopped["step"]
    assert_same(fake, whole)
    assert None not in {r.span for r in fake.requests if r.kind == "read" and r.name == "inputs/model.safetensors"}


@pytest.mark.weekly
def test_two_processes_one_killed_and_then_both(config, fake, tmp_path):
    whole, disks = tmp_path / "whole", Disks(fake, tmp_path)
    jointly = ("train", config, "--batch.pairs", "8")
    with started_jointly(2, *jointly, "--run.dir", whole, "--data.store", tmp_path / "store", folder=tmp_path) as both:
        assert [process.code() for process in both] == [0, 0], both[0].said()
    for moment, victims in (("before the first save", [1]), ("in a save", [0, 1])):
        disks.new()
        with started_jointly(2, *jointly, folder=tmp_path, env=disks.env) as both:
            both[0].wait_for(MOMENTS[moment](fake, disks))
            for victim in victims:
                both[victim].kill()
        fake.faults.clear()
        fake.requests.clear()
    disks.new()
    with started_jointly(2, *jointly, folder=tmp_path, env=disks.env) as both:
        assert [process.code() for process in both] == [0, 0], both[0].said() + both[1].said()
    assert_same(fake, whole)


def hastened(config, fake, disks, tmp_path, *options: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a run whose clients have little patience."""
    argv = ["train", str(config), *options]
    with called(hastened_command, argv, output=tmp_path / "said", env={**disks.new(), **env}) as running:
        return running.code(), running.said()


FAULTS = {  # exit code, what is said, status, requests, and how many
    "a save is not answered": (0, "training continues", 503, f"{FOLDER}/checkpoints/4/.*_METADATA", 40),
    "logs before a save are not answered": (0, "training continues", 429, f"{FOLDER}/metrics", 12),
    "the last save is not answered": (0, "trying again", 503, f"checkpoints/{STEPS}/.*_METADATA", 20),
    "all connections are dropped": (0, "", 0, "", 5),
    "nor the last save ever": (1, "storage does not answer", 503, f"checkpoints/{STEPS}/.*_METADATA", 1e9),
}


@pytest.mark.weekly
def test_what_comes_of_storage_that_fails(config, fake, tmp_path):
    whole, disks = tmp_path / "whole", Disks(fake, tmp_path)
    assert ended("train", config, "--run.dir", whole, output=tmp_path / "said") == (0, "")
    for case, (code, text, status, name, times) in FAULTS.items():
        fake.objects.clear()
        fake.faults.clear()
        fake.fail(status, kind="write", name=name, times=times)
        actual, said = hastened(config, fake, disks, tmp_path)
        assert actual == code, (case, said)
        assert text in said, (case, said)
        assert "Traceback" not in said, (case, said)
        fake.faults.clear()
        if code:
            assert hastened(config, fake, disks, tmp_path)[0] == 0, case
        assert_same(fake, whole)
        assert not [name for name in fake.names("bucket") if ".damaged" in name], case


@pytest.mark.weekly
def test_no_credentials(config, fake, tmp_path):
    env = {"STORAGE_EMULATOR_HOST": "", "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)}
    code, said = hastened(config, fake, Disks(fake, tmp_path), tmp_path, **env)
    assert (code, said.count("\n")) == (2, 1)
    assert f"run.dir: {URL}: cannot connect: no credentials: run gcloud auth" in said
