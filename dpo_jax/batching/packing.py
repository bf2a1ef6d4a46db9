"""Pack the pairs of a step into rows of a fixed shape.

A *unit* is a contiguous span of a row: ``[prompt][chosen][rejected]`` in layout ``shared``; ``[prompt][answer]``, one
per answer, in ``repeated`` and ``padded``. Packing decides only where pairs are placed, never which pairs a step has.
Shape letters as in batch.py; J block pairs per row that attention visits.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.batch import BLOCK, PreferenceBatch, round_up
from dpo_jax.errors import UserError

Layout = Literal["shared", "repeated", "padded"]


class Unit(NamedTuple):
    """Contiguous span of a row: the prompt of a pair and one or more of its answers."""

    pair: int
    branches: tuple[int, ...]  # indices on the K axis
    prompt: int  # tokens
    answers: tuple[int, ...]  # tokens of each branch
    targets: int  # number of answer tokens to predict

    @property
    def size(self) -> int:
        """Number of tokens in the unit."""
        return self.prompt + sum(self.answers)


@dataclass(frozen=True, order=True)
class BatchShape:
    """Static sizes of a packed batch; each distinct shape costs one compilation."""

    rows: int  # R
    length: int  # T
    targets: int  # M
    answers: int  # A
    blocks: int  # J
    longest: int  # bound on tokens of a prompt plus one of its answers
    branch_length: int  # bound on a row's prompt tokens plus one branch's answer tokens

    def holds(self, other: "BatchShape") -> bool:
        """Return whether this shape is at least as large as ``other`` in every dimension."""
        return all(getattr(self, f.name) >= getattr(other, f.name) for f in fields(self))

    def union(self, other: "BatchShape") -> "BatchShape":
        """Return the smallest shape that holds both this shape and ``other``."""
        return BatchShape(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


def make_units(lengths: np.ndarray, num_targets: np.ndarray, layout: Layout) -> list[Unit]:
    """Make the units of a step: one for each pair in layout ``shared``, otherwise one for each answer.

    ``lengths`` [B, 1 + K]: tokens of prompt and answers, 0 for padding; ``num_targets`` [B, K]: tokens to predict.
    """
    units = []
    for pair, (prompt, *answers) in enumerate(lengths.tolist()):
        if prompt == 0:
            continue
        targets = num_targets[pair].tolist()
        if layout == "shared":
            units.append(Unit(pair, tuple(range(len(answers))), prompt, tuple(answers), sum(targets)))
        else:
            units += [Unit(pair, (k,), prompt, (answer,), targets[k]) for k, answer in enumerate(answers)]
    return units


def assign_rows(units: Sequence[Unit], *, layout: Layout, multiple: int, row_length: int | None) -> list[list[Unit]]:
    """Assign units to rows; the number of rows is a multiple of ``multiple``, the number of devices that shard rows.

    With ``row_length=None``, ``multiple`` rows of similar length (longest unit first, into the shortest row); otherwise
    as many rows of that length as needed (longest unit first, into the fullest row with room for it).
    """
    longest_first = sorted(units, key=lambda unit: -unit.size)  # stable sort: units of equal size keep their order
    rows: list[list[Unit]]
    if layout == "padded":
        rows = [[unit] for unit in units]
    elif row_length is None:
        rows = [[] for _ in range(multiple)]
        row_sizes = [(0, row) for row in range(multiple)]
        for unit in longest_first:
            row_size, row = heapq.heappop(row_sizes)
            rows[row].append(unit)
            heapq.heappush(row_sizes, (row_size + unit.size, row))
    else:
        rows, free_tokens = [], []
        for unit in longest_first:
            fitting_rows = [row for row, free in enumerate(free_tokens) if free >= unit.size]
            if not fitting_rows:
                if unit.size > row_length:
                    reason = f"{row_length} is shorter than a pair of {unit.size} tokens"
                    raise UserError(f"batch.row_length: {reason}; raise it, or lower data.max_length")
                rows.append([])
                free_tokens.append(row_length)
                fitting_rows = [len(rows) - 1]
            row = min(fitting_rows, key=free_tokens.__getitem__)
            rows[row].append(unit)
            free_tokens[row] -= unit.size
    rows += [[] for _ in range(round_up(len(rows), multiple) - len(rows))]
    return [sorted(row) for row in rows]


def visible_blocks(row: Sequence[Unit]) -> np.ndarray:
    """Return the sorted (query block, key block) index pairs, [J, 2], in which some query attends to some key."""
    num_blocks = round_up(sum(unit.size for unit in row), BLOCK) // BLOCK
    is_visible = np.zeros((num_blocks, num_blocks), bool)
    start = 0
    for unit in row:
        answer_start = start + unit.prompt
        prompt_blocks = slice(start // BLOCK, (answer_start - 1) // BLOCK + 1)
        is_visible[prompt_blocks, prompt_blocks] = True
        for size in unit.answers:
            answer_blocks = slice(answer_start // BLOCK, (answer_start + size - 1) // BLOCK + 1)
            is_visible[answer_blocks, prompt_blocks] = is_visible[answer_blocks, answer_blocks] = True
            answer_start += size
        start = answer_start
    return np.argwhere(np.tril(is_visible))


def branch_tokens(row: Sequence[Unit]) -> int:
    """Return the tokens in a row's prompts and its largest branch; branch k holds the k-th answer of each pair."""
    answers: Counter[int] = Counter()
    for unit in row:
        answers.update(dict(zip(unit.branches, unit.answers, strict=True)))
    return sum(unit.prompt for unit in row) + max(answers.values(), default=0)


def required_shape(rows: Sequence[Sequence[Unit]]) -> BatchShape:
    """Return the smallest shape that holds these rows, with sizes rounded up to whole blocks."""
    row_max = lambda measure: max((measure(row) for row in rows), default=0)  # noqa: E731
    return BatchShape(
        rows=len(rows),
        length=round_up(row_max(lambda row: sum(unit.size for unit in row)), BLOCK),
        targets=round_up(row_max(lambda row: sum(unit.targets for unit in row)), BLOCK),
        answers=max(1, row_max(lambda row: sum(len(unit.answers) for unit in row))),
        blocks=round_up(row_max(lambda row: len(visible_blocks(row))), 16),
        longest=round_up(row_max(lambda row: max((unit.prompt + max(unit.answers) for unit in row), default=0)), BLOCK),
        branch_length=round_up(row_max(branch_tokens), BLOCK),
    )


def step_shape(microbatches: Sequence[Sequence[Sequence[Unit]]], row_length: int | None) -> BatchShape:
    """Return the smallest shape that holds every microbatch of a step, with rows of ``row_length`` tokens if given."""
    shape = reduce(BatchShape.union, map(required_shape, microbatches))
    return shape if row_length is None else replace(shape, length=row_length)


def choose_shapes(needed: Sequence[BatchShape], max_shapes: int, min_saving: float = 0.05) -> tuple[BatchShape, ...]:
    """Choose at most ``max_shapes`` shapes, smallest first, that together cover ``needed`` with the fewest token slots.

    Each shape costs a compilation, so one is added only if it saves at least the fraction ``min_saving`` of the slots.
    """
    num_slots = lambda shape: shape.rows * shape.length  # noqa: E731
    sizes = sorted({num_slots(shape) for shape in needed})
    if len(sizes) > 24:  # limits the number of combinations to try
        sizes = sorted({sizes[round(i * (len(sizes) - 1) / 23)] for i in range(24)})
    step_counts = np.array([sum(low < num_slots(s) <= high for s in needed) for low, high in pairwise([0, *sizes])])
    best_bounds, best_cost = (sizes[-1],), int(step_counts.sum() * sizes[-1])
    for number in range(2, min(max_shapes, len(sizes)) + 1):
        costs = {}
        for lower_bounds in combinations(sizes[:-1], number - 1):
            bounds = (*lower_bounds, sizes[-1])
            costs[bounds] = int(step_counts @ np.array(bounds)[np.searchsorted(bounds, sizes)])
        bounds, cost = min(costs.items(), key=lambda item: item[1])
        if cost > best_cost * (1 - min_saving):
            break
        best_bounds, best_cost = bounds, cost
    shapes: list[BatchShape] = []
    for low, high in pairwise((0, *best_bounds)):
        shape = reduce(BatchShape.union, (shape for shape in needed if low < num_slots(shape) <= high))
        shapes.append(shape.union(shapes[-1]) if shapes else shape)
    return tuple(shapes)


@dataclass(frozen=True)
class Packer:
    """Settings for packing the pairs of a step into rows; ``shapes`` are the compiled shapes, smallest first."""

    layout: Layout
    multiple: int  # number of devices that shard the rows
    row_length: int | None  # None: auto
    accumulation: int
    shapes: tuple[BatchShape, ...] = ()

    def rows(self, lengths: np.ndarray, num_targets: np.ndarray) -> list[list[list[Unit]]]:
        """Pack the step into ``accumulation`` microbatches of consecutive pairs; return the rows of each."""
        pairs_per_microbatch = len(lengths) // self.accumulation
        microbatches = []
        for start in range(0, len(lengths), pairs_per_microbatch):
            pair_slice = slice(start, start + pairs_per_microbatch)
            units = make_units(lengths[pair_slice], num_targets[pair_slice], self.layout)
            rows = assign_rows(units, layout=self.layout, multiple=self.multiple, row_length=self.row_length)
            microbatches.append(rows)
        num_rows = max(len(rows) for rows in microbatches)
        return [rows + [[] for _ in range(num_rows - len(rows))] for rows in microbatches]

    def shape(self, microbatches: Sequence[Sequence[Sequence[Unit]]]) -> BatchShape:
        """Return the smallest of ``shapes`` that holds the step, or a larger one, which may have to be compiled."""
        needed_shape = step_shape(microbatches, self.row_length)
        for shape in self.shapes:
            if shape.holds(needed_shape):
                return shape
        if not self.shapes:
            return needed_shape
        enlarged_shape = needed_shape.union(self.shapes[-1])
        token_sizes = ("targets", "longest", "branch_length", *(("length",) if self.row_length is None else ()))
        increments = {"answers": 8, "blocks": 128} | dict.fromkeys(token_sizes, 4 * BLOCK)
        sizes = {name: round_up(getattr(enlarged_shape, name), n) for name, n in increments.items()}
        return replace(enlarged_shape, **sizes)


ExampleTokens = tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray | None]  # prompt, answers, target mask (None: all)
Examples = Mapping[int, ExampleTokens] | Sequence[ExampleTokens | None]  # by pair


def empty_batch(
    shape: BatchShape,
    num_pairs: int,
    num_answers: int,
    *,
    leading: tuple[int, ...] = (),
    zeros: Callable[[tuple[int, ...], Any], Any] = np.zeros,
) -> PreferenceBatch:
    """Return a batch of zeros; the dims ``leading``, such as the number of microbatches, precede those of each array.

    ``zeros``: (shape, dtype) -> array or stand-in: numpy's or JAX's ``zeros``, or ``jax.ShapeDtypeStruct``.
    """
    row_shape, pair_shape = (*leading, shape.rows), (*leading, num_pairs)
    token_shape, target_shape = (*row_shape, shape.length), (*row_shape, shape.targets)
    return PreferenceBatch(
        **{name: zeros(token_shape, np.int32) for name in ("tokens", "positions", "segments", "branches")},
        **{f"target_{name}": zeros(target_shape, np.int32) for name in ("tokens", "sources", "answers", "offsets")},
        target_mask=zeros(target_shape, np.bool_),
        answer_slots=zeros((*pair_shape, num_answers), np.int32),
        weight=zeros(pair_shape, np.float32),
        margin=zeros(pair_shape, np.float32),
        valid=zeros(pair_shape, np.bool_),
        blocks=zeros((*row_shape, shape.blocks, 2), np.int32),
        answers_per_row=shape.answers,
        longest=shape.longest,
        branch_length=shape.branch_length,
    )


def pack_rows(
    rows: Sequence[Sequence[Unit]],
    shape: BatchShape,
    examples: Examples,
    weight: np.ndarray,
    num_answers: int,
    local_rows: Sequence[int] | None = None,
    margin: np.ndarray | float = 0.0,
) -> PreferenceBatch:
    """Write the tokens and targets of units into the rows of a batch of ``shape``.

    ``examples``: tokens of the pairs in the rows to write; ``weight`` and ``margin`` [B]: of all pairs. ``local_rows``:
    indices of the rows to write and return; None: all. Per-pair arrays always cover all rows.
    """
    row_indices = range(shape.rows) if local_rows is None else local_rows
    batch = empty_batch(replace(shape, rows=len(row_indices)), len(weight), num_answers)
    batch.weight[:], batch.margin[:] = weight, margin
    for row, units in enumerate(rows):
        for slot, (pair, branch) in enumerate((unit.pair, branch) for unit in units for branch in unit.branches):
            batch.answer_slots[pair, branch] = row * shape.answers + slot
            batch.valid[pair] = True
    for index, row in enumerate(row_indices):
        _write_row(batch, index, rows[row] if row < len(rows) else (), examples)
    return batch


def _write_row(batch: PreferenceBatch, row: int, units: Sequence[Unit], examples: Examples) -> None:
    """Write the tokens, targets and blocks of one row."""
    blocks = visible_blocks(units)
    batch.blocks[row, : len(blocks)], batch.blocks[row, len(blocks) :] = blocks, -1

    def write(start, tokens, position, segment, branch):
        span = (row, slice(start, start + len(tokens)))
        batch.tokens[span], batch.positions[span] = tokens, position + np.arange(len(tokens))
        batch.segments[span], batch.branches[span] = segment, branch

    start = num_targets = slot = 0
    for segment, unit in enumerate(units, start=1):
        example = examples[unit.pair]
        assert example is not None, "an empty slot has no unit"
        prompt, answers, target_mask = example
        write(start, prompt, 0, segment, 0)
        answer_start = start + len(prompt)
        for branch in unit.branches:
            tokens = answers[branch]
            write(answer_start, tokens, len(prompt), segment, branch + 1)
            sources = np.arange(answer_start - 1, answer_start + len(tokens) - 1)
            sources[0] = start + len(prompt) - 1  # the last prompt token predicts the first token of each answer
            offsets = np.arange(len(tokens)) if target_mask is None else np.flatnonzero(target_mask)
            span = (row, slice(num_targets, num_targets + len(offsets)))
            batch.target_tokens[span], batch.target_sources[span] = tokens[offsets], sources[offsets]
            batch.target_answers[span], batch.target_offsets[span] = slot, offsets
            batch.target_mask[span] = True
            num_targets, slot, answer_start = num_targets + len(offsets), slot + 1, answer_start + len(tokens)
        start = answer_start
