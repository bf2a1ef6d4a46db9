"""The command ``doctor``: run all checks and print what they find."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import dpo_jax
from dpo_jax.commands.doctor import devices, machine
from dpo_jax.commands.doctor.findings import Finding, as_json, as_line, ok, run_check, size_text
from dpo_jax.config import AnyConfig
from dpo_jax.errors import UserError

DEVICE_FACTS = ("platform", "devices", "local_devices", "memory")  # of the check of the devices, that others use
WIDTH = max(map(len, devices.CHECKS))


class ChecksFailed(UserError):
    """Some checks found a fault; each is printed with its remedy."""

    exit_code = 1


def doctor(read_config: Callable[[], AnyConfig] | None, as_object: bool) -> None:
    """Check this machine and, if one is given, a config; print a line for each check, or all as one JSON object.

    ``read_config`` raises ``UserError`` if the config is wrong, which is a finding, too.

    Raises:
        ChecksFailed: a check found a fault.
    """
    findings = {}
    for name, finding in examine_all(read_config):
        findings[name] = finding
        if not as_object:
            print(as_line(name, finding, WIDTH), flush=True)
    failed = [name for name, finding in findings.items() if finding.status == "FAIL"]
    if as_object:
        report = {"dpo_jax": dpo_jax.__version__, "passed": not failed, "checks": as_json(findings)}
        print(json.dumps(report, indent=2))
    if failed:
        raise ChecksFailed(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def examine_all(read_config: Callable[[], AnyConfig] | None) -> Iterator[tuple[str, Finding]]:
    """Yield the name and finding of each check that applies."""
    config: AnyConfig | None = None

    def read() -> Finding | None:
        nonlocal config
        config = None if read_config is None else read_config()
        return None if config is None else ok(f"{type(config).__name__} for {config.run.dir}")

    yield from _run_checks({"config": read, "python": machine.python, "packages": machine.packages})
    with devices.device_checks(None if config is None else config.run.dir) as next_finding:
        early = {name: next_finding() for name in devices.BEFORE_CONFIG}
        yield from _without_skipped(early)
        facts, failed = _facts_of(early["devices"]), set()
        save_bytes = None
        if config is None or early["jax"] is not None:
            yield from _run_checks({"memory": machine.memory})
        else:
            for name, finding in examine_config(config, facts):
                if finding.status == "FAIL":
                    failed.add(name)
                save_bytes = finding.facts.get("save_bytes", save_bytes)
                yield name, finding
        late = {name: next_finding() for name in devices.AFTER_CONFIG}
        if late["save"] is not None and save_bytes is not None:
            late["save"] = with_estimate(late["save"], save_bytes)
        if failed & {"run.dir", "bucket"}:
            del late["save"]  # it failed for the same reason
        yield from _without_skipped(late)


def examine_config(config: AnyConfig, devices_found: Mapping[str, Any]) -> Iterator[tuple[str, Finding]]:
    """Yield the findings on what a config names; ``devices_found``: the facts of the check of the devices."""

    def load() -> None:
        import jax

        from dpo_jax.commands.doctor import inputs  # noqa: F401

        jax.config.update("jax_platforms", "cpu")  # the devices belong to the other process

    fault = run_check(load)
    if fault is not None:
        yield "libraries", fault
        return
    from dpo_jax.commands.doctor.inputs import CHECKS, Job

    job = Job(config, **{name: devices_found[name] for name in DEVICE_FACTS if devices_found})
    yield from _run_checks({name: lambda check=check: check(job) for name, check in CHECKS.items()})


def with_estimate(finding: Finding, save_bytes: int) -> Finding:
    """Add how long a checkpoint of the run takes at the rate that was measured."""
    if "bytes_per_second" not in finding.facts:
        return finding
    seconds = save_bytes / finding.facts["bytes_per_second"]
    estimate = "under 1 s" if seconds < 1 else f"about {seconds:.0f} s"
    text = f"{finding.text}: {estimate} for a checkpoint of {size_text(save_bytes)}"
    return replace(finding, text=text, facts={**finding.facts, "save_seconds": seconds})


def _facts_of(finding: Finding | None) -> Mapping[str, Any]:
    return {} if finding is None or finding.status == "FAIL" else finding.facts


def _run_checks(checks: Mapping[str, Callable[[], Finding | None]]) -> Iterator[tuple[str, Finding]]:
    for name, check in checks.items():
        yield from _without_skipped({name: run_check(check)})


def _without_skipped(findings: Mapping[str, Finding | None]) -> Iterator[tuple[str, Finding]]:
    for name, finding in findings.items():
        if finding is not None:
            yield name, finding
