"""Read and write safetensors files tensor by tensor, so that a model is never in memory as a whole.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes:
https://huggingface.co/docs/safetensors/index#format. The safetensors library validates the header; tensors are read
with plain reads, since pages of the library's memory map count as process memory until the file is closed.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import ml_dtypes
import numpy as np
from safetensors import safe_open

from dpo_jax.bucket_cache import RemoteFile, referenced_object
from dpo_jax.errors import UserError, from_outside, shown
from dpo_jax.weights.hub import read_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
MAX_ELEMENTS = 2**60  # a tensor without elements may name such dims, which NumPy cannot index
MAX_HEADER_BYTES = 10**8  # that the library accepts
COPY_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Tensor:
    """Location, type and shape of one tensor in a file."""

    path: Path
    name: str
    code: str
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    end: int
    remote: RemoteFile | None = None  # the object in a bucket that the file refers to

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Read the tensor, or some rows of its first dim, in the file's dtype.

        Raises:
            UserError: the dtype is not in `DTYPES`, as in quantized files.
        """
        if self.code not in DTYPES:
            remedy = f"supported are {', '.join(DTYPES)}; use a version of the model that is not quantized"
            raise UserError(f"{self.path}: tensor {self.name} has type {self.code}, which cannot be used: {remedy}")
        dtype = DTYPES[self.code]
        length, *row_shape = self.shape or (1,)
        first, last, _ = rows.indices(length)
        row_bytes = math.prod(row_shape) * dtype.itemsize
        data = self.read_bytes(first * row_bytes, last * row_bytes)
        return data.view(dtype).reshape((last - first, *row_shape) if self.shape else ())

    def at(self, index: int) -> "Tensor":
        """Return the entry at ``index`` of the first dim, as a tensor of its own."""
        size = (self.end - self.start) // self.shape[0]
        start = self.start + index * size
        return replace(self, shape=self.shape[1:], start=start, end=start + size)

    def read_bytes(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Read the tensor's bytes, or some of them, whatever its dtype."""
        num_bytes = (self.end - self.start if last is None else last) - first
        if self.remote is not None:
            return np.frombuffer(self.remote.read(self.start + first, self.start + first + num_bytes), np.uint8)
        with from_outside(f"{self.path}: tensor {self.name}", COPY_AGAIN), self.path.open("rb") as file:
            file.seek(self.start + first)
            return np.fromfile(file, np.uint8, num_bytes)


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the location, type and shape of each tensor in a file, by name.

    Raises:
        UserError: the safetensors library rejects the file.
    """
    remote = referenced_object(path)
    with ExitStack() as stack:
        header_path = stack.enter_context(_file_with_header(path, remote))
        with from_outside(f"{path}: this is not an intact safetensors file", COPY_AGAIN):
            with safe_open(header_path, "numpy"):  # checks that types, shapes and offsets cover the file exactly
                pass
            with header_path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if not isinstance(entry, dict):  # the library also accepts a list of the three values, which nobody writes
            raise UserError(f"{path}: the header entry of {name} must be an object, got {shown(entry)}; {COPY_AGAIN}")
        if math.prod(filter(None, entry["shape"])) >= MAX_ELEMENTS:
            raise UserError(f"{path}: tensor {name} has shape {entry['shape']}, too large for any array; {COPY_AGAIN}")
        start, end = entry["data_offsets"]
        location = {"start": 8 + length + start, "end": 8 + length + end, "remote": remote}
        tensors[name] = Tensor(path, name, entry["dtype"], tuple(entry["shape"]), **location)
    return tensors


@contextmanager
def _file_with_header(path: Path, remote: RemoteFile | None) -> Iterator[Path]:
    """Context manager that yields ``path``, or for an object a sparse file of its size that has only its header."""
    if remote is None:
        yield path
        return
    length = int.from_bytes(remote.read(0, min(8, remote.size)), "little")
    header = remote.read(0, min(8 + length, 8 + MAX_HEADER_BYTES, remote.size))
    with ExitStack() as stack:
        with from_outside(f"{remote.url}: its header cannot be written to {tempfile.gettempdir()}", "free space there"):
            file = stack.enter_context(tempfile.NamedTemporaryFile())
            file.write(header)
            file.truncate(remote.size)
        yield Path(file.name)


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """Find a model directory's tensors: in its single file or else in the files of its index, as transformers does.

    Raises:
        UserError: there are no safetensors files, a file of the index is missing, or a tensor is not in the file that
            the index names or is in two files.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
            remedy = "convert them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            raise UserError(f"{folder}: the weights are PyTorch pickles, which can run code when read; {remedy}")
        raise UserError(f"{folder}: contains neither {WEIGHTS} nor {INDEX}; give a directory with a model's weights")
    files = _read_index(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                conflict = f"{tensors[name].path.name} and {file} both contain {name}"
                raise UserError(f"{folder}: {conflict}; save or download the model into an empty directory")
            tensors[name] = tensor
    for name, file in files.items():
        if name not in tensors or tensors[name].path != folder / file:
            raise UserError(f"{folder}: {INDEX} lists tensor {name} in {file}, which lacks it; download both again")
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor in the index."""
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder / INDEX}: weight_map", files, f"it must name the file of each tensor; {COPY_AGAIN}")
    for tensor, file in files.items():
        if not isinstance(file, str) or PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            remedy = f"it must name a file in this directory; {COPY_AGAIN}"
            raise UserError(f"{folder / INDEX}: weight_map.{tensor}", file, remedy)
        if not os.path.isfile(folder / file):  # unlike Path.is_file, returns False for a name that no file can have
            raise UserError(f"{folder}: {shown(file)}, which {INDEX} names, is missing; copy or download it")
    return files


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Write tensors of one dtype as the iterator yields them, in the order of ``shapes``."""

    def contents() -> Iterator[np.ndarray]:
        for (name, tensor), (expected, shape) in zip(tensors, shapes.items(), strict=True):
            assert (name, tensor.shape) == (expected, shape)
            yield np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8)

    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    _write(path, {name: (CODES[dtype], shape, sizes[name]) for name, shape in shapes.items()}, contents())


def copy_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from other files, of any dtype, byte for byte."""
    entries = {name: (tensor.code, tensor.shape, tensor.end - tensor.start) for name, tensor in tensors.items()}
    _write(path, entries, (tensor.read_bytes() for tensor in tensors.values()))


def _write(path: Path, entries: Mapping[str, tuple[str, tuple[int, ...], int]], contents: Iterator[np.ndarray]) -> None:
    """Write a file of tensors, each given as (dtype, shape, number of bytes)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires the framework
    start = 0
    for name, (code, shape, size) in entries.items():
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # align the tensors to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for content in contents:
            file.write(content.data)
