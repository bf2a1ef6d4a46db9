"""Checks of the machine that import no jax, as it may be what is broken: Python, packages, memory, clocks."""

import platform
import re
import sys
from pathlib import Path

from dpo_jax.commands.doctor.findings import Finding, fail, ok, size_text, warn
from dpo_jax.parallel.versions import installed_version, mismatches
from dpo_jax.storage import expanded

MIN_PYTHON = (3, 11)
# Package whose requirements are checked -> its extras that are installed as packages of their own.
CHECKED_PACKAGES = {
    "dpo_jax": (),
    "jax": ("tpu", "cuda12", "cuda13"),
    "jax-cuda12-plugin": (),
    "jax-cuda13-plugin": (),
}
SHOWN_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "orbax-checkpoint",
    "transformers",
)
LITTLE_MEMORY = 2**30  # bytes; importing the program's libraries takes about half of it
SKEW_SECONDS = 5.0, 60.0  # between clocks: logs are out of order; credentials may be refused


def python() -> Finding:
    """Check the version of Python."""
    version = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return fail(f"Python {version}", f"install Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return ok(f"{version} on {platform.system()} {platform.machine()}", python=version, platform=platform.platform())


def packages() -> Finding:
    """Check that the installed versions of jax, jaxlib, libtpu and the other packages fit each other."""
    checked = [name for name in CHECKED_PACKAGES if name == "jax" or installed_version(name)]
    problems = [problem for name in checked for problem in mismatches(name, CHECKED_PACKAGES[name])]
    versions = {name: version for name in SHOWN_PACKAGES if (version := installed_version(name))}
    if problems:
        return Finding("FAIL", "; ".join(problems), versions)
    return ok(", ".join(f"{name} {version}" for name, version in versions.items()), **versions)


def memory(needed: int | None = None) -> Finding | None:
    """Check the free memory of this machine; ``needed``: bytes that a run holds in it at least, if that is known."""
    free = free_memory()
    if free is None:
        return None
    facts = {"free": free, "needed": needed}
    if needed is not None and free < needed:
        text = f"{size_text(free)} free, but weights, gradient, optimizer and reference need {size_text(needed)}"
        return fail(text, "end other programs, set lora.rank, or choose a smaller model", **facts)
    if free < LITTLE_MEMORY:
        return warn(f"{size_text(free)} free", "end other programs", **facts)
    return ok(
        f"{size_text(free)} free" + (f", at least {size_text(needed)} needed" if needed is not None else ""), **facts
    )


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take, also within a container's limit; None if it is not Linux."""
    meminfo, group = root / "proc/meminfo", root / "sys/fs/cgroup"
    if not meminfo.is_file():
        return None
    free = 1024 * _number(r"^MemAvailable:\s+(\d+) kB", meminfo)
    limit = group / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return free
    used = _number(r"^(\d+)", group / "memory.current") - _number(r"^inactive_file (\d+)", group / "memory.stat")
    return min(free, _number(r"^(\d+)", limit) - used)


def _number(pattern: str, path: Path) -> int:
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def closest_folder(path: str | Path) -> Path:
    """Return a path itself, or else the closest one above it that exists."""
    absolute = expanded(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def clock(ahead: float, name: str, reference: str) -> Finding:
    """Compare two clocks, of which the one called ``name`` is ``ahead`` seconds."""
    text = f"{name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {reference}"
    tolerated, limit = SKEW_SECONDS
    if abs(ahead) <= tolerated:
        return ok(text, ahead=ahead)
    return (warn if abs(ahead) <= limit else fail)(text, "set the clock: sudo timedatectl set-ntp true", ahead=ahead)
