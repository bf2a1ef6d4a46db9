"""Where rows come from: files, folders, the Hugging Face hub, TFDS. Every source is a sequence of dicts, read lazily.

The libraries that only some sources need are imported when such a source is opened.
"""

import hashlib
import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_jax.config import SourceConfig
from dpo_jax.errors import UserError

if TYPE_CHECKING:
    import datasets


class Rows(Sequence):
    """The first `size` rows of a source, with columns renamed (our name -> theirs); each is read when asked for."""

    def __init__(self, rows: Any, columns: Mapping[str, str], size: int):
        self.rows, self.columns, self.size = rows, columns, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        place = range(self.size)[index]
        if isinstance(place, range):
            return [self[index] for index in place]
        row = self.rows[place]
        theirs = set(self.columns.values())
        kept = {name: value for name, value in row.items() if name not in theirs}
        return kept | {ours: row[name] for ours, name in self.columns.items() if name in row}


def load_rows(source: "SourceConfig | datasets.Dataset") -> Rows:
    """The rows of a source, by index; columns renamed and cut to `limit` as the source says.

    Raises:
        UserError: the source is missing, empty or broken, or an option does not apply to it. A line that is not JSON is
            found when it is read.
    """
    if not isinstance(source, SourceConfig):
        dataset = _plain_dataset(source)
        return Rows(dataset, {}, len(dataset))
    rows = _kind(source).load(source)
    if len(rows) == 0:
        raise UserError(f"{source.path}: it holds no rows; name a source that has some")
    if source.columns:
        seen = {name: None for index in range(min(len(rows), 100)) for name in rows[index]}
        for ours, theirs in source.columns.items():
            if theirs not in seen:
                raise UserError(f"{source.path}: columns: {ours}: there is no {theirs!r}; there are {list(seen)}")
    return Rows(rows, source.columns, min(len(rows), source.limit or len(rows)))


def fingerprint(source: "SourceConfig | datasets.Dataset") -> str:
    """Identity of what ``load_rows`` returns, as hexadecimal digits: equal content, equal digits, wherever it lies.

    Raises:
        UserError: as ``load_rows``.
    """
    if not isinstance(source, SourceConfig):
        parts = [_dataset_identity(_plain_dataset(source))]
    else:
        parts = [_kind(source).identity(source), sorted(source.columns.items()), source.limit]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Kind:
    """One kind of source: how it is opened, what tells its content, which options it heeds."""

    load: Callable[[SourceConfig], Any]  # what has a length and gives rows by index
    identity: Callable[[SourceConfig], list]
    options: tuple[str, ...] = ()


def _kind(source: SourceConfig) -> _Kind:
    name = _kind_name(source.path)
    kind = _KINDS[name]
    defaults = {"split": "train", "name": None, "revision": None, "data_dir": None}
    for option, default in defaults.items():
        given = getattr(source, option)
        if given != default and option not in kind.options:
            raise UserError(f"{source.path}: {option}: {given!r} does not apply to a {name}; leave it out")
    return kind


def _kind_name(path: str) -> str:
    place = Path(path)
    if path.startswith("tfds:"):
        return "TFDS set"
    if place.is_dir():
        return "saved folder" if any((place / name).is_file() for name in _SAVED) else "folder of files"
    suffix = place.suffix.lower()
    if place.exists() or suffix in _SUFFIXES:
        if not place.exists():
            raise UserError(f"{path}: there is no such file; the working directory is {Path.cwd()}")
        if suffix not in _SUFFIXES:
            raise UserError(f"{path}: suffix {suffix!r} is not known; known are {', '.join(_SUFFIXES)}")
        return _SUFFIXES[suffix]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"{path}: there is no such file or folder, and it is no name of a hub set (owner/name)")
    return "hub set"


# ------------------------------------------------------------------------------------------------------------ files


def _file_identity(source: SourceConfig) -> list:
    with open(source.path, "rb") as file:
        return [hashlib.file_digest(file, "sha256").hexdigest()]


def _row(path: str, place: str, text: bytes) -> Mapping:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}, {place}: not JSON: {error}; mend or remove it") from None
    return _object(path, place, row)


def _object(path: str, place: str, row: object) -> Mapping:
    if not isinstance(row, Mapping):
        raise UserError(f"{path}, {place}: a {type(row).__name__}, not an object with columns; mend or remove it")
    return row


class _JsonLines:
    """One object a line; only the places of the lines are held, 8 bytes a row."""

    def __init__(self, path: str):
        self.path, self.starts = path, array("Q")
        start = 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Mapping:
        start = self.starts[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.readline()
            try:
                return _row(self.path, "", line)
            except UserError:
                file.seek(0)
                number = 1 + file.read(start).count(b"\n")
                return _row(self.path, f"line {number}", line)


def _load_json(source: SourceConfig) -> _JsonLines | list[Mapping]:
    with open(source.path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start != b"[":
        return _JsonLines(source.path)
    try:
        rows = json.loads(Path(source.path).read_bytes())
    except ValueError as error:
        raise UserError(f"{source.path}: not JSON: {error}; mend the file") from None
    return [_object(source.path, f"item {index} of its list", row) for index, row in enumerate(rows)]


class _Parquet:
    """Rows of a parquet file; one row group at a time is held in memory."""

    def __init__(self, path: str):
        self.path = path
        metadata = self.file.metadata
        self.ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        self.group: int = -1
        self.table: Any = None

    @cached_property
    def file(self):
        from pyarrow import ArrowInvalid, parquet

        try:
            return parquet.ParquetFile(self.path)
        except (ArrowInvalid, OSError) as error:
            raise UserError(f"{self.path}: not a parquet file: {_first_line(error)}") from None

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Mapping:
        group = bisect_right(self.ends, index)
        if group != self.group:
            self.group, self.table = group, self.file.read_row_group(group)
        start = self.ends[group] - self.table.num_rows
        return self.table.slice(index - start, 1).to_pylist()[0]


# ------------------------------------------------------------------------------------------- Hugging Face datasets


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _plain_dataset(rows: object) -> "datasets.Dataset":
    """The set with rows as plain Python values."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        kind = type(rows).__name__
        raise UserError(f"data: {kind} cannot be used: give a SourceConfig or one split as a datasets.Dataset")
    if len(rows) == 0:
        raise UserError("data: the datasets.Dataset holds no rows; give one that has some")
    return rows if rows.format["type"] in (None, "custom") else rows.with_format(None)


def _dataset_identity(rows: "datasets.Dataset") -> list:
    return [rows._fingerprint]  # the library's only name for a set's content


def _load_saved(source: SourceConfig) -> "datasets.Dataset":
    import datasets

    try:
        saved = datasets.load_from_disk(source.path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source.path}: not a folder of datasets.save_to_disk: {_first_line(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise UserError(f"{source.path}: split: there is no {source.split!r}; there are {sorted(saved)}")
        return saved[source.split].with_format(None)
    if source.split not in ("train", str(saved.split)):
        raise UserError(f"{source.path}: split: {source.split!r}: the folder holds one set, no splits; leave it out")
    return saved.with_format(None)


def _load_hub(source: SourceConfig) -> "datasets.Dataset":
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        what = "this folder of files" if Path(source.path).is_dir() else "no such file or folder here, and the hub set"
        raise UserError(f"{source.path}: {what} cannot be loaded: {_first_line(error)}; check path, name, split "
                        f"{source.split!r} and revision") from None  # fmt: skip


def _identity_of(load: Callable[[SourceConfig], "datasets.Dataset"], source: SourceConfig) -> list:
    return _dataset_identity(load(source))


# ------------------------------------------------------------------------------------------------------------ TFDS


class _Tfds:
    """A TFDS split with bytes as text and a sequence of dicts as a list of dicts."""

    def __init__(self, rows: Sequence, features):
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping:
        return _unrolled(self.features, self.rows[index])


def _unrolled(feature: Any, value: Any) -> Any:
    """TFDS keeps a sequence of dicts as a dict of sequences."""
    import numpy as np
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _unrolled(feature[name], item) for name, item in value.items()}
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.FeaturesDict):
        rows = zip(*value.values(), strict=True)
        return [_unrolled(feature.feature, dict(zip(value, row, strict=True))) for row in rows]
    return _python(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def _python(value: Any) -> Any:
    if isinstance(value, list):
        return [_python(item) for item in value]
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _tfds_builder(source: SourceConfig) -> Any:
    import tensorflow_datasets as tfds

    name = source.path.removeprefix("tfds:")
    try:
        if source.data_dir and (Path(source.data_dir) / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(source.data_dir)
            if builder.info.name != re.split("[:/]", name)[0]:
                raise ValueError(f"{source.data_dir} holds the set {builder.info.name!r}")
        else:
            builder: Any = tfds.builder(name, data_dir=source.data_dir)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{source.path}: TFDS cannot open it: {_first_line(error)}; "
                        f"check the name and data_dir {source.data_dir}") from None  # fmt: skip
    remedy = f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    if not builder.is_prepared():
        raise UserError(f"{source.path}: not prepared in {builder.data_dir}; prepare it with {remedy}")
    kinds = {kind.value for kind in builder.info.available_file_formats()}
    if "array_record" not in kinds:
        raise UserError(f"{source.path}: prepared as {sorted(kinds)}, which has no random access without TensorFlow; "
                        f"prepare it anew, in another data_dir, with {remedy}")  # fmt: skip
    return builder


def _load_tfds(source: SourceConfig) -> _Tfds:
    builder = _tfds_builder(source)
    try:
        rows = builder.as_data_source(source.split, file_format="array_record")
    except ValueError as error:
        raise UserError(f"{source.path}: split: {source.split!r}: {_first_line(error)}") from None
    return _Tfds(rows, builder.info.features)


def _tfds_identity(source: SourceConfig) -> list:
    info = _tfds_builder(source).info
    sizes = [[name, list(split.shard_lengths), int(split.num_bytes)] for name, split in sorted(info.splits.items())]
    return [info.full_name, source.split, sizes]


_KINDS = {
    "file of JSON": _Kind(_load_json, _file_identity),
    "file of JSON lines": _Kind(lambda source: _JsonLines(source.path), _file_identity),
    "parquet file": _Kind(lambda source: _Parquet(source.path), _file_identity),
    "saved folder": _Kind(_load_saved, partial(_identity_of, _load_saved), ("split",)),
    "folder of files": _Kind(_load_hub, partial(_identity_of, _load_hub), ("split", "name")),
    "hub set": _Kind(_load_hub, partial(_identity_of, _load_hub), ("split", "name", "revision")),
    "TFDS set": _Kind(_load_tfds, _tfds_identity, ("split", "data_dir")),
}
_SUFFIXES = {".json": "file of JSON", ".jsonl": "file of JSON lines", ".parquet": "parquet file"}
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # what save_to_disk leaves
