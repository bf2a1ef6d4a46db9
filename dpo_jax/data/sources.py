"""Load rows from files, folders, the Hugging Face hub or TFDS as a sequence of dicts, read lazily.

Libraries that only some sources need are imported when such a source is opened.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_jax.bucket import Bucket, is_remote
from dpo_jax.bucket_cache import fetch_data
from dpo_jax.config import SourceConfig
from dpo_jax.data import files
from dpo_jax.errors import UserError, from_outside

if TYPE_CHECKING:
    import datasets


class Rows(Sequence):
    """The first `size` rows of a source, read on access; `columns` maps our column names to the source's names."""

    def __init__(self, rows: Any, columns: Mapping[str, str], size: int):
        self.rows, self.columns, self.size = rows, columns, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        selection = range(self.size)[index]
        if isinstance(selection, range):
            return [self[index] for index in selection]
        row = self.rows[selection]
        renamed_columns = set(self.columns.values())
        other_columns = {name: value for name, value in row.items() if name not in renamed_columns}
        return other_columns | {ours: row[name] for ours, name in self.columns.items() if name in row}


def load_rows(source: "SourceConfig | datasets.Dataset") -> Rows:
    """Open the rows of a source, with its `columns` renamed and at most `limit` rows.

    Raises:
        UserError: the source is missing, empty or broken, or an option does not apply to it. Accessing a line that is
            not JSON raises it later.
    """
    if not isinstance(source, SourceConfig):
        dataset = _plain_dataset(source)
        return Rows(_LibraryRows("data", dataset), {}, len(dataset))
    local = _local(source)
    rows = _kind(local).load(local)
    if len(rows) == 0:
        raise UserError(f"{source.path}: the source has no rows; choose another")
    if source.columns:
        names = {name: None for index in range(min(len(rows), 100)) for name in rows[index]}
        for ours, theirs in source.columns.items():
            if theirs not in names:
                raise UserError(f"{source.path}: columns: {ours}: no column {theirs!r}; available: {list(names)}")
    return Rows(rows, source.columns, min(len(rows), source.limit or len(rows)))


def refuse_missing(source: SourceConfig) -> None:
    """Raise ``UserError`` if the source is a local path that does not exist, or an option does not apply to it."""
    if not is_remote(source.path):
        _kind(source)


def fingerprint(source: "SourceConfig | datasets.Dataset") -> str:
    """Return a hexadecimal hash of the rows that ``load_rows`` returns, which does not depend on the source's path."""
    if not isinstance(source, SourceConfig):
        identity = [_dataset_identity(_plain_dataset(source))]
    else:
        local = _local(source)
        identity = [_kind(local).identity(local), sorted(source.columns.items()), source.limit]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _local(source: SourceConfig) -> SourceConfig:
    """Return the source with the path of a local copy, if it is a file or folder in a bucket."""
    if source.data_dir is not None and is_remote(source.data_dir):
        remedy = "TFDS sets are read from a local disk; copy the directory there"
        raise UserError(f"{source.path}: data_dir", source.data_dir, remedy)
    if not is_remote(source.path):
        return source
    if files.file_suffix(source.path) not in _SUFFIXES and Bucket.named("data", source.path).stat("") is not None:
        raise _unknown_suffix(source.path)  # before it is copied
    return replace(source, path=str(fetch_data("data", source.path)))


@dataclass(frozen=True)
class _Kind:
    """One kind of source: how to open it, how to identify its content, and which options it supports."""

    load: Callable[[SourceConfig], Any]  # returns a sequence of rows, with length and indexing
    identity: Callable[[SourceConfig], list]  # returns JSON values that are equal for equal content
    options: tuple[str, ...] = ()


def _kind(source: SourceConfig) -> _Kind:
    name = kind_of(source.path)
    kind = _KINDS[name]
    for option in ("split", "name", "revision", "data_dir"):
        value = getattr(source, option)
        if value != getattr(SourceConfig, option) and option not in kind.options:
            raise UserError(f"{source.path}: {option}: {value!r} does not apply to a {name}; remove the option")
    return kind


def kind_of(path: str) -> str:
    """Return the kind of the source at a path outside buckets; raise ``UserError`` if there is none."""
    if path.startswith("tfds:"):
        return "TFDS set"
    if os.path.isdir(path):
        is_saved = any(os.path.isfile(os.path.join(path, name)) for name in _SAVED_FILES)
        return "saved folder" if is_saved else "folder of files"
    suffix, exists = files.file_suffix(path), os.path.exists(path)
    if exists or suffix in _SUFFIXES:
        if not exists:
            raise UserError(f"{path}: no such file; the working directory is {Path.cwd()}")
        if suffix not in _SUFFIXES:
            raise _unknown_suffix(path)
        return _SUFFIXES[suffix]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"{path}: no such file or folder, and not the name of a hub dataset (owner/name); correct it")
    return "hub dataset"


def _unknown_suffix(path: str) -> UserError:
    suffixes_text = f"{', '.join(_SUFFIXES)}, all but the last also with {', '.join(files.CODECS)}"
    problem = f"{path}: unknown suffix {files.file_suffix(path)!r}"
    return UserError(f"{problem}; use {suffixes_text}, or give a folder of such files")


class _LibraryRows:
    """Rows that a library decodes on access, passed through ``convert``; its exceptions become ``UserError``."""

    def __init__(self, label: str, rows: Any, convert: Callable[[Any], Mapping] = lambda row: row):
        self.label, self.rows, self.convert = label, rows, convert

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping:
        with from_outside(f"{self.label}, row {index}", "fix or remove it"):
            row = self.rows[index]
        return self.convert(row)


def _plain_dataset(rows: object) -> "datasets.Dataset":
    """Return a data set without a format, so that its rows are plain Python values."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        type_name = type(rows).__name__
        raise UserError(f"data: {type_name} cannot be used: give a SourceConfig or one split as a datasets.Dataset")
    if len(rows) == 0:
        raise UserError("data: the datasets.Dataset has no rows; give another")
    return rows if rows.format["type"] in (None, "custom") else rows.with_format(None)


def _dataset_identity(rows: "datasets.Dataset") -> list:
    return [rows._fingerprint]  # the library has no public identifier of a data set's content


def _load_saved(source: SourceConfig) -> "datasets.Dataset":
    import datasets

    with from_outside(source.path, "it must be a folder written by datasets.save_to_disk"):
        dataset = datasets.load_from_disk(source.path)
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise UserError(f"{source.path}: split: no split {source.split!r}; available: {sorted(dataset)}")
        return dataset[source.split].with_format(None)
    if source.split not in ("train", str(dataset.split)):
        raise UserError(f"{source.path}: split: {source.split!r}: this folder has no splits; remove the option split")
    return dataset.with_format(None)


def _load_hub(source: SourceConfig) -> "datasets.Dataset":
    import datasets

    remedy = f"check path, name, split {source.split!r} and revision"
    with from_outside(f"{source.path}: there is no such file or folder, and the hub dataset cannot be loaded", remedy):
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)


def _load_folder(source: SourceConfig) -> "datasets.Dataset":
    import datasets

    # the library identifies local files by their times only, and could return cached rows of a replaced file
    cache_dir = os.path.join(datasets.config.HF_DATASETS_CACHE, "dpo_jax", _folder_hash(source.path))
    remedy = f"check path, name and split {source.split!r}"
    with from_outside(f"{source.path}: this folder of files cannot be loaded", remedy):
        return datasets.load_dataset(source.path, source.name, split=source.split, cache_dir=cache_dir)


def _folder_hash(path: str) -> str:
    """Return a hexadecimal hash of the names and contents of all files in a folder."""
    paths = sorted(file for file in Path(path).rglob("*") if file.is_file())
    hashes = [[str(file.relative_to(path)), files.file_hash(str(file))] for file in paths]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _dataset_kind(load: Callable[[SourceConfig], "datasets.Dataset"], *options: str) -> _Kind:
    open_rows = lambda source: _LibraryRows(source.path, load(source))  # noqa: E731
    return _Kind(open_rows, lambda source: _dataset_identity(load(source)), options)


def _to_python(feature: Any, value: Any) -> Any:
    """Convert a TFDS value to Python values: bytes to text, a dict of sequences to a list of dicts."""
    import numpy as np
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _to_python(feature[name], item) for name, item in value.items()}
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.FeaturesDict):
        rows = zip(*value.values(), strict=True)
        return [_to_python(feature.feature, dict(zip(value, row, strict=True))) for row in rows]
    return _decode_bytes(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)


def _decode_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode_bytes(item) for item in value]
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _tfds_builder(source: SourceConfig) -> Any:
    import tensorflow_datasets as tfds

    name = source.path.removeprefix("tfds:")
    name_remedy = f"check the name and data_dir {source.data_dir}"
    with from_outside(f"{source.path}: TFDS cannot open it", name_remedy):
        if source.data_dir and os.path.isfile(os.path.join(source.data_dir, "dataset_info.json")):
            builder = tfds.builder_from_directory(source.data_dir)
        else:
            builder: Any = tfds.builder(name, data_dir=source.data_dir)
        is_prepared = builder.is_prepared()
        file_formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if builder.info.name != re.split("[:/]", name)[0]:
        raise UserError(f"{source.path}: {source.data_dir} contains the data set {builder.info.name!r}; {name_remedy}")
    remedy = f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    if not is_prepared:
        raise UserError(f"{source.path}: the data set is not prepared in {builder.data_dir}; prepare it with {remedy}")
    if "array_record" not in file_formats:
        problem = f"the data set is prepared as {sorted(file_formats)}, which cannot be read by row without TensorFlow"
        raise UserError(f"{source.path}: {problem}; prepare it again, in another data_dir, with {remedy}")
    return builder


def _load_tfds(source: SourceConfig) -> _LibraryRows:
    builder = _tfds_builder(source)
    with from_outside(f"{source.path}: split: {source.split!r}", f"check split and data_dir {source.data_dir}"):
        rows = builder.as_data_source(source.split, file_format="array_record")
    return _LibraryRows(source.path, rows, partial(_to_python, builder.info.features))


def _tfds_identity(source: SourceConfig) -> list:
    info = _tfds_builder(source).info
    sizes = [[name, list(split.shard_lengths), int(split.num_bytes)] for name, split in sorted(info.splits.items())]
    return [info.full_name, source.split, sizes]


def _file_kind(load: Callable[[str], Any]) -> _Kind:
    return _Kind(lambda source: load(source.path), lambda source: [files.file_hash(source.path)])


_KINDS = {
    "file of JSON": _file_kind(files.load_json),
    "file of JSON lines": _file_kind(files.JsonLines),
    "CSV file": _file_kind(files.load_csv),
    "parquet file": _file_kind(files.Parquet),
    "saved folder": _dataset_kind(_load_saved, "split"),
    "folder of files": _Kind(
        lambda source: _LibraryRows(source.path, _load_folder(source)),
        lambda source: [_folder_hash(source.path), source.split, source.name],
        ("split", "name"),
    ),
    "hub dataset": _dataset_kind(_load_hub, "split", "name", "revision"),
    "TFDS set": _Kind(_load_tfds, _tfds_identity, ("split", "data_dir")),
}
_SUFFIXES = {".json": "file of JSON", ".jsonl": "file of JSON lines", ".csv": "CSV file", ".parquet": "parquet file"}
_SAVED_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")  # files written by save_to_disk
