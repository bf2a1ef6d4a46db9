"""Files that stay readable wherever the process that writes them is killed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_jax.storage import (
    InUse,
    append_line,
    drop_torn_line,
    ends_line,
    list_files,
    lock,
    read_lines,
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
