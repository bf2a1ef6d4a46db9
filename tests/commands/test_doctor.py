"""The command ``doctor``: each planted fault is found and named, with a remedy, and a healthy machine has none."""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from package_metadata import install_metadata
from runs import free_port
from small_tokenizer import make_tokenizer

from dpo_jax import bucket
from dpo_jax.commands.doctor import devices, inputs, machine, rates
from dpo_jax.commands.doctor.devices import compare_clocks, device_checks
from dpo_jax.commands.doctor.doctor import examine_all, examine_config, with_estimate
from dpo_jax.commands.doctor.findings import Finding, as_json, examine, line, ok, redacted
from dpo_jax.config import CheckpointConfig, DataConfig, DPOConfig, MeshConfig, ModelConfig, RunConfig, SourceConfig
from dpo_jax.config.file import parse_config

ROOT = Path(__file__).parents[2]
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
        "run.dir", r"GiB free, but needs \S+ GiB: free space, lower checkpoint.keep, or choose another run.dir",
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
}  # fmt: skip

NEED_DEVICES = ("saves do not fit the disk", "a mesh of other devices")


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
    assert finding == ok(
        "3 first rows of 3 data sets tokenized; not opened: owner/pairs, tfds:pairs", rows=3, causes={}
    )


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
    finding = examine(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == "FAIL"
    assert f"missing rights: {right}" in finding.text
    assert finding.text.endswith(bucket.ROLES)


def test_storage_that_does_not_answer(storage, bucket_job):
    storage.fail(503)
    finding = examine(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == "FAIL"
    assert "storage does not answer" in finding.text


def test_no_credentials(bucket_job, monkeypatch, tmp_path):
    monkeypatch.setattr(bucket, "prepare_clients", bucket.prepare_clients.__wrapped__)
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    finding = examine(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == "FAIL"
    assert finding.text.endswith("no credentials: run gcloud auth application-default login")


@pytest.mark.parametrize(("offset", "status"), [(20.0, "warn"), (-400.0, "FAIL"), (0.5, "ok")])
def test_a_clock_unlike_the_storages(storage, bucket_job, offset, status):
    storage.clock_offset = offset
    finding = examine(inputs.bucket, bucket_job)
    assert finding is not None
    assert finding.status == status
    if status != "ok":
        side = "ahead of" if offset < 0 else "behind"
        expected = (
            rf"this machine's clock is \d+\.\d s {side} the storage's: set the clock: sudo timedatectl set-ntp true"
        )
        assert re.fullmatch(expected, finding.text)


# The machine


@pytest.mark.parametrize(
    ("package", "version", "remedy"),
    [("jaxlib", "0.9.0", r"jaxlib 0.9.0 does not fit jax \S+, which needs (\S+): pip install 'jaxlib(\S+)'"),
     ("libtpu", "0.0.1", r"libtpu 0.0.1 does not fit jax \S+, which needs (\S+): pip install 'libtpu(\S+)'")],
)  # fmt: skip
def test_versions_that_do_not_fit(tmp_path, monkeypatch, package, version, remedy):
    install_metadata(tmp_path, package, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = machine.packages()
    assert finding.status == "FAIL"
    match = re.fullmatch(remedy, finding.text)
    assert match is not None
    assert match[1] == match[2]
    assert finding.facts[package] == version


def test_the_packages_of_this_machine_fit():
    assert machine.packages().status == "ok"
    assert machine.python().status == "ok"


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert machine.python().text.endswith(": install Python 3.11 or newer")


def test_free_memory_is_that_of_the_container(tmp_path):
    assert machine.free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:       100 kB\nMemAvailable:    64 kB\n")
    assert machine.free_memory(tmp_path) == 64 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert machine.free_memory(tmp_path) == 64 * 1024
    for name, text in (("max", "5000\n"), ("current", "3000\n"), ("stat", "anon 9\ninactive_file 1000\n")):
        (group / f"memory.{name}").write_text(text)
    assert machine.free_memory(tmp_path) == 5000 - (3000 - 1000)


def test_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2**29)
    assert machine.memory() == Finding("warn", "512 MiB free: end other programs", {"free": 2**29, "needed": None})


# Processes and devices


def test_a_coordinator_that_nobody_reaches(monkeypatch):
    port = free_port()
    for name, value in (("COORDINATOR", f"localhost:{port}"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"DPO_JAX_{name}", value)
    monkeypatch.setenv("DPO_JAX_START_TIMEOUT", "1")
    finding = examine(devices.processes, None)
    assert finding is not None
    assert finding.status == "FAIL"
    text = f"process 1 timed out after 1 s waiting for process 0 of 2 at localhost:{port}: start every process"
    assert finding.text.startswith(text)


def test_a_single_process_has_no_others():
    assert devices.processes(None) is None
    assert devices.clocks(None) is None


@pytest.mark.parametrize(
    ("times", "text"),
    [([100.0, 100.2, 100.1], None),
     ([100.0, 100.0, 190.0], "the clock of process 2 is 90.0 s ahead of that of the others"),
     ([5.0, 100.0, 100.0], "the clock of process 0 is 95.0 s behind that of the others")],
)  # fmt: skip
def test_clocks_of_hosts_are_compared(times, text):
    finding = compare_clocks(times)
    assert finding.status == ("ok" if text is None else "FAIL")
    assert text is None or finding.text == f"{text}: set the clock: sudo timedatectl set-ntp true"


def test_a_gpu_that_jax_does_not_use(monkeypatch, tmp_path):
    from jax._src import hardware_utils

    monkeypatch.setattr(hardware_utils, "_NVIDIA_GPU_DEVICES", [str(tmp_path)])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    chosen = devices.devices(None)
    assert (chosen.status, chosen.text) == (
        "warn", "a GPU is attached, but JAX_PLATFORMS is cpu: unset it to use the device"
    )  # fmt: skip
    monkeypatch.delenv("JAX_PLATFORMS")
    text = "a GPU is attached, but JAX uses the CPU: pip install 'dpo_jax[cuda]'"
    assert (devices.devices(None).status, devices.devices(None).text) == ("FAIL", text)


def test_the_devices_of_this_machine():
    finding = devices.devices(None)
    assert (finding.status, finding.text) == ("ok", "8 x cpu (cpu)")
    assert finding.facts == {**CPU, "kind": "cpu"}


def test_a_step_is_compiled_and_its_loss_known(monkeypatch):
    assert devices.step(None).facts["loss"] == pytest.approx(0.6931472, abs=1e-6)
    monkeypatch.setattr(devices, "DEFINITE_LOSS", 0.7)
    assert devices.step(None).status == "FAIL"


def test_rates_are_compared_with_what_plan_assumes():
    assert rates.compare_rate(120.0, None, "GB/s") == ok("120 GB/s", measured=120.0, published=None, unit="GB/s")
    assert rates.compare_rate(700.0, 989.5, "TFLOP/s").text == "700 of 990 TFLOP/s (71%); plan assumes all of it"
    assert rates.compare_rate(400.0, 989.5, "TFLOP/s").status == "warn"


@pytest.mark.parametrize("platform", ["accelerator", "cpu"])
def test_products_and_gathers_are_measured_on_accelerators_only(monkeypatch, platform):
    if platform == "accelerator":  # the programs are those of any platform
        monkeypatch.setattr(rates, "is_accelerator", lambda: True)
        monkeypatch.setattr(rates, "MATRIX", 128)
        monkeypatch.setattr(rates, "GATHERED_BYTES", 2**20)
    for check in (rates.matrix_product, rates.all_gather):
        finding = check(None)
        assert (finding is not None) == (platform == "accelerator")
        assert finding is None or finding.facts["measured"] > 0


def test_a_trial_save_is_measured_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "SAVED_BYTES", 2**20)
    finding = rates.save(str(tmp_path / "runs" / "one"))
    assert finding is not None
    assert re.fullmatch(r"1 MiB in \d+\.\d s, \S+ MB/s", finding.text)
    assert list(tmp_path.iterdir()) == []
    rate = finding.facts["bytes_per_second"]
    assert with_estimate(finding, int(20 * rate)).facts["save_seconds"] == pytest.approx(20)


def test_a_trial_save_in_a_bucket_is_removed(storage, monkeypatch):
    monkeypatch.setattr(rates, "SAVED_BYTES", 2**20)
    assert rates.save("gs://bucket/runs/one") is not None
    assert [name for name in storage.names("bucket") if not name.endswith("/")] == []


# What is printed


def test_a_wrong_config_is_a_finding_and_the_machine_is_checked_all_the_same(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {train: pairs.jsonl}\nrun: {dir: runs/x, stepz: 3}\n")
    findings = examine_all(partial(parse_config, path, {}, DPOConfig))
    assert next(findings) == ("config", Finding("FAIL", "run.stepz: unknown option: did you mean run.steps?"))
    assert [next(findings)[0] for _ in range(2)] == ["python", "packages"]
    findings.close()


def test_a_check_that_breaks_is_a_fault_of_one_line():
    def check():
        raise ZeroDivisionError("a\nb")

    finding = examine(check)
    assert finding == Finding(
        "FAIL", "the check ended with ZeroDivisionError: a b: report it with the output of dpo-jax doctor --json"
    )
    assert line("data", Finding("ok", "a\nb"), 6) == "ok    data    a b"


def test_json_has_no_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "1")  # no secret, but a way to switch off
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("LOGNAME", "alice")
    text = "/home/alice/x /scratch/alice/y key 0123456789abcdef, hf_AbC123 at https://u:p@host/a by bob@example.org: 1"
    clean = "~/x /scratch/USER/y key REMOVED, REMOVED at https://REMOVED@host/a by REMOVED: 1"
    assert redacted(text) == clean
    assert as_json({"model": ok(text, path=text, size=1)}) == {
        "model": {"status": "ok", "text": clean, "facts": {"path": clean, "size": 1}}
    }


# The command


def command(*argv: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [sys.executable, "-m", "dpo_jax", "doctor", *argv],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=env,
    )


@pytest.mark.slow
def test_the_command_on_a_healthy_machine(config, tmp_path):
    from dpo_jax.config.file import config_to_yaml

    (tmp_path / "c.yaml").write_text(config_to_yaml(config))
    done = command("c.yaml", "--json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["passed"]
    assert {check["status"] for check in report["checks"].values()} == {"ok"}
    assert list(report["checks"])[-2:] == ["step", "save"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "pairs.jsonl"]


@pytest.mark.slow
def test_a_process_that_the_devices_end_is_a_fault(tmp_path, monkeypatch):
    done = command(folder=tmp_path, JAX_PLATFORMS="tpu", TPU_SKIP_MDS_QUERY="1")
    assert done.returncode == 1
    assert "FAIL  devices         JAX_PLATFORMS is tpu, but JAX finds no device" in done.stdout
    assert done.stderr == "dpo-jax: error: 1 of 4 checks failed: devices\n"
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with device_checks(None) as next_finding:
        findings = [next_finding() for _ in devices.CHECKS]
    assert findings[0] is None
    assert findings[1] is not None
    assert re.match(r"the process that uses the devices ended with -?\d+ \(.*xla_no_such_flag", findings[1].text)
    assert findings[2:] == [None] * 5
