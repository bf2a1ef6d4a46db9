"""Write files so that each stays readable if the process is killed at any point, and seal JSON with a checksum.

The functions take local paths, raise ``OSError`` and know nothing about what they write.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from dpo_jax.errors import reason

SEAL = "sha256"
CLAIM = ".claim"
BLOCK_BYTES = 2**22  # read at a time


class InUse(Exception):
    """Raised if another process holds a lock; the text names that process."""


def write_atomically(path: Path, content: str | bytes | memoryview, *, durable: bool = False) -> None:
    """Write a file atomically: readers see its complete old or new content, also after a crash if ``durable``.

    Several processes may write the same path: the last write wins.
    """
    temporary = partial_file(path)
    try:
        with open(temporary, "wb") as file:
            _lock_for_writing(file)
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                sync(file)
            file.flush()
            os.replace(temporary, path)  # while it is locked, so that nobody takes it for a leftover
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def partial_file(path: Path) -> Path:
    """Return the path at which this process writes a file before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def append_line(path: Path, text: str) -> None:
    """Append a line in a single write, so that after a crash at most the last line of the file is incomplete."""
    line = f"{text}\n".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if (num_written := os.write(descriptor, line)) != len(line):
            raise OSError(f"wrote only {num_written} of {len(line)} bytes")
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a file, ignoring an unterminated last line; an empty list if there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text[: text.rfind("\n") + 1].split("\n") if line]


def drop_torn_line(path: Path) -> None:
    """Remove an unterminated last line, so that the next append starts on a new line."""
    if not ends_line(path, file_size(path)):
        truncate(path, path.read_bytes().rfind(b"\n") + 1)


def truncate(path: Path, size: int) -> None:
    """Truncate a file to its first ``size`` bytes."""
    os.truncate(path, size)


def ends_line(path: Path, size: int) -> bool:
    """Return whether the first ``size`` bytes of a file end with a complete line."""
    if size == 0:
        return True
    with open(path, "rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def file_size(path: Path, *, durable: bool = False) -> int:
    """Return the size of a file in bytes, 0 if it does not exist; with ``durable``, flush it to disk first."""
    if not path.exists():
        return 0
    if durable:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return path.stat().st_size


def hash_start(path: Path, size: int) -> str:
    """Return the hexadecimal sha256 of the first ``size`` bytes of a file, or of no bytes if it does not exist."""
    digest = hashlib.sha256()
    if path.exists():
        with open(path, "rb") as file:
            while size > 0 and (block := file.read(min(size, BLOCK_BYTES))):
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()


def sync(file: IO) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def expanded(path: str | Path) -> Path:
    """Return a path with the home directory in place of ``~``; one of an unknown user is left as it is."""
    return Path(os.path.expanduser(path))


def list_files(folder: Path, pattern: str) -> list[Path]:
    """Return the sorted paths in a folder whose names match a glob pattern."""
    return sorted(folder.glob(pattern))


def local_copy(kind: str, url: str, process: int = 0) -> Path:
    """Return this machine's folder for files of a process that belong to a ``url``, such as a run's in a bucket."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return Path(cache) / "dpo_jax" / kind / f"{name}-{process}"


def lock(path: Path) -> IO:
    """Lock a file, to which `sign` may then write; closing the returned file releases the lock.

    The operating system releases the lock when the process ends, for whatever reason.

    Raises:
        InUse: another process holds the lock.
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
    return file


def sign(file: IO) -> None:
    """Write the name of this process into a file that it has locked, so that other processes can report it."""
    file.truncate(0)
    os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def claim(folder: Path) -> IO:
    """Mark a temporary folder as in use until the returned file is closed, or the process ends; see `is_abandoned`."""
    file = open(folder / CLAIM, "w")  # noqa: SIM115 (the caller closes it)
    _lock_for_writing(file)
    file.write("claimed\n")
    file.flush()
    return file


def is_abandoned(folder: Path) -> bool:
    """Return whether the process that claimed a folder has ended, so that the folder may be removed."""
    return _is_leftover(folder / CLAIM)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed calls of `write_atomically` left behind in a folder."""
    for path in list_files(folder, ".*.partial"):
        if re.fullmatch(r"\..+\.\d+\.partial", path.name) and path.is_file() and _is_leftover(path):
            path.unlink(missing_ok=True)


def _lock_for_writing(file: IO) -> None:
    """Lock a new, empty file until it is closed; unlike lockf, flock also keeps out other threads."""
    with suppress(OSError):  # of file systems without locks, where nothing counts as a leftover
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_leftover(path: Path) -> bool:
    """Return whether the process that wrote a file has ended; False for an empty file, not locked yet perhaps."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.fstat(file.fileno()).st_size > 0
    except OSError:
        return False


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum added under the reserved key ``SEAL``; ``unseal`` reverses this."""
    return {**content, SEAL: _checksum(json.dumps(content, sort_keys=True))}


def unseal(text: bytes) -> dict[str, Any]:
    """Parse the JSON text of a sealed object, verify its checksum and return the content.

    Raises:
        ValueError: the text is not a sealed JSON object, or its content was changed.
    """
    try:
        content = json.loads(text)
        checksum = content.pop(SEAL, None) if isinstance(content, dict) else None
        canonical = json.dumps(content, sort_keys=True)
    except Exception as error:  # nested too deeply, a lone surrogate, ...
        raise ValueError(f"not JSON: {reason(error)}") from error
    if checksum != _checksum(canonical):
        raise ValueError("checksum mismatch")
    return content


def check_fields(content: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check that an object, such as one that `unseal` returned, has at least these fields, of these types.

    Raises:
        ValueError: a field is absent or has another type.
    """
    for name, kind in types.items():
        if name not in content:
            raise ValueError(f"it has no {name}")
        if not isinstance(content[name], kind):
            raise ValueError(f"its {name} has the wrong type, {type(content[name]).__name__}")


def check_entries(entries: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Check that every value of an object is itself an object with these fields; see `check_fields`."""
    check_fields(entries, dict.fromkeys(entries, dict))
    for entry in entries.values():
        check_fields(entry, types)


def _checksum(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()
