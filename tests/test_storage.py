"""Files that stay readable wherever the process that writes them is killed."""

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax.storage import (
    CLAIM,
    InUse,
    append_line,
    claim,
    drop_torn_line,
    ends_line,
    is_abandoned,
    list_files,
    lock,
    read_lines,
    remove_partial_files,
    sign,
    write_atomically,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    write_atomically(path, b"new", durable=True)

    def full(source, target):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "newer")
    assert path.read_bytes() == b"new"
    assert list_files(tmp_path, "*") == [path]


def test_a_torn_line_is_neither_read_nor_continued(tmp_path):
    path = tmp_path / "log"
    drop_torn_line(path)
    assert (read_lines(path), path.exists()) == ([], False)
    append_line(path, "one")
    with open(path, "a") as file:
        file.write("tw")
    assert read_lines(path) == ["one"]
    assert [ends_line(path, size) for size in (0, 4, 6)] == [True, True, False]
    drop_torn_line(path)
    append_line(path, "three")
    assert path.read_bytes() == b"one\nthree\n"


UNFINISHED = """
import os, signal, sys
from pathlib import Path
from dpo_jax import storage
folder = Path(sys.argv[1])
claimed = storage.claim(folder)
storage.sync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
storage.write_atomically(folder / "file", "x" * 100000, durable=True)
"""


def test_what_a_killed_process_left_is_told_from_work_in_progress(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / ".mine.partial").write_text("no leftover")
    (tmp_path / "sweep.new-4").write_text("no leftover")
    (tmp_path / ".empty.1.partial").touch()  # may be about to be locked
    with claim(tmp_path) as claimed:
        assert not is_abandoned(tmp_path)
        assert claimed.name == str(tmp_path / CLAIM)
    assert is_abandoned(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run([sys.executable, "-c", UNFINISHED, str(tmp_path)], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    (partial,) = tmp_path.glob(".file.*.partial")
    with open(partial) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as if it were still being written
        remove_partial_files(tmp_path)
        assert partial.exists()
    remove_partial_files(tmp_path)
    assert is_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        CLAIM,
        ".empty.1.partial",
        ".mine.partial",
        "file",
        "sweep.new-4",
    ]
    assert (tmp_path / "file").read_text() == "old"
    assert not is_abandoned(tmp_path / "absent")


KEEPS = "import sys; from pathlib import Path; from dpo_jax.storage import lock; lock(Path(sys.argv[1]))"


def test_one_process_keeps_a_lock(tmp_path):
    path = tmp_path / "lock"
    again = [sys.executable, "-c", KEEPS, str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with lock(path) as file:
        sign(file)
        refused = subprocess.run(again, env=environment, check=False, capture_output=True, text=True)
        assert re.search(rf"{InUse.__name__}: process {os.getpid()} on ", refused.stderr)
    subprocess.run(again, env=environment, check=True)
