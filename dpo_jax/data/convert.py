"""Convert rows to chunks of token arrays, in row order, with worker processes if there are enough rows.

Workers are spawned, never forked, because the parent may have JAX threads. A script that converts more than a few
thousand rows therefore needs the usual ``if __name__ == "__main__":`` guard.
"""

import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from dpo_jax.config import NUM_ANSWERS, DataConfig, Stage
from dpo_jax.data.schemas import Parser, Problem
from dpo_jax.data.sources import Rows
from dpo_jax.data.tokenize import TokenizedExample, make_tokenize
from dpo_jax.errors import UserError

CHUNK_ROWS = 256
CHUNKS_AHEAD = 4  # chunks in flight per process; bounds memory
MIN_ROWS_PER_PROCESS = 2000  # a process takes seconds to start, which does not pay off for fewer rows


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Result of converting a chunk of rows: n examples with concatenated tokens, and the problems of invalid rows."""

    tokens: np.ndarray  # int32: prompt and answers of each example, concatenated
    lengths: np.ndarray  # int32 [n, 1 + K]: tokens of the prompt and of each answer
    rows: np.ndarray  # int64 [n]: row of each example in its source
    weights: np.ndarray  # float32 [n]
    margins: np.ndarray  # float32 [n]
    prompts: np.ndarray  # uint64 [n]: see `prompt_hash`
    targets: np.ndarray | None  # bool, same shape as tokens: answer tokens to learn; None: all of them
    dropped: list[Problem]  # one problem per row without an example
    notes: list[Problem]  # repairs, truncations and the like in the other rows
    rendered: int  # number of examples rendered by a chat template


def prompt_hash(example: TokenizedExample) -> int:
    """Return a 64-bit hash of the prompt's tokens, or of the whole text if only the first token is its prompt."""
    is_text = len(example.answers) == 1 and len(example.prompt) == 1
    tokens = [*example.prompt, *example.answers[0]] if is_text else example.prompt
    digest = hashlib.blake2b(np.array(tokens, "<i4").tobytes(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big")  # half of the digest suffices; it keeps the order of earlier splits


def _chunk(results: Sequence[TokenizedExample | Problem], num_answers: int, with_targets: bool) -> Chunk:
    examples = [example for example in results if not isinstance(example, Problem)]
    tokens: list[int] = []
    targets: list[bool] = []
    for example in examples:
        tokens += example.prompt
        targets += [False] * len(example.prompt)
        for answer in example.answers:
            tokens += answer
            targets += [True] * len(answer) if example.targets is None else example.targets
    lengths = [[len(example.prompt), *map(len, example.answers)] for example in examples]
    return Chunk(
        tokens=np.array(tokens, np.int32),
        lengths=np.array(lengths, np.int32).reshape(-1, 1 + num_answers),
        rows=np.array([example.row for example in examples], np.int64),
        weights=np.array([example.weight for example in examples], np.float32),
        margins=np.array([example.margin for example in examples], np.float32),
        prompts=np.array([prompt_hash(example) for example in examples], np.uint64),
        targets=np.array(targets, bool) if with_targets else None,
        dropped=[problem for problem in results if isinstance(problem, Problem)],
        notes=[note for example in examples for note in example.notes],
        rendered=sum(example.is_conversation for example in examples),
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set to convert; its parser and chunks of its rows are pickled to worker processes."""

    label: str  # name in messages
    rows: Rows
    parse: Parser
    hints: list[str]  # notes to the user on how the rows are read


@dataclass(frozen=True, kw_only=True)
class ConvertJob:
    """Settings shared by all rows; pickled to each worker process once."""

    data: DataConfig
    tokenizer: Any
    stage: Stage


ConvertRows = Callable[[str, Parser, int, Sequence[Mapping]], Chunk]  # (label, parser, first row, rows) -> chunk


def make_convert_rows(job: ConvertJob) -> ConvertRows:
    """Return a function that converts rows to a chunk and raises at rows that `data.invalid_rows` treats as errors."""
    tokenize = make_tokenize(job.data, job.tokenizer, job.stage)

    def convert(label: str, parse: Parser, row: int, values: Mapping) -> TokenizedExample | Problem:
        example = parse(row, values)
        try:
            result = example if isinstance(example, Problem) else tokenize(example)
        except UserError as error:
            raise UserError(f"{label}, {error}") from None
        if isinstance(result, Problem) and getattr(job.data.invalid_rows, result.cause) == "error":
            remedy = f"fix the row, or set data.invalid_rows.{result.cause} to drop"
            raise UserError(f"{label}, row {row}: {result.cause}: {result.detail}; {remedy}")
        return result

    def convert_rows(label: str, parse: Parser, first: int, rows: Sequence[Mapping]) -> Chunk:
        results = [convert(label, parse, row, values) for row, values in enumerate(rows, start=first)]
        return _chunk(results, NUM_ANSWERS[job.stage], with_targets=job.stage == "sft")

    return convert_rows


_convert_rows: ConvertRows  # set in each worker process


def _start_worker(pickled_job: bytes) -> None:
    """Initialize a worker: first watch for the end of its parent, then unpickle the job, which takes seconds."""
    global _convert_rows  # noqa: PLW0603  a pool's initializer can pass state to tasks only this way
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers already use all cores
    _convert_rows = make_convert_rows(pickle.loads(pickled_job))


def _end_with_parent() -> None:
    """End this worker once its parent has ended, even if killed: the system then closes the parent's end of a pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Context manager: workers started inside do not get Ctrl-C and SIGHUP, which a terminal sends to all processes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(label: str, parse: Parser, first: int, rows: Sequence[Mapping]) -> Chunk:
    return _convert_rows(label, parse, first, rows)


def _row_chunks(source: Source) -> Iterator[tuple[str, Parser, int, list[Mapping]]]:
    for first in range(0, len(source.rows), CHUNK_ROWS):
        yield source.label, source.parse, first, source.rows[first : first + CHUNK_ROWS]


def num_processes(num_rows: int, workers: int | None) -> int:
    """Return how many processes to use: at most ``workers`` (None: one per core), each with enough rows to pay off."""
    limit = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return max(1, min(limit, num_rows // MIN_ROWS_PER_PROCESS))


def converted_chunks(sources: Sequence[Source], job: ConvertJob, workers: int | None) -> Iterator[tuple[int, Chunk]]:
    """Yield (source index, chunk) for all rows of all sources, in an order that does not depend on ``workers``.

    Raises:
        UserError: a row is invalid and its handling is `error`, or a worker process ended early.
    """
    chunks = ((index, chunk) for index, source in enumerate(sources) for chunk in _row_chunks(source))
    process_count = num_processes(sum(len(source.rows) for source in sources), workers)
    if process_count == 1:
        convert_rows = make_convert_rows(job)
        for index, chunk in chunks:
            yield index, convert_rows(*chunk)
        return
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[int, Future[Chunk]]] = deque()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(process_count, context, _start_worker, (pickle.dumps(job),)) as pool:
        try:
            for index, chunk in chunks:
                with _blocked_signals():
                    pending.append((index, pool.submit(_work, *chunk)))
                if len(pending) == CHUNKS_AHEAD * process_count:
                    oldest_index, future = pending.popleft()
                    yield oldest_index, future.result()
            for index, future in pending:
                yield index, future.result()
        except BrokenProcessPool as error:
            cause = 'out of memory, or the script lacks `if __name__ == "__main__":`'
            problem = f"one of {process_count} tokenizer processes ended early ({cause})"
            raise UserError(f"data.workers: {problem}; set data.workers to 1") from error
        except BaseException:  # do not wait for what they are doing
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
