"""What ``doctor`` finds in a config: each planted fault of model, data, disk, hub and bucket is named with a remedy."""

import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy
from small_tokenizer import make_tokenizer

from dpo_jax import bucket
from dpo_jax.commands.doctor import inputs, machine
from dpo_jax.commands.doctor.doctor import examine_config
from dpo_jax.commands.doctor.findings import Finding, ok, run_check
from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    DPOConfig,
    JudgeConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    PPOConfig,
    RunConfig,
    SourceConfig,
)
from dpo_jax.models.decoder import count_adapters
from dpo_jax.weights.known import builtin_model
from dpo_jax.weights.open import build_model, find_model

PAIR = {"prompt": "question:", "chosen": "yes", "rejected": "no"}
MESSAGES = {
    "prompt": [{"role": "user", "content": "question"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
CPU = {"platform": "cpu", "devices": 8, "local_devices": 8, "memory": None}  # facts of the check of the devices


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> Path:
    """Folders with a tokenizer: ``right``, ``plain`` without a chat template, ``torn`` whose prompt is no prefix."""
    folder, tokenizer = tmp_path_factory.mktemp("tokenizers"), make_tokenizer()
    torn = tokenizer.chat_template.replace("<assistant>", "<reply>")
    for name, template in (("right", tokenizer.chat_template), ("plain", None), ("torn", torn)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def config(tmp_path, tokenizers) -> DPOConfig:
    """A config without faults."""
    write_rows(tmp_path, PAIR)
    return DPOConfig(
        model=ModelConfig(path="builtin:tiny", tokenizer=str(tokenizers / "right")),
        data=DataConfig(train=(SourceConfig(path=str(tmp_path / "pairs.jsonl")),), max_length=256),
        run=RunConfig(dir=str(tmp_path / "runs" / "one"), export=True),
    )


def write_rows(folder: Path, row: dict) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))


def found(config: DPOConfig, facts=None) -> dict[str, Finding]:
    """What is found without devices, which is cheaper, or with those of the facts."""
    return dict(examine_config(config, facts or {}))


def faults(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.text for name, finding in findings.items() if finding.status != "ok"}


def test_a_right_config_has_no_fault_and_leaves_nothing_behind(config, tmp_path):
    findings = found(config, CPU)
    assert faults(findings) == {}
    assert list(findings) == ["model", "tokenizer", "data", "mesh", "memory", "run.dir", "data.store"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl"]
    weights = 131392 * 4
    saves = 3 * findings["mesh"].facts["save_bytes"]  # two are kept while a third is written
    assert saves == pytest.approx(9 * weights, rel=1e-3)
    assert findings["run.dir"].facts["needed"] == saves + weights
    assert findings["data"].facts["rows"] == 3
    state, gradient, reference = 3 * weights, weights, weights
    assert findings["memory"].facts["needed"] == pytest.approx(state + gradient + reference, rel=1e-3)


def test_adapters_alone_are_saved_and_the_base_is_held_beside_them(config):
    findings = found(replace(config, lora=LoraConfig(rank=4)), CPU | {"devices": 1, "local_devices": 1})
    assert faults(findings) == {}
    adapters = count_adapters(build_model(find_model("builtin:tiny", None), config.model, "cpu", LoraConfig(rank=4)))
    assert findings["mesh"].facts["save_bytes"] == pytest.approx(3 * 4 * adapters, rel=1e-3)
    assert findings["memory"].facts["needed"] == pytest.approx(4 * (4 * adapters + 131392), rel=1e-3)


def test_a_policy_gradient_saves_its_value_model_too(config):
    reward = JudgeConfig(function="judge:score")
    data = replace(config.data, max_length=512)
    sampled = PPOConfig(model=config.model, data=data, run=config.run, reward=reward)
    findings = found(sampled, CPU)
    assert list(findings) == ["model", "tokenizer", "data", "mesh", "memory", "run.dir", "data.store"]
    policy, value = 131392, 131392 + 64
    assert findings["mesh"].facts["save_bytes"] == pytest.approx(3 * 4 * (policy + value), rel=1e-3)


def test_what_is_saved_already_needs_no_more_space(config, tmp_path):
    needed = found(config, CPU)["run.dir"].facts["needed"]
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text("x" * 1000)
    assert found(config, CPU)["run.dir"].facts["needed"] == needed - 1000


# (what is changed in the right config, the check that finds it, what its line says): each another fault
CONFIG_FAULTS = {
    "saves do not fit the disk": (
        lambda c: replace(c, checkpoint=CheckpointConfig(keep=10**9)),
        "run.dir", r"GiB free, but needs \S+ TiB: free space, lower checkpoint.keep, or choose another run.dir",
    ),
    "a directory of others": (
        lambda c: replace(c, run=replace(c.run, dir=str(Path(c.run.dir).parents[1]))),
        "run.dir", "has other files but no run of this program: choose an empty directory",
    ),
    "a file above the run directory": (
        lambda c: replace(c, run=RunConfig(dir=f"{c.data.train[0].path}/run"), data=replace(c.data, store="store")),
        "run.dir", r"run.dir: \S+ cannot be written \(Not a directory\): .* choose another run.dir",
    ),
    "other storage": (
        lambda c: replace(c, run=replace(c.run, dir="s3://bucket/run")),
        "run.dir", "run.dir: s3://bucket/run is neither a local path nor in a bucket of Google",
    ),
    "a store in a file": (
        lambda c: replace(c, data=replace(c.data, store=f"{c.data.train[0].path}/store")),
        "data.store", r"data.store: \S+ cannot be written \(Not a directory\): choose another data.store",
    ),
    "no such model": (
        lambda c: replace(c, model=replace(c.model, path="/nowhere/model")),
        "model", "model.path: /nowhere/model does not exist; give a directory, a hub name or builtin:tiny",
    ),
    "no such reference": (
        lambda c: replace(c, reference=replace(c.reference, path="/nowhere/model")),
        "model", "reference.path: /nowhere/model does not exist",
    ),
    "a model without a tokenizer": (
        lambda c: replace(c, model=ModelConfig(path="builtin:tiny")),
        "tokenizer", "model.tokenizer: builtin:tiny has no tokenizer; give a directory or hub model that has one",
    ),
    "no such data": (
        lambda c: replace(c, data=replace(c.data, train=(SourceConfig(path="nowhere.jsonl"),))),
        "data", "nowhere.jsonl: no such file; the working directory is",
    ),
    "rows too long": (
        lambda c: replace(c, data=replace(c.data, max_length=4)),
        "data", r"none of its first 3 rows is valid \(\d+ tokens, but max_length is 4.*\): fix the data",
    ),
    "a mesh of other devices": (
        lambda c: replace(c, mesh=MeshConfig(fsdp=3)),
        "mesh", "does not use 8 devices: set one axis to -1, or change the sizes",
    ),
    "a mesh for experts": (
        lambda c: replace(c, mesh=MeshConfig(expert=8)),
        "mesh", "mesh.expert: 8 cannot be used: the model has no experts; use mesh.fsdp",
    ),
}  # fmt: skip

NEED_DEVICES = ("saves do not fit the disk", "a mesh of other devices", "a mesh for experts")


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_a_fault_of_the_config_is_named(config, name):
    change, check, text = CONFIG_FAULTS[name]
    problems = faults(found(change(config), CPU if name in NEED_DEVICES else None))
    assert list(problems) == [check]
    assert re.search(text, problems[check])


@pytest.mark.parametrize(
    ("tokenizer", "status", "text"),
    [("right", "ok", "3 rows tokenized, the first of each data set"),
     ("plain", "FAIL", "the tokenizer has no chat template; set data.chat_template to a file with one"),
     ("torn", "warn", "template_not_prefix 3: dpo-jax data lists them")],
)  # fmt: skip
def test_conversations_need_a_template_whose_prompt_is_a_prefix(config, tokenizers, tmp_path, tokenizer, status, text):
    write_rows(tmp_path, MESSAGES)
    finding = found(replace(config, model=replace(config.model, tokenizer=str(tokenizers / tokenizer))))["data"]
    assert finding.status == status
    assert text in finding.text


def test_data_elsewhere_are_not_opened(config):
    sources = (*config.data.train, SourceConfig(path="owner/pairs"), SourceConfig(path="tfds:pairs"))
    finding = found(replace(config, data=replace(config.data, train=sources)))["data"]
    text = "3 rows tokenized, the first of each data set; not opened: owner/pairs, tfds:pairs"
    assert finding == ok(text, rows=3, causes={})


def test_a_model_and_data_in_a_bucket_are_not_downloaded(config, storage, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage.put("bucket", "model/config.json", json.dumps(builtin_model("builtin:tiny")).encode())
    storage.put("bucket", "model/model.safetensors", safetensors.numpy.save({"x": np.zeros(2**20)}))
    storage.put("bucket", "pairs.jsonl", Path(config.data.train[0].path).read_bytes())
    model = replace(config.model, path="gs://bucket/model")
    sources = (*config.data.train, SourceConfig(path="gs://bucket/pairs.jsonl"))
    findings = found(replace(config, model=model, data=replace(config.data, train=sources)))
    assert findings["model"] == ok("gs://bucket/model: 131,392 parameters", parameters=131392)
    text = "3 rows tokenized, the first of each data set; not opened: gs://bucket/pairs.jsonl"
    assert findings["data"] == ok(text, rows=3, causes={})
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 2**20

    storage.put("bucket", "model/model.safetensors", b"torn")
    assert "this is not an intact safetensors file" in faults(found(replace(config, model=model)))["model"]


def test_a_state_larger_than_the_device_or_the_machine(config, monkeypatch):
    accelerator = {"platform": "gpu", "devices": 1, "local_devices": 1, "memory": 2**20}
    text = "each device has 1 MiB, but weights, gradient, optimizer and reference need 2.51 MiB: use more devices"
    assert text in faults(found(config, accelerator))["memory"]
    monkeypatch.setattr(machine, "free_memory", lambda: 2**20)
    assert "1 MiB free, but weights, gradient, optimizer and reference need" in faults(found(config, CPU))["memory"]


def test_without_devices_nothing_is_laid_out(config):
    assert "mesh" not in found(config)


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers every request with the status and error code in ``hub.answer``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = self.server.answer  # type: ignore[attr-defined]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [((403, "GatedRepo"), "accept the terms on the model's page, then run hf auth login or set HF_TOKEN"),
     ((404, "RepoNotFound"), "check the name; if the model is private, run hf auth login or set HF_TOKEN"),
     ((401, "RepoNotFound"), "check the name; if the model is private, run hf auth login or set HF_TOKEN"),
     ((404, "RevisionNotFound"), "correct model.revision")],
    ids=str,
)  # fmt: skip
def test_a_hub_model_without_access(config, hub, answer, remedy):
    hub.answer = answer
    text = faults(found(replace(config, model=replace(config.model, path="owner/model"))))["model"]
    assert text.startswith("model.path: owner/model is not a directory, and its download failed: ")
    assert text.endswith(f": {remedy}")


def test_a_hub_model_without_network(config, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    text = faults(found(replace(config, model=replace(config.model, path="owner/model"))))["model"]
    assert text.endswith(": connect to the hub, unset HF_HUB_OFFLINE, or give a local directory")


@pytest.mark.parametrize(("width", "status"), [(64, "ok"), (10**7, "FAIL")])
def test_weights_on_the_hub_need_room_in_its_cache(config, monkeypatch, tmp_path, width, status):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model, commit = tmp_path / "hub" / "models--owner--model", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    hf_config = builtin_model("builtin:tiny") | {"num_hidden_layers": 10_000, "intermediate_size": width}
    (model / "snapshots" / commit / "config.json").write_text(json.dumps(hf_config))
    finding = found(replace(config, model=replace(config.model, path="owner/model")))["model"]
    assert finding.status == status
    if status == "ok":
        assert finding.text.endswith(" parameters, on the hub, with a token")
    else:
        text = rf"HF_HOME: {tmp_path}/hub has \S+ GiB free, but needs \S+ TiB: free space, set it to a larger disk"
        assert re.fullmatch(text, finding.text)


# The bucket


@pytest.fixture
def bucket_job(config, monkeypatch, tmp_path) -> inputs.Job:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inputs, "BUCKET_PATIENCE", 1.0)
    monkeypatch.setattr(inputs, "TRANSFER_BYTES", 2**20)
    return inputs.Job(replace(config, run=replace(config.run, dir="gs://bucket/runs/one")))


def test_a_bucket_is_written_read_and_left_as_it_was(storage, bucket_job):
    finding = inputs.bucket(bucket_job)
    assert finding is not None
    assert finding.status == "ok"
    assert re.fullmatch(r"gs://bucket/runs/one: all rights, write \S+ MB/s, read \S+ MB/s of one object", finding.text)
    assert storage.names("bucket") == []


@pytest.mark.parametrize(
    ("kind", "right"),
    [("delete", "storage.objects.delete"), ("bucket", "storage.buckets.get"), ("list", "storage.objects.list")],
)  # fmt: skip
def test_a_missing_right_is_named(storage, bucket_job, kind, right):
    storage.fail(403, kind=kind)
    finding = run_check(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == "FAIL"
    assert f"missing rights: {right}" in finding.text
    assert finding.text.endswith(bucket.ROLES)


def test_storage_that_does_not_answer(storage, bucket_job):
    storage.fail(503)
    finding = run_check(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == "FAIL"
    assert "storage does not answer" in finding.text


def test_no_credentials(bucket_job, monkeypatch, tmp_path):
    monkeypatch.setattr(bucket, "prepare_clients", bucket.prepare_clients.__wrapped__)
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    finding = run_check(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == "FAIL"
    assert finding.text.endswith("no credentials: run gcloud auth application-default login")


@pytest.mark.parametrize(("offset", "status"), [(20.0, "warn"), (-400.0, "FAIL"), (0.5, "ok")])
def test_a_clock_unlike_the_storages(storage, bucket_job, offset, status):
    storage.clock_offset = offset
    finding = run_check(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == status
    if status != "ok":
        side = "ahead of" if offset < 0 else "behind"
        expected = (
            rf"this machine's clock is \d+\.\d s {side} the storage's: set the clock: sudo timedatectl set-ntp true"
        )
        assert re.fullmatch(expected, finding.text)
