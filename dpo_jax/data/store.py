"""Token store: examples tokenized once into flat, memory-mapped files, in a folder named by a hash of all inputs.

A store is a folder ``<key>/`` of plain little-endian arrays, ``problems.jsonl`` (every row that was dropped or
changed) and ``manifest.json`` (written last: sizes, checksums, counts). It is built in a temporary folder and renamed
atomically, so a folder named by a key is complete; if its checksums do not match, it is built again.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from dpo_jax.config import NUM_ANSWERS, DataConfig, SourceConfig, Stage
from dpo_jax.data import sources as data_sources
from dpo_jax.data.convert import Chunk, ConvertJob, Source, converted_chunks
from dpo_jax.data.infer_schema import hints, parser_of
from dpo_jax.data.schemas import Problem
from dpo_jax.data.template import reads_clock
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.errors import UserError
from dpo_jax.storage import (
    check_entries,
    check_fields,
    claim,
    is_abandoned,
    list_files,
    seal,
    sync,
    unseal,
    write_atomically,
)

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

FORMAT = 5  # version of the files; increment it also when the same rows would yield different tokens
DTYPES = dict.fromkeys(("tokens", "lengths", "num_targets"), "<i4")
DTYPES |= {"rows": "<i8", "sources": "<i2", "weights": "<f4", "margins": "<f4", "prompts": "<u8", "targets": "|b1"}
MAX_LISTED_ROWS = 10  # rows listed per cause in a report; problems.jsonl lists all
SAMPLE_ROWS = 100  # rows from whose columns the schema is inferred
KEY_DIGITS = 16  # hexadecimal digits of the key in the folder's name
MANIFEST, PROBLEMS, BUILD_PREFIX = "manifest.json", "problems.jsonl", ".building-"
STALE_SECONDS = 24 * 3600  # age at which the temporary folder of an interrupted build is removed


@dataclass(frozen=True, kw_only=True)
class Store:
    """N tokenized examples of K answers each, opened by ``open_store``; arrays are read-only memory maps."""

    path: Path
    key: str  # hexadecimal sha256 of everything that determines the content
    tokens: np.ndarray  # int32: prompt and answers of every example, concatenated
    starts: np.ndarray  # int64 [N]: offset of each example in tokens
    lengths: np.ndarray  # int32 [N, 1 + K]: tokens of the prompt and of each answer
    num_targets: np.ndarray  # int32 [N, K]: answer tokens to learn
    rows: np.ndarray  # int64 [N]: row in the example's source
    sources: np.ndarray  # int16 [N]: index of the example's source in `report`
    weights: np.ndarray  # float32 [N]
    margins: np.ndarray  # float32 [N]: for reward models; NaN where the data have no number
    prompts: np.ndarray  # uint64 [N]: hash of each prompt's tokens, see `prompt_hash`
    targets: np.ndarray | None  # bool, same shape as tokens: answer tokens to learn; None: all of them
    report: list[dict[str, Any]]  # per source: source, rows, kept, rendered, hints, and dropped and notes by cause

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, i: int | np.integer) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray | None]:
        """Return views of example ``i``: prompt, answers, and the mask of tokens to learn in answer 0 (None: all)."""
        ends = self.starts[i] + np.cumsum(self.lengths[i], dtype=np.int64)
        prompt = self.tokens[self.starts[i] : ends[0]]
        answers = tuple(self.tokens[start:end] for start, end in pairwise(ends))
        return prompt, answers, None if self.targets is None else self.targets[ends[0] : ends[1]]


AnySource: TypeAlias = "SourceConfig | Dataset"


def source_label(source: AnySource, index: int) -> str:
    """Return the name of a source for messages and reports."""
    return source.path if isinstance(source, SourceConfig) else f"datasets.Dataset {index}"


def _store_inputs(sources: Sequence[AnySource], data: DataConfig, tokenizer: Any, stage: Stage) -> dict[str, Any]:
    """Return everything that determines the content of a store."""
    return {
        "format": FORMAT,
        "stage": stage,
        "sources": list(map(data_sources.fingerprint, sources)),
        "schemas": [source.schema if isinstance(source, SourceConfig) else "auto" for source in sources],
        "tokenizer": tokenizer_hash(tokenizer),
        "invalid_rows": asdict(data.invalid_rows),
        "max_length": data.max_length,
        "truncation": data.truncation,
        "append_eos": data.append_eos,
        "template_date": data.template_date if reads_clock(tokenizer.chat_template) else None,
    }


def _hash(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def open_source(source: AnySource, index: int, stage: Stage) -> Source:
    """Open the rows of a source and infer their schema."""
    label = source_label(source, index)
    rows = data_sources.load_rows(source)
    sample = [rows[row] for row in range(min(len(rows), SAMPLE_ROWS))]
    columns = list(dict.fromkeys(name for row in sample for name in row))
    schema = source.schema if isinstance(source, SourceConfig) else "auto"
    try:
        parse = parser_of(schema, columns, sample, stage)
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    return Source(label=label, rows=rows, parse=parse, hints=hints(parse, columns, sample))


def _check_unchanged(sources: Sequence[AnySource], before: Sequence[str]) -> None:
    """Raise if a source changed during tokenization: its rows must not be stored under the key of the old content."""
    for index, (source, fingerprint) in enumerate(zip(sources, before, strict=True)):
        if data_sources.fingerprint(source) != fingerprint:
            remedy = "start again once no process is writing to it"
            raise UserError(f"{source_label(source, index)}: the data changed while it was tokenized; {remedy}")


class DamagedStore(UserError):
    """Raised if a store folder is incomplete or does not match its manifest."""


class _DataFile:
    """Open file that counts and checksums the bytes written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.size += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def finish(self) -> dict[str, int]:
        sync(self.file)
        return {"size": self.size, "crc32": self.crc32}


def _count(causes: dict[str, Any], problems: Iterable[Problem]) -> None:
    for problem in problems:
        cause = causes.setdefault(problem.cause, {"count": 0, "first": []})
        cause["count"] += 1
        if len(cause["first"]) < MAX_LISTED_ROWS:
            cause["first"].append({"row": problem.row, "detail": problem.detail})


def _arrays(chunk: Chunk, source_index: int) -> dict[str, np.ndarray]:
    lengths = chunk.lengths
    num_targets = lengths[:, 1:]
    arrays = {"tokens": chunk.tokens, "rows": chunk.rows, "lengths": lengths}
    arrays |= {"weights": chunk.weights, "margins": chunk.margins, "prompts": chunk.prompts}
    if chunk.targets is not None:
        ends = np.cumsum(lengths.sum(1))
        cumulative_targets = np.concatenate([[0], np.cumsum(chunk.targets)])
        num_targets = (cumulative_targets[ends] - cumulative_targets[ends - lengths.sum(1)])[:, None]
        arrays["targets"] = chunk.targets
    return arrays | {"num_targets": num_targets, "sources": np.full(len(lengths), source_index)}


def _check_not_empty(report: dict[str, Any]) -> None:
    num_dropped = sum(cause["count"] for cause in report["dropped"].values())
    assert report["kept"] + num_dropped == report["rows"], report
    if report["kept"] == 0:
        counts = [(name, cause["count"], cause["first"][0]) for name, cause in report["dropped"].items()]
        problem = "; ".join(f"{name} {count} (row {first['row']}: {first['detail']})" for name, count, first in counts)
        raise UserError(f"{report['source']}: none of its {report['rows']} rows are valid: {problem}; fix the data")


def _write(
    folder: Path, sources: Sequence[Source], job: ConvertJob, workers: int | None, inputs: dict[str, Any]
) -> None:
    """Write all files of a store into an empty folder; the manifest is written last."""
    reports: list[dict[str, Any]] = []
    for source in sources:
        counts = {"source": source.label, "rows": len(source.rows), "kept": 0, "rendered": 0}
        reports.append(counts | {"hints": source.hints, "dropped": {}, "notes": {}})
    file_names = {name: f"{name}.bin" for name in DTYPES if name != "targets" or job.stage == "sft"}
    with ExitStack() as stack:
        files = {name: _DataFile(stack.enter_context(open(folder / file, "wb"))) for name, file in file_names.items()}
        problems = _DataFile(stack.enter_context(open(folder / PROBLEMS, "wb")))
        for index, chunk in converted_chunks(sources, job, workers):
            for name, array in _arrays(chunk, index).items():
                files[name].write(np.ascontiguousarray(array, DTYPES[name]).tobytes())
            report = reports[index]
            report["kept"] += len(chunk.rows)
            report["rendered"] += chunk.rendered
            for kind, chunk_problems in (("dropped", chunk.dropped), ("notes", chunk.notes)):
                _count(report[kind], chunk_problems)
                for problem in chunk_problems:
                    line = {"source": report["source"], "kind": kind} | asdict(problem)
                    problems.write(json.dumps(line).encode() + b"\n")
        for report in reports:
            _check_not_empty(report)
        sizes = {file_names[name]: file.finish() for name, file in files.items()} | {PROBLEMS: problems.finish()}
    manifest = {"made_from": inputs, "num_answers": NUM_ANSWERS[job.stage], "files": sizes, "report": reports}
    write_atomically(folder / MANIFEST, json.dumps(seal(manifest), indent=1), durable=True)


def _check_file(path: Path, size: int, crc32: int) -> None:
    if not path.is_file():
        raise DamagedStore(f"{path}: the file is missing")
    if path.stat().st_size != size:
        raise DamagedStore(f"{path}: the file has {path.stat().st_size} bytes, expected {size}")
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    if checksum != crc32:
        raise DamagedStore(f"{path}: its checksum is {checksum:08x}, expected {crc32:08x}")


def open_store(path: Path) -> Store:
    """Open a store folder after verifying the checksum of every file.

    Raises:
        DamagedStore: the folder is incomplete, or a file does not match the manifest.
    """
    try:
        manifest = unseal((path / MANIFEST).read_bytes())
        check_fields(manifest, {"made_from": dict, "num_answers": int, "files": dict, "report": list})
        check_entries(manifest["files"], {"size": int, "crc32": int})
    except (OSError, ValueError) as error:
        raise DamagedStore(f"{path}: there is no readable {MANIFEST}: {error}") from None
    key = _hash(manifest["made_from"])
    if path.name != key[:KEY_DIGITS]:
        raise DamagedStore(f"{path}: its manifest belongs to store {key[:KEY_DIGITS]}")
    for name, sizes in manifest["files"].items():
        _check_file(path / name, **sizes)
    arrays: dict[str, Any] = dict.fromkeys(DTYPES)
    for name, dtype in DTYPES.items():
        if f"{name}.bin" in manifest["files"]:
            is_empty = manifest["files"][f"{name}.bin"]["size"] == 0  # such as num_targets of prompts
            arrays[name] = np.zeros(0, dtype) if is_empty else np.memmap(path / f"{name}.bin", dtype, mode="r")
            arrays[name] = np.asarray(arrays[name])
    num_answers = manifest["num_answers"]
    arrays["lengths"] = arrays["lengths"].reshape(-1, 1 + num_answers)
    arrays["num_targets"] = arrays["num_targets"].reshape(len(arrays["lengths"]), num_answers)
    sizes = arrays["lengths"].sum(1, dtype=np.int64)
    return Store(path=path, key=key, starts=np.cumsum(sizes) - sizes, report=manifest["report"], **arrays)


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of killed builds; without locks to show which were killed, recent ones are kept."""
    for path in list_files(folder, BUILD_PREFIX + "*"):
        with suppress(FileNotFoundError):  # its build has just ended
            newest = max((file.stat().st_mtime for file in path.glob("*/*")), default=path.stat().st_mtime)
            if is_abandoned(path) or time.time() - newest > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _move_to_path(build_folder: Path, path: Path) -> None:
    """Move a finished store to its final path, unless another process has already put an intact one there."""
    try:
        os.rename(build_folder, path)
    except OSError:  # the path exists
        try:
            open_store(path)
        except DamagedStore:
            with suppress(OSError):  # another process is replacing it too
                os.rename(path, build_folder.with_name("damaged"))
                os.rename(build_folder, path)


def build_or_open_store(
    folder: Path, sources: Sequence[AnySource], data: DataConfig, tokenizer: Any, stage: Stage, workers: int | None
) -> Store:
    """Open the store of these sources and options if an intact one exists, else build it with `workers` processes.

    A second call only reads the sources to hash them, and tokenizes nothing. Two processes may build concurrently; if
    several hosts share the folder, let one of them build first.

    Raises:
        UserError: a source cannot be read, changes during the build or has no valid row, a row is invalid and its
            handling is `error`, or the folder cannot be written.
    """
    inputs = _store_inputs(sources, data, tokenizer, stage)
    path = folder / _hash(inputs)[:KEY_DIGITS]
    _remove_leftovers(folder)
    if path.exists():
        try:
            return open_store(path)
        except DamagedStore as damage:
            # not the exception: a handler that keeps log records would keep its frames, with every file they have open
            log.warning("%s; tokenizing the data again", str(damage))
    open_sources = [open_source(source, index, stage) for index, source in enumerate(sources)]
    log.info("tokenizing %d rows into %s", sum(len(source.rows) for source in open_sources), path)
    job = ConvertJob(data=data, tokenizer=tokenizer, stage=stage)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary_folder = tempfile.TemporaryDirectory(prefix=BUILD_PREFIX, dir=folder, ignore_cleanup_errors=True)
        with temporary_folder as temporary, claim(Path(temporary)):
            build_folder = Path(temporary) / "store"
            build_folder.mkdir()
            _write(build_folder, open_sources, job, workers, inputs)
            _check_unchanged(sources, inputs["sources"])
            _move_to_path(build_folder, path)
    except OSError as error:
        raise UserError(f"data.store: {folder}: {error}; free some space, or choose another folder") from None
    return open_store(path)


def ids_by_source(store: Store, ids: np.ndarray) -> list[np.ndarray]:
    """Split example ids by source: one int64 array per source, which keeps the order of ``ids``."""
    return [ids[store.sources[ids] == source] for source in range(len(store.report))]


def split_held_out(store: Store, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (training ids, held-out ids), int64 and ascending; the split depends on neither seed nor row order.

    All examples of a prompt fall on the same side. Prompts are held out in the order of a hash of their tokens until
    round(fraction * N) examples are reached; a prompt with too many examples for the remainder is skipped.

    Raises:
        UserError: the fraction leaves either side empty.
    """
    hashes, group_of, sizes = np.unique(store.prompts, return_inverse=True, return_counts=True)
    target_size = round(fraction * len(store))
    is_held_out = np.zeros(len(hashes), bool)
    num_left, candidates = target_size, np.arange(len(hashes))
    while len(candidates := candidates[sizes[candidates] <= num_left]):
        fitting = candidates[: np.searchsorted(np.cumsum(sizes[candidates]), num_left, side="right")]
        is_held_out[fitting] = True
        num_left -= int(sizes[fitting].sum())
        candidates = candidates[len(fitting) :]
    num_held_out = target_size - num_left
    if fraction and not 0 < num_held_out < len(store):
        problem = f"{fraction} of {len(store)} examples ({len(hashes)} prompts) holds out {num_held_out}"
        raise UserError(f"data.eval_fraction: {problem}; change the fraction, or name an evaluation set in data.eval")
    mask = is_held_out[group_of]
    return np.flatnonzero(~mask), np.flatnonzero(mask)
