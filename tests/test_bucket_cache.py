"""Files of a bucket in the cache: what is read at once, and in which order it comes."""

import threading
from functools import partial

import pytest

from dpo_jax import bucket_cache
from dpo_jax.bucket_cache import RemoteFile, read_ahead


def test_small_reads_are_made_at_once_and_come_in_order():
    all_three = threading.Barrier(3, timeout=60)

    def read(i: int) -> int:
        all_three.wait()
        return i

    assert list(read_ahead((10, partial(read, i)) for i in range(9))) == list(range(9))


def test_reads_ahead_hold_a_bounded_number_of_bytes(monkeypatch):
    monkeypatch.setattr(bucket_cache, "AHEAD_BYTES", 30)
    sizes, given, taken = [10, 10, 40, 20, 5, 10, 10], [], []

    def reads():
        for i, size in enumerate(sizes):
            given.append(size)
            yield size, partial(int, i)

    for result in read_ahead(reads()):
        held = given[len(taken) : -1]  # the last one is not begun before there is room for it
        assert sum(held) <= 30 or len(held) == 1
        taken.append(result)
    assert taken == list(range(len(sizes)))


def test_a_read_that_fails_raises_in_its_turn():
    results = read_ahead([(1, lambda: "first"), (1, lambda: 1 / 0), (1, lambda: "third")])
    assert next(results) == "first"
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_large_range_is_read_in_blocks(storage, monkeypatch):
    data = bytes(range(256)) * 4
    blob = storage.put("bucket", "file", data)
    monkeypatch.setattr(bucket_cache, "BLOCK_BYTES", 100)
    file = RemoteFile("gs://bucket/file", blob.generation, len(data))
    assert file.read(7, 512) == data[7:512]
    spans = {request.span for request in storage.requests if request.kind == "read"}
    assert spans == {f"{first}-{min(first + 99, 511)}" for first in range(7, 512, 100)}
    assert file.read(5, 5) == b""
