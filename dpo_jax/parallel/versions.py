"""Versions of installed packages that must fit each other, read from their metadata, so that none is imported."""

from collections.abc import Collection, Iterator
from importlib import metadata

from packaging.requirements import Requirement


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def mismatches(package: str, extras: Collection[str] = ()) -> list[str]:
    """Return a message for each requirement that is missing or has an unsupported version.

    Each ends with the command that installs it. Requirements of ``extras`` may be missing.
    """
    version = installed_version(package)
    if version is None:
        return [f"{package} is not installed: pip install {package}"]
    problems = {}
    for requirement, is_optional in _requirements(package, extras):
        actual, needed = installed_version(requirement.name), str(requirement.specifier)
        install = f"pip install '{requirement.name}{needed}'"
        if actual is None and not is_optional:
            problems[requirement.name] = f"{package} {version} needs {requirement.name}, which is missing: {install}"
        elif actual is not None and not requirement.specifier.contains(actual, prereleases=True):
            problem = f"{requirement.name} {actual} is incompatible with {package} {version}, which requires {needed}"
            problems.setdefault(requirement.name, f"{problem}: {install}")
    return list(problems.values())


def _requirements(package: str, extras: Collection[str]) -> Iterator[tuple[Requirement, bool]]:
    """Yield the requirements of a package that apply here, and whether they apply for an extra only."""
    for requirement in map(Requirement, metadata.requires(package) or ()):
        marker = requirement.marker
        is_needed = marker is None or marker.evaluate({"extra": ""})
        if is_needed or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement, not is_needed
