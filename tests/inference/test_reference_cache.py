"""The reference's cache: computed once for what made it, proven before it is used, continued where it was cut off."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from runs import called
from small_cache import ALL, LOGPS, MADE_BY, NUM_ROWS, Computer, files, in_steps, run, small_store

from dpo_jax.errors import RunStopped
from dpo_jax.inference import reference_cache as refcache
from dpo_jax.inference.reference_cache import cached_logps

BATCH = 3


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """Eight steps, the last one ragged; a part of the cache is two of them."""
    monkeypatch.setattr(refcache, "PART_STEPS", 2)
    return in_steps(small_store(tmp_path), BATCH)


def test_it_is_computed_once(batches):
    first, second = Computer(), Computer()
    assert run(batches, first) == []
    assert [len(steps) for steps in first.calls] == [2, 2, 2, 2]
    assert run(batches, second) == []
    assert second.calls == []
    assert len(files(batches)) == 1


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_build_that_was_cut_off_goes_on(batches, done):
    """Each row is computed once in the two builds together."""
    first, second = Computer(cut_off_after=done), Computer()
    with pytest.raises(KeyboardInterrupt):
        cached_logps(batches, ALL, MADE_BY, first)
    assert len(files(batches, "*.part-*.npz")) == done
    assert run(batches, second) == []
    assert sorted(step for call in first.calls + second.calls for step in call) == list(range(8))
    assert len(files(batches)) == 1


def test_another_batch_size_goes_on_too(batches):
    """Parts hold rows, not steps: rows that are done stay done."""
    with pytest.raises(KeyboardInterrupt):
        cached_logps(batches, ALL, MADE_BY, Computer(cut_off_after=2))  # rows 0 to 11
    second = Computer()
    assert run(in_steps(batches.store, 5), second) == []
    assert second.calls == [[2, 3], [4]]  # step 2 holds rows 10 to 14


def test_only_batches_with_needed_rows_are_computed(batches):
    """A short run, then another, then a long one: each adds what is missing, as one long run would have had it."""
    first, second, third = Computer(), Computer(), Computer()
    found = cached_logps(batches, np.array([1, 2, 19]), MADE_BY, first)
    assert first.calls == [[0, 6]]
    np.testing.assert_array_equal(found["sum"][[0, 1, 2, 18, 19, 20]], LOGPS[[0, 1, 2, 18, 19, 20]])
    assert np.isnan(found["sum"][3:18]).all()
    assert len(files(batches)) == 1
    cached_logps(batches, np.array([2, 4]), MADE_BY, second)
    assert second.calls == [[1]]
    assert len(files(batches)) == 2
    assert run(batches, third) == []
    assert third.calls == [[2, 3], [4, 5], [7]]
    (path,) = files(batches)
    whole = path.read_bytes()
    path.unlink()
    run(batches, Computer())
    assert path.read_bytes() == whole


def test_runs_at_the_same_time_lose_nothing(batches):
    """Two runs that begin with the same row, each of which has not seen what the other writes."""

    class Meanwhile(Computer):
        def __call__(self, batches, steps):
            cached_logps(batches, np.array([0, 8]), MADE_BY, Computer())
            return super().__call__(batches, steps)

    cached_logps(batches, np.array([0, 22]), MADE_BY, Meanwhile())
    last = Computer()
    cached_logps(batches, np.array([0, 8, 22]), MADE_BY, last)
    assert last.calls == []


@pytest.mark.parametrize("is_complete", [True, False])
def test_processes_whose_files_have_other_values_compute_all_rows(batches, monkeypatch, is_complete):
    """Without a shared disk, each process may have files of its own, with the same rows."""
    cached_logps(batches, ALL if is_complete else np.array([0, 5]), MADE_BY, Computer())
    differ = lambda value, *rest: [value, value if value is None else "another"]  # noqa: E731
    monkeypatch.setattr(refcache.hosts, "gather", differ)
    again = Computer()
    assert run(batches, again) == []
    assert sum(map(len, again.calls)) == 8


def test_a_file_of_other_inputs_is_named_only_where_rows_are_missing(batches):
    run(batches, Computer())
    other = MADE_BY | {"weights": "b"}
    needed = np.array([0])
    lines = []
    for _ in range(2):
        cached_logps(batches, needed, other, Computer(), lines.append)
    assert len(lines) == 1


def test_parts_beside_a_complete_file_are_removed(batches):
    run(batches, Computer())
    (path,) = files(batches)
    path.with_suffix(".part-00000000-0.npz").write_bytes(b"written late by another run")
    assert run(batches, Computer()) == []
    assert files(batches) == [path]


DAMAGE = {
    "empty": (lambda good: b"", "truncated or damaged"),
    "one byte": (lambda good: good[:1], "truncated or damaged"),
    "truncated": (lambda good: good[:-10], "truncated or damaged"),
    "half": (lambda good: good[: len(good) // 2], "truncated or damaged"),
    "a bit flipped": (
        lambda good: good.replace(LOGPS.tobytes(), bytes([LOGPS.tobytes()[0] ^ 1]) + LOGPS.tobytes()[1:]),
        "truncated or damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_and_computed_again(batches, name):
    run(batches, Computer())
    (path,) = files(batches)
    good = path.read_bytes()
    damage, reason = DAMAGE[name]
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    again = Computer()
    (line,) = run(batches, again)
    assert str(path) in line
    assert reason in line
    assert len(again.calls) == 4
    assert path.read_bytes() == good


WRONG = {
    "wrong-checksum": (lambda fields: fields | {"sum": fields["sum"] + 1}, "its checksum is wrong"),
    "stale": (
        lambda fields: {k: v[:-1] for k, v in fields.items()},
        "it holds log-probs of shape (22, 2), (22, 2), but the data needs (23, 2)",
    ),
    "half-written": (
        lambda fields: {k: np.where(np.arange(NUM_ROWS)[:, None] < 9, v, np.nan) for k, v in fields.items()},
        "row 9 has a log-prob that is not finite",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_of_other_rows_is_named_and_computed_again(batches, name):
    run(batches, Computer())
    (path,) = files(batches)
    change, reason = WRONG[name]
    with np.load(path) as file:
        fields, about = {k: file[k] for k in file.files if k != "about"}, json.loads(str(file["about"]))
    fields = change(fields)
    if name != "wrong-checksum":
        about["digest"] = refcache._digest(fields)
    np.savez(path, about=json.dumps(about), **fields)
    (line,) = run(batches, Computer())
    assert reason in line


def test_a_cache_of_another_model_is_named_and_left_alone(batches):
    run(batches, Computer())
    (other,) = files(batches)
    (line,) = run(batches, Computer(logps=LOGPS - 1), MADE_BY | {"weights": "b", "dtype": "bfloat16"})
    assert line == f"reference cache: {other} was made with different weights, dtype: recomputing"
    assert len(files(batches)) == 2
    assert run(batches, Computer()) == []


def test_a_file_under_a_wrong_name_is_not_taken(batches):
    run(batches, Computer())
    (path,) = files(batches)
    said = run(batches, Computer(logps=LOGPS - 1), MADE_BY | {"weights": "b"})
    (other,) = set(files(batches)) - {path}
    other.write_bytes(path.read_bytes())
    said = run(batches, Computer(logps=LOGPS - 1), MADE_BY | {"weights": "b"})
    assert any("it was made with different weights" in line for line in said)


def test_a_damaged_part_is_named_and_its_rows_computed_again(batches):
    first = Computer(cut_off_after=3)
    with pytest.raises(KeyboardInterrupt):
        cached_logps(batches, ALL, MADE_BY, first)
    part = files(batches, "*.part-*.npz")[1]
    part.write_bytes(part.read_bytes()[:-10])
    second = Computer()
    (line,) = run(batches, second)
    assert str(part) in line
    assert second.calls == [[2, 3], [6, 7]]


def test_rows_that_are_lost_or_not_finite_stop_the_run(batches):
    class Loses(Computer):
        def __call__(self, batches, steps):
            ids, fields = super().__call__(batches, steps)
            return ids[1:], {name: values[1:] for name, values in fields.items()}

    with pytest.raises(RunStopped, match=r"row 0 was not computed"):
        cached_logps(batches, ALL, MADE_BY, Loses())
    bad = LOGPS.copy()
    bad[4, 1] = np.nan
    with pytest.raises(RunStopped, match=r"log-prob of row 4 is not finite \(1 such rows in total\)"):
        cached_logps(batches, ALL, MADE_BY | {"weights": "c"}, Computer(logps=bad))


class Slow(Computer):
    """Takes its time for each row."""

    def __call__(self, batches, steps):
        time.sleep(0.05)
        return super().__call__(batches, steps)


def build_slowly(folder: Path) -> int:
    refcache.PART_STEPS = 1
    batches = in_steps(small_store(folder), 1)
    print("begin", flush=True)
    cached_logps(batches, ALL, MADE_BY, Slow())
    return 0


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_a_build_killed_by_sigkill_goes_on(batches, monkeypatch, tmp_path, seconds):
    """Wherever it is killed: what it had done is not done again, and each row is there once."""
    with called(build_slowly, tmp_path, output=tmp_path / "said") as child:
        child.wait_for(lambda: (tmp_path / "said").exists() and child.said() == "begin\n")
        time.sleep(seconds)
        child.kill()
    done = len(files(batches, "*.part-*.npz"))
    assert 0 < done < NUM_ROWS
    part = files(batches, "*.part-*.npz")[0]
    part.with_name(f".{part.name}.1.partial").write_bytes(b"killed at it")
    monkeypatch.setattr(refcache, "PART_STEPS", 1)
    second = Computer()
    assert run(in_steps(batches.store, 1), second) == []
    assert second.calls == [[step] for step in range(done, NUM_ROWS)]
    assert not files(batches, "*.part-*")
