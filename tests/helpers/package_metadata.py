"""Metadata of packages that are not installed."""

from pathlib import Path


def install_metadata(folder: Path, name: str, version: str, *requirements: str) -> None:
    """Write what pip would, but no code; it counts once the folder is on ``sys.path``."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requirements]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
