"""Trackers: what one of them does, fails at or waits for is nothing to the run and its logs."""

import sys
import threading
from pathlib import Path

import pytest

from dpo_jax.config import RunConfig
from dpo_jax.errors import UserError
from dpo_jax.runs import logs as metrics
from dpo_jax.runs.directory import RunDir, read_json
from dpo_jax.runs.logs import MetricsLog


def logged(tmp_path: Path, monkeypatch, capsys, start, num_steps: int = 3) -> list[str]:
    """What is said of a run whose tracker is made by ``start``; its own logs are whole."""
    monkeypatch.setitem(metrics.TRACKERS, "wandb", start)
    run = RunDir(tmp_path)
    with MetricsLog(run, RunConfig(dir=str(tmp_path), trackers=("wandb",)), writes=True) as log:
        for step in range(num_steps):
            log.metrics(step, {"loss": 0.5})
    assert read_json(run.metrics) == [{"step": step, "loss": 0.5} for step in range(num_steps)]
    return capsys.readouterr().err.splitlines()


def dropped(why: str) -> list[str]:
    return [f"tracker wandb failed: {why}: the run continues without it, and metrics.jsonl has every row"]


def test_a_tracker_gets_every_row_and_its_end(tmp_path, monkeypatch, capsys):
    rows = []
    assert logged(tmp_path, monkeypatch, capsys, lambda run: (lambda *row: rows.append(row), rows.append)) == []
    assert rows == [*((step, {"loss": 0.5}) for step in range(3)), False]


def test_a_tracker_that_cannot_start_is_dropped(tmp_path, monkeypatch, capsys):
    assert logged(tmp_path, monkeypatch, capsys, lambda run: 1 / 0) == dropped("ZeroDivisionError: division by zero")


def test_a_tracker_that_fails_midway_is_dropped_once(tmp_path, monkeypatch, capsys):
    said = logged(tmp_path, monkeypatch, capsys, lambda run: (lambda step, row: 1 / (step - 1), print))
    assert said == dropped("ZeroDivisionError: division by zero")


def test_a_tracker_that_hangs_is_waited_for_no_longer_than_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.05)
    forever = threading.Event()
    hangs = lambda run: (lambda step, row: forever.wait(), print)  # noqa: E731
    assert logged(tmp_path, monkeypatch, capsys, hangs) == dropped("it did not finish within 0.05 s")
    monkeypatch.setattr(metrics, "MAX_QUEUED", 5)
    (tmp_path / "metrics.jsonl").unlink()
    assert logged(tmp_path, monkeypatch, capsys, hangs, num_steps=20) == dropped("5 rows are waiting for it")
    forever.set()


def test_a_package_that_is_missing_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match="wandb is not installed: pip install"):
        MetricsLog(RunDir(tmp_path), RunConfig(dir=str(tmp_path), trackers=("wandb",)), writes=True)
