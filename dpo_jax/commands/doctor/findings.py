"""What a check finds, and how it is shown: a line each, or JSON without secrets for bug reports."""

import getpass
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_jax.errors import UserError, reason

Status = Literal["ok", "warn", "FAIL"]
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASS|_PWD|AUTH|SIGNATURE|CREDENTIAL|KEY", re.IGNORECASE)  # of variables
SECRET_TEXTS = re.compile(
    r"\b(?:hf_|gh[a-z]_|sk-|AKIA|ya29\.|AIza|(?:Bearer|Basic) )[\w.=+/-]+"  # tokens
    r"|(?<=://)[^/@\s]+(?=@)|[\w.+-]+@[\w-]+(?:\.[\w-]+)*"  # passwords in urls, mail addresses
    r"|(?<=\?)[\w.-]+=\S+"  # signatures in urls
)
REPORT = "report it with the output of dpo-jax doctor --json"
MIN_SECRET = 6  # characters; shorter values, such as 1, are no secrets


@dataclass(frozen=True)
class Finding:
    """The result of a check; the text of a fault ends with a remedy."""

    status: Status
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # values for JSON


def ok(text: str, **facts: Any) -> Finding:
    """Return the finding of a check that found no fault."""
    return Finding("ok", text, facts)


def warn(text: str, remedy: str, **facts: Any) -> Finding:
    """Return the finding of something that will not stop a run."""
    return Finding("warn", f"{text}: {remedy}", facts)


def fail(text: str, remedy: str, **facts: Any) -> Finding:
    """Return the finding of a fault that will stop a run."""
    return Finding("FAIL", f"{text}: {remedy}", facts)


def run_check(check: Callable[..., Finding | None], *arguments: Any) -> Finding | None:
    """Run a check; an error, of whatever type, is a fault. None: there is nothing to check here."""
    try:
        return check(*arguments)
    except UserError as error:
        return Finding("FAIL", str(error))
    except ImportError as error:
        return fail(reason(error), "pip install --force-reinstall dpo_jax")
    except Exception as error:  # noqa: BLE001 (a fault of one check must not hide the findings of the others)
        return fail(f"the check ended with {reason(error)}", REPORT)


def as_line(name: str, finding: Finding, width: int) -> str:
    """Return a finding as one line; ``width``: that of the longest name."""
    return f"{finding.status:<4}  {name:<{width}}  {' '.join(finding.text.split())}"


def as_json(findings: Mapping[str, Finding]) -> dict[str, Any]:
    """Return the findings as a JSON tree without secrets."""
    return {
        name: {"status": finding.status, "text": redacted(finding.text), "facts": _plain(finding.facts)}
        for name, finding in findings.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def redacted(text: str) -> str:
    """Return a text without tokens, addresses, home directory and user name."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= MIN_SECRET:
            text = text.replace(value, "REMOVED")
    text, home = SECRET_TEXTS.sub("REMOVED", text), str(Path.home())
    text = text if home == "/" else text.replace(home, "~")
    return re.sub(rf"(?<=/){re.escape(_user())}(?=/|\b)", "USER", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of a container whose user has no name
        return "nobody"


def size_text(num_bytes: float) -> str:
    """Return a size for people."""
    units = ("KiB", "MiB", "GiB", "TiB")
    power = next(power for power in range(1, 5) if num_bytes < 1000 * 2 ** (10 * power) or power == len(units))
    return f"{num_bytes / 2 ** (10 * power):.3g} {units[power - 1]}"
