"""The stand-in for `gcloud storage` says what gcloud says, and a worker that lacks a right says so in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_bucket import FakeBucket
from fake_gcloud_storage import answer

ROOT = Path(__file__).parents[2]
RUN = "gs://bucket/runs/first"
FORMAT = (
    "location,requester_pays,versioning_enabled,soft_delete_policy.retentionDurationSeconds,lifecycle_config.rule.len()"
)
FULL = {
    "location": "US", "billing": {"requesterPays": False}, "softDeletePolicy": {"retentionDurationSeconds": "604800"},
    "lifecycle": {"rule": [{"action": {"type": "Delete"}, "condition": {"age": 3}}]}, "versioning": {"enabled": True},
}  # fmt: skip


@pytest.mark.slow
def test_the_stand_in_for_gcloud_storage_says_what_gcloud_says(tmp_path):
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is missing")
    with FakeBucket("bucket") as storage:
        env = {
            **os.environ, "CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{storage.url}/storage/v1/",
        }  # fmt: skip

        def both(*words: str) -> tuple[int, str, str]:
            done = subprocess.run(["gcloud", "storage", *words], env=env, check=False, capture_output=True, text=True)
            said = done.stderr.split(" This command is unauthenticated")[0].strip()
            expected = answer(storage, list(words))
            assert (done.returncode, done.stdout, said) == (expected.code, expected.out, expected.err.strip())
            return done.returncode, done.stdout, said

        files = [f"{RUN}/{name}" for name in ("events.jsonl", "metrics.jsonl", "run.lock")]
        committed, describe = f"{RUN}/checkpoints/*/commit_success.txt", ["buckets", "describe"]
        assert both("cat", "--range=-20000", *files)[0] == both("ls", committed)[0] == 1  # nothing there
        storage.put("bucket", "runs/first/events.jsonl", b'{"event": "start"}\n' * 2000)
        storage.put("bucket", "runs/first/metrics.jsonl", b"")
        for name in ("5", "10", "10.damaged"):
            storage.put("bucket", f"runs/first/checkpoints/{name}/commit_success.txt", b"x")
        storage.put("bucket", "runs/first/checkpoints/15/state/commit_success.txt", b"x")
        code, out, _ = both("cat", "--range=-20000", *files)
        assert (code, len(out)) == (1, 20000)  # there is no lock
        storage.put("bucket", "runs/first/run.lock", b"process 7 on w-0\n")
        assert both("cat", "--range=-20000", *files)[0] == 0
        assert both("ls", committed)[1].count("\n") == 3
        for words in (["cat", "gs://other/a"], ["ls", "gs://other/*/a"], [*describe, "gs://other"]):
            assert "not found: 404" in both(*words, *(["--format=csv[no-heading](location)"] * (len(words) == 3)))[2]
        for fields in ({}, FULL):
            storage.bucket_fields = fields
            both(*describe, "gs://bucket", f"--format=csv[no-heading]({FORMAT})")
        storage.fail(403)
        for words in (
            ["cat", *files],
            ["ls", committed],
            [*describe, "gs://bucket", "--format=csv[no-heading](location)"],
        ):
            assert "an injected fault" in both(*words)[2]


def test_setup_names_the_rights_that_a_worker_lacks(tmp_path):
    """With the real program, by the line of worker-setup.sh that starts it."""
    python = tmp_path / "dpo_jax" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" != "${{2#*probe}}" ] || exit 0\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with FakeBucket("bucket") as storage:
        env = {**os.environ, **storage.env, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        script = ["bash", ROOT / "launch" / "worker-setup.sh", "check"]

        def checked(run: str) -> tuple[int, str]:
            done = subprocess.run([*script, run], env=env, check=False, capture_output=True, text=True)
            return done.returncode, done.stderr

        assert checked("/mnt/dpo/runs/first") == checked(RUN) == (0, "")
        assert storage.objects == {}
        storage.fail(403, kind="write")
        code, said = checked(RUN)
        assert (code, said.count("\n"), "storage.objects.create" in said) == (2, 1, True), said
        assert said.endswith(": grant roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket\n")
