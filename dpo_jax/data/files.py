"""Read the rows of a file as a sequence of dicts: parquet, or JSON, JSON lines and CSV, optionally compressed.

Uncompressed files other than parquet are read with the standard library alone.
"""

import csv
import hashlib
import io
import shutil
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from dpo_jax.data.values import read_json
from dpo_jax.errors import UserError, from_outside

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # suffix -> pyarrow's codec name


def file_suffix(path: str) -> str:
    """Return the suffix of a file's format without that of its compression: `.jsonl` for `pairs.jsonl.gz`."""
    name = Path(path.lower())
    inner_suffix = name.with_suffix("").suffix
    return inner_suffix if name.suffix in CODECS and inner_suffix != ".parquet" else name.suffix


def file_hash(path: str) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with from_outside(path, "it must be a readable file"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_binary(path: str) -> BinaryIO:
    """Open a file as a seekable binary stream; a compressed file is decompressed into a temporary file."""
    codec = CODECS.get(Path(path.lower()).suffix)
    if codec is None:
        with from_outside(path, "it must be a readable file"):
            return open(path, "rb")
    import pyarrow as pa

    with ExitStack() as stack:
        decompressed_file = stack.enter_context(tempfile.TemporaryFile())
        remedy = f"replace the file if it is damaged, or free space in {tempfile.gettempdir()} to decompress it"
        with from_outside(path, remedy), pa.input_stream(path, compression=codec) as stream:
            shutil.copyfileobj(stream, decompressed_file)
        decompressed_file.seek(0)
        stack.pop_all()
    return decompressed_file


def _parse_row(path: str, position: str, text: bytes) -> Mapping:
    try:
        row = read_json(text)
    except ValueError as error:
        raise UserError(f"{path}, {position}: not JSON: {error}; fix or remove this row") from None
    return _check_object(path, position, row)


def _check_object(path: str, position: str, row: object) -> Mapping:
    if not isinstance(row, Mapping):
        raise UserError(f"{path}, {position}: got {type(row).__name__}, expected a JSON object; fix or remove this row")
    return row


class JsonLines:
    """Rows of a file with one JSON object per line; blank lines are skipped.

    Only line offsets are kept in memory, 8 bytes per row; lines are parsed on access.

    Raises:
        UserError: the file cannot be read. Accessing a line that is not JSON raises it later.
    """

    def __init__(self, path: str, file: BinaryIO | None = None):
        self.path, self.starts, self.file = path, array("Q"), file or _open_binary(path)
        weakref.finalize(self, self.file.close)
        start = 0
        for line in self.file:
            if line.strip():
                self.starts.append(start)
            start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Mapping:
        start = self.starts[index]
        self.file.seek(start)
        line = self.file.readline()
        try:
            return _parse_row(self.path, "", line)
        except UserError:
            self.file.seek(0)
            line_number = 1 + self.file.read(start).count(b"\n")
            return _parse_row(self.path, f"line {line_number}", line)


def load_json(path: str) -> Any:
    """Load rows from a JSON list of objects, or from one JSON object per line.

    Raises:
        UserError: the file cannot be read, or is neither.
    """
    file = _open_binary(path)
    is_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    file.seek(0)
    if not is_list:
        return JsonLines(path, file)
    with file:
        try:
            rows = read_json(file.read())
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}; fix the file") from None
    return [_check_object(path, f"item {index} of the list", row) for index, row in enumerate(rows)]


def load_csv(path: str) -> list[Mapping]:
    """Load CSV rows as text; the first line names the columns. Cells with commas, quotes or newlines must be quoted.

    Raises:
        UserError: the file cannot be read, two columns share a name, or a row has more or fewer cells than columns.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB per cell is too small for some conversations
    with _open_binary(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        with from_outside(path, "it must be UTF-8 text with commas between cells"):
            lines = [(reader.line_num, cells) for cells in reader if cells]
    column_names = lines[0][1] if lines else []
    if len(set(column_names)) != len(column_names):
        raise UserError(f"{path}: two columns have the same name: {column_names}; rename one")
    for number, cells in lines:
        if len(cells) != len(column_names):
            problem = f"{len(cells)} cells, but the first line names {len(column_names)} columns"
            raise UserError(f"{path}, line {number}: {problem}; fix or remove this line")
    return [dict(zip(column_names, cells, strict=True)) for _, cells in lines[1:]]


class Parquet:
    """Rows of a parquet file; keeps one row group at a time in memory.

    Raises:
        UserError: the file is not parquet, or two columns have the same name.
    """

    def __init__(self, path: str):
        from pyarrow import parquet

        with from_outside(path, "it must be a readable parquet file"):
            self.file = parquet.ParquetFile(path)
            metadata, names = self.file.metadata, self.file.schema_arrow.names
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if len(set(names)) != len(names):
            raise UserError(f"{path}: two columns have the same name: {names}; rename one")
        self.path, self.ends = path, list(accumulate(sizes))
        self.group: int = -1
        self.table: Any = None

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Mapping:
        group = bisect_right(self.ends, index)
        with from_outside(f"{self.path}, row {index}", "fix or remove it"):
            if group != self.group:
                self.group, self.table = group, self.file.read_row_group(group)
            start = self.ends[group] - self.table.num_rows
            return self.table.slice(index - start, 1).to_pylist()[0]
