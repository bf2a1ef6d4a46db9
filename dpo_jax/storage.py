"""Files, written so that a process killed anywhere leaves each of them readable; JSON objects with a checksum.

The only writers there are. They know local paths, raise ``OSError``, and do not know what they write.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dpo_jax.errors import reason

SEAL = "sha256"


class InUse(Exception):
    """Another process holds the lock; the text names that process."""


def write_whole(path: Path, content: str | bytes | memoryview, *, durable: bool = False) -> None:
    """Write a file so that it always holds its old content or its new one, whole; with ``durable`` after a crash too.

    Several processes may write the same path: the last one stays.
    """
    new = path.with_name(f"{path.name}.new-{os.getpid()}")
    try:
        with open(new, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                sync(file)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def append_line(path: Path, text: str) -> None:
    """Append a line in one write: whatever happens, only the last line of a file can lack its end."""
    line = f"{text}\n".encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if (written := os.write(file, line)) != len(line):
            raise OSError(f"only {written} of {len(line)} bytes")
    finally:
        os.close(file)


def read_lines(path: Path) -> list[str]:
    """The lines of a file without those that are empty, and without a last one that lacks its end; no file: none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text[: text.rfind("\n") + 1].split("\n") if line]


def drop_torn_line(path: Path) -> None:
    """Remove a last line that lacks its end, so that the next one starts on a line of its own."""
    if not ends_line(path, file_size(path)):
        cut(path, path.read_bytes().rfind(b"\n") + 1)


def cut(path: Path, size: int) -> None:
    """Shorten a file to its first ``size`` bytes."""
    os.truncate(path, size)


def ends_line(path: Path, size: int) -> bool:
    """Whether the first ``size`` bytes of a file are whole lines."""
    if size == 0:
        return True
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def file_size(path: Path, *, durable: bool = False) -> int:
    """Bytes of a file, 0 without one; with ``durable`` they are on the disk by then."""
    if not path.exists():
        return 0
    if durable:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return path.stat().st_size


def sync(file: IO) -> None:
    """Return when what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def list_files(folder: Path, pattern: str) -> list[Path]:
    """Paths in a folder whose names match, sorted."""
    return sorted(folder.glob(pattern))


def lock(path: Path) -> IO:
    """Keep a file, which then names this process, until what is returned is closed.

    The lock is the operating system's and goes with its process, however that ends.

    Raises:
        InUse: another process keeps it.
    """
    file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by forked workers
    except (BlockingIOError, PermissionError) as error:
        with file:
            file.seek(0)
            raise InUse(file.read().strip() or "another process") from error
    except OSError:
        file.close()
        raise
    with suppress(OSError):  # a full disk: the lock holds without the name
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its checksum added; ``unseal`` gives the content back from its JSON text.

    Args:
        content: JSON values by name, without the name ``SEAL``.
    """
    return {**content, SEAL: _checksum(json.dumps(content, sort_keys=True))}


def unseal(text: bytes) -> dict[str, Any]:
    """The content that was sealed, whatever has happened to its JSON text since.

    Raises:
        ValueError: this is no text of a sealed object, or it was changed.
    """
    try:
        content = json.loads(text)
        checksum = content.pop(SEAL, None) if isinstance(content, dict) else None
        canonical = json.dumps(content, sort_keys=True)
    except Exception as error:  # nested too deeply, half a character, ...
        raise ValueError(f"it is not JSON: {reason(error)}") from error
    if checksum != _checksum(canonical):
        raise ValueError("its checksum is wrong")
    return content


def _checksum(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()
