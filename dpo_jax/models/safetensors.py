"""The safetensors file format, read and written tensor by tensor, so that no more than one tensor is in memory.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes:
https://huggingface.co/docs/safetensors/index#format. Plain reads are used instead of a memory map, whose pages would
count as the process's memory until the whole file were closed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from dpo_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    path: Path
    name: str
    code: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    end: int

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or rows of its first dim, in the file's type.

        Raises:
            UserError: the type is none of `DTYPES`, as in quantised files.
        """
        if self.code not in DTYPES:
            raise UserError(
                f"{self.path}: tensor {self.name} has type {self.code}, which cannot be used: the types are "
                f"{', '.join(DTYPES)}; take a version of the model that is not quantised"
            )
        dtype = DTYPES[self.code]
        first, last, _ = rows.indices(self.shape[0])
        row_bytes = (self.end - self.start) // self.shape[0]
        with self.path.open("rb") as file:
            file.seek(self.start + first * row_bytes)
            data = np.fromfile(file, np.uint8, (last - first) * row_bytes)
        return data.view(dtype).reshape(last - first, *self.shape[1:])


def read_header(path: Path) -> dict[str, Tensor]:
    """Tensors of one file, by name.

    Raises:
        UserError: the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise UserError(f"{path}: this is no whole safetensors file ({size} bytes); copy or download it again")
        text = file.read(length)
    again = "copy or download it again"
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, 8 + length, **entry) for name, entry in header.items()}
        wrong = [tensor for tensor in tensors.values() if not _fits(tensor)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the safetensors header cannot be read ({error!r}); {again}") from error
    if wrong:
        raise UserError(f"{path}: the size of tensor {wrong[0].name} is not that of its shape and type; {again}")
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise UserError(f"{path}: the file was cut short: its header speaks of {end} bytes and it has {size}; {again}")
    return tensors


def _tensor(path: Path, name: str, base: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    start, end = data_offsets
    return Tensor(path, name, dtype, tuple(shape), base + start, base + end)


def _fits(tensor: Tensor) -> bool:
    dtype = DTYPES.get(tensor.code)
    return dtype is None or tensor.end - tensor.start == math.prod(tensor.shape) * dtype.itemsize


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model directory: one file, or those that its index names.

    Raises:
        UserError: there are no safetensors, a file of the index is missing, or a tensor is not where the index says.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return read_header(folder / SINGLE)
        if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
            raise UserError(f"{folder}: the weights are PyTorch pickles, which can run code when read; convert them: "
                            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)")  # fmt: skip
        raise UserError(f"{folder}: there is neither {SINGLE} nor {INDEX}; give a folder with a model's weights")
    try:
        files = json.loads(index.read_text())["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: the index cannot be read ({error!r}); copy or download it again") from error
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name}, which {INDEX} names, is missing; copy or download it")
    headers = {name: read_header(folder / name) for name in names}
    for tensor, name in files.items():
        if tensor not in headers[name]:
            raise UserError(f"{folder}: {INDEX} puts tensor {tensor} in {name}, which lacks it; download both again")
    return {tensor: headers[name][tensor] for tensor, name in files.items()}


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Write tensors of one type as they come, in the order of ``shapes``."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks which framework it is for
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), (expected, shape) in zip(tensors, shapes.items(), strict=True):
            assert (name, tensor.shape) == (expected, shape)
            file.write(np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8).data)
