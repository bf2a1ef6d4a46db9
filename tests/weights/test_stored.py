"""Tensors that hold several parameters, or that have their inputs first."""

import numpy as np
import pytest

from dpo_jax.weights.safetensors import read_header, write_file
from dpo_jax.weights.stored import Part, Stored

# name -> (groups, transposed); three parts of 4, 2 and 2 rows and 3 inputs, the second with its inputs first
LAYOUTS = {"rows": (1, False), "grouped": (2, False), "transposed": (1, True), "grouped and transposed": (2, True)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_of_a_tensor_are_read_and_joined(name, tmp_path):
    groups, transposed = LAYOUTS[name]
    query, key, value = (np.random.default_rng(i).normal(size=(rows, 3)) for i, rows in enumerate((4, 2, 2)))
    parts = (
        Part(leaf="query", index=(0,), shape=(2, 2, 3), rows=4),
        Part(leaf="key", index=(0,), shape=(3, 2), rows=2, inputs_first=True),
        Part(leaf="value", index=(0,), shape=(2, 3), rows=2),
    )
    stored = Stored(parts=parts, inputs=(3,), groups=groups, transposed=transposed)
    slices = [query.reshape(2, 2, 3), key.T, value]
    rows = [query, key, value] if groups == 1 else [query[:2], key[:1], value[:1], query[2:], key[1:], value[1:]]
    expected = np.concatenate(rows).T if transposed else np.concatenate(rows)

    tensor = stored.join(slices)
    np.testing.assert_array_equal(tensor, expected)
    assert tensor.shape == stored.shape
    write_file(tmp_path / "file", {"x": tensor.shape}, np.dtype(np.float64), iter([("x", tensor)]))
    file_tensor = read_header(tmp_path / "file")["x"]
    for part, expected_slice in zip(parts, slices, strict=True):
        np.testing.assert_array_equal(stored.read(file_tensor, part), expected_slice)


def test_experts_of_an_adapter_are_the_last_of_its_inputs(tmp_path):
    """Row by row of the outputs, the first column of every expert's matrix, then the second of every one."""
    up, down = (np.random.default_rng(i).normal(size=(4, rows, 3)) for i, rows in enumerate((6, 2)))
    parts = tuple(
        Part(leaf=leaf, index=(0,), shape=x.shape, rows=x.shape[1], experts_last=True)
        for leaf, x in (("up", up), ("down", down))
    )
    stored = Stored(parts=parts, inputs=(12,), groups=2)
    tensor = stored.join([up, down])
    assert tensor[0].tolist() == [up[e, 0, r] for r in range(3) for e in range(4)]
    assert tensor[3].tolist() == [down[e, 0, r] for r in range(3) for e in range(4)]
    write_file(tmp_path / "file", {"x": tensor.shape}, np.dtype(np.float64), iter([("x", tensor)]))
    for part, expected in zip(parts, (up, down), strict=True):
        np.testing.assert_array_equal(stored.read(read_header(tmp_path / "file")["x"], part), expected)


def test_rows_of_a_fused_tensor_are_read_without_the_others(tmp_path):
    parts = tuple(Part(leaf=str(i), index=(), shape=(2,), rows=2) for i in range(3))
    stored, reads = Stored(parts=parts), []
    write_file(tmp_path / "file", {"x": (6,)}, np.dtype(np.float32), iter([("x", np.arange(6.0))]))

    class Recorded:
        def read(self, rows: slice) -> np.ndarray:
            reads.append((rows.start, rows.stop))
            return read_header(tmp_path / "file")["x"].read(rows)

    assert [stored.read(Recorded(), part).tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]  # type: ignore
    assert reads == [(0, 2), (2, 4), (4, 6)]
