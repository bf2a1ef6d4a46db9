"""What ``doctor`` finds on a machine and its devices, what it prints, and the command itself."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from package_metadata import install_metadata
from runs import free_port
from small_tokenizer import make_tokenizer

from dpo_jax.commands.doctor import devices, machine, rates
from dpo_jax.commands.doctor.devices import compare_clocks, device_checks
from dpo_jax.commands.doctor.doctor import examine_all, with_estimate
from dpo_jax.commands.doctor.findings import Finding, as_json, as_line, ok, redacted, run_check
from dpo_jax.config import DPOConfig
from dpo_jax.config.file import parse_config

ROOT = Path(__file__).parents[2]


# The machine


@pytest.mark.parametrize(
    ("package", "version", "remedy"),
    [("jaxlib", "0.9.0",
      r"jaxlib 0.9.0 is incompatible with jax \S+, which requires (\S+): pip install 'jaxlib(\S+)'"),
     ("libtpu", "0.0.1",
      r"libtpu 0.0.1 is incompatible with jax \S+, which requires (\S+): pip install 'libtpu(\S+)'")],
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
    finding = run_check(devices.processes)
    assert finding is not None
    assert finding.status == "FAIL"
    text = f"process 1 timed out after 1 s waiting for process 0 of 2 at localhost:{port}: start every process"
    assert finding.text.startswith(text)


def test_a_jax_that_cannot_be_imported(monkeypatch):
    assert devices.import_jax() is None
    monkeypatch.setitem(sys.modules, "jax", None)
    finding = devices.import_jax()
    assert finding is not None
    assert finding.status == "FAIL"
    assert finding.text.startswith("jax cannot be imported (")
    assert finding.text.endswith("): pip install --force-reinstall jax jaxlib")


def test_a_single_process_has_no_others():
    assert devices.processes() is None
    assert devices.clocks() is None


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
    chosen = devices.devices()
    assert (chosen.status, chosen.text) == (
        "warn", "a GPU is attached, but JAX_PLATFORMS is cpu: unset it to use the device"
    )  # fmt: skip
    monkeypatch.delenv("JAX_PLATFORMS")
    text = "a GPU is attached, but JAX uses the CPU: pip install 'dpo_jax[cuda]'"
    assert (devices.devices().status, devices.devices().text) == ("FAIL", text)


def test_the_devices_of_this_machine():
    finding = devices.devices()
    assert (finding.status, finding.text) == ("ok", "8 x cpu (cpu)")
    expected = {"platform": "cpu", "kind": "cpu", "devices": 8, "local_devices": 8, "memory": None}
    assert finding.facts == expected


def test_a_step_is_compiled_and_its_loss_known(monkeypatch):
    assert devices.step().facts["loss"] == pytest.approx(0.6931472, abs=1e-6)
    monkeypatch.setattr(devices, "EXPECTED_LOSS", 0.7)
    assert devices.step().status == "FAIL"


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
        finding = check()
        assert (finding is not None) == (platform == "accelerator")
        assert finding is None or finding.facts["measured"] > 0


def test_a_trial_save_is_measured_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "SAVED_BYTES", 2**20)
    finding = rates.save(str(tmp_path / "runs" / "one"), ".probe-1")
    assert finding is not None
    assert re.fullmatch(r"1 MiB in \d+\.\d s, \S+ MB/s", finding.text)
    assert list(tmp_path.iterdir()) == []
    rate = finding.facts["bytes_per_second"]
    assert with_estimate(finding, int(20 * rate)).facts["save_seconds"] == pytest.approx(20)


def test_a_trial_save_in_a_bucket_is_removed(storage, monkeypatch):
    monkeypatch.setattr(rates, "SAVED_BYTES", 2**20)
    assert rates.save("gs://bucket/runs/one", ".probe-1") is not None
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

    finding = run_check(check)
    assert finding == Finding(
        "FAIL", "the check ended with ZeroDivisionError: a b: report it with the output of dpo-jax doctor --json"
    )
    assert as_line("data", Finding("ok", "a\nb"), 6) == "ok    data    a b"


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
    assert as_json({"data": ok("", files=[{"/home/alice/x": ["hf_AbC"]}])})["data"]["facts"] == {
        "files": [{"~/x": ["REMOVED"]}]
    }
    monkeypatch.setenv("DB_PASS", "correct horse")
    for secret in (
        "token=abc",
        "X-Sig=0a&b=c",
        "ghp_Ab1",
        "sk-ab1",
        "AKIA01",
        "Basic YTpi",
        "me@here",
        "correct horse",
    ):
        assert redacted(f"a disk-full?{secret} b") == "a disk-full?REMOVED b"
    monkeypatch.setenv("HOME", "/")
    assert redacted("gs://b/c") == "gs://b/c"


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
def test_the_command_on_a_healthy_machine(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "question:", "chosen": "yes", "rejected": "no"}\n')
    (tmp_path / "c.yaml").write_text(
        "model: {path: builtin:tiny, tokenizer: tokenizer}\ndata: {train: pairs.jsonl}\nrun: {dir: runs/one}\n"
    )
    done = command("c.yaml", "--json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["passed"]
    assert {check["status"] for check in report["checks"].values()} == {"ok"}
    assert list(report["checks"])[-2:] == ["step", "save"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "pairs.jsonl", "tokenizer"]


@pytest.mark.slow
def test_a_process_that_the_devices_end_is_a_fault(tmp_path, monkeypatch):
    done = command(folder=tmp_path, JAX_PLATFORMS="tpu", TPU_SKIP_MDS_QUERY="1")
    assert done.returncode == 1
    assert "FAIL  devices         JAX_PLATFORMS is tpu, but JAX finds no device" in done.stdout
    assert done.stderr == "dpo-jax: error: 1 of 4 checks failed: devices\n"
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with device_checks(None) as next_finding:
        findings = [next_finding() for _ in devices.CHECKS]
    (fault,) = [finding for finding in findings if finding is not None]
    assert findings[list(devices.CHECKS).index("devices")] == fault
    assert re.match(r"the process that uses the devices ended with -?\d+ \(.*xla_no_such_flag", fault.text)
