"""Packing: every token of every pair is laid once, each target is predicted from its own place, and rows fit."""

import itertools

import jax
import numpy as np
import pytest
from small import Pair, pack, random_pairs

from dpo_jax.batch import BLOCK, PreferenceBatch
from dpo_jax.batching.packing import BatchShape, Packer, Unit, choose_shapes, make_units, pack_rows, visible_blocks
from dpo_jax.errors import UserError

PAIRS = random_pairs(9, seed=2)
PACKINGS = {
    "shared": {},
    "shared in four rows": {"rows": 4},
    "shared in short rows": {"row_length": 192},
    "short rows on two devices": {"row_length": 256, "rows": 2},
    "repeated": {"layout": "repeated", "rows": 3},
    "repeated in short rows": {"layout": "repeated", "row_length": 192},
    "padded": {"layout": "padded"},
    "padded on four devices": {"layout": "padded", "rows": 4},
}


def laid_answers(batch: PreferenceBatch, pair: int, branch: int):
    """(prompt, answer) as they lie in the row, found from the answer's slot through its targets' sources alone."""
    row, slot = divmod(int(batch.answer_slots[pair, branch]), batch.answers_per_row)
    own = batch.target_mask[row] & (batch.target_answers[row] == slot)
    sources, offsets = batch.target_sources[row][own], batch.target_offsets[row][own]
    segment = batch.segments[row, sources[0]]
    in_unit = batch.segments[row] == segment
    prompt = batch.tokens[row][in_unit & (batch.branches[row] == 0)]
    answer = batch.tokens[row][in_unit & (batch.branches[row] == branch + 1)]
    positions = batch.positions[row]
    # each target is the token that follows its source: in its own answer, or first after the prompt
    np.testing.assert_array_equal(batch.target_tokens[row][own], answer[offsets])
    assert (batch.segments[row][sources] == segment).all()
    np.testing.assert_array_equal(positions[sources], len(prompt) - 1 + offsets)
    np.testing.assert_array_equal(batch.branches[row][sources], np.where(offsets == 0, 0, branch + 1))
    np.testing.assert_array_equal(positions[in_unit & (batch.branches[row] == 0)], np.arange(len(prompt)))
    np.testing.assert_array_equal(
        positions[in_unit & (batch.branches[row] == branch + 1)], len(prompt) + np.arange(len(answer))
    )
    return prompt, answer, offsets


def assert_holds(batch: PreferenceBatch, pairs: list[Pair | None], layout: str) -> None:
    """Exactly these pairs, each token once."""
    tokens = targets = 0
    for i, pair in enumerate(pairs):
        assert batch.valid[i] == (pair is not None)
        if pair is None:
            continue
        prompt, answers, learned = pair
        tokens += len(prompt) * (1 if layout == "shared" else len(answers)) + sum(map(len, answers))
        for k, answer in enumerate(answers):
            laid_prompt, laid_answer, offsets = laid_answers(batch, i, k)
            np.testing.assert_array_equal(laid_prompt, prompt)
            np.testing.assert_array_equal(laid_answer, answer)
            expected = np.arange(len(answer)) if learned is None else np.flatnonzero(learned)
            np.testing.assert_array_equal(offsets, expected)
            targets += len(expected)
    assert (batch.segments > 0).sum() == tokens
    assert batch.target_mask.sum() == targets
    padding = batch.segments == 0
    for grid in (batch.tokens, batch.positions, batch.branches):
        assert not grid[padding].any()


@pytest.mark.parametrize("name", PACKINGS)
def test_every_token_is_laid_once_and_predicted_from_its_place(name):
    options = PACKINGS[name]
    batch = pack(PAIRS, **options)
    assert_holds(batch, PAIRS, options.get("layout", "shared"))
    rows, length = batch.tokens.shape
    assert rows % options.get("rows", 1) == 0
    assert length % BLOCK == 0
    assert length == options.get("row_length", length)
    if options.get("layout") == "padded":
        assert (batch.segments <= 1).all()


def test_both_answers_begin_at_the_prompts_last_token():
    batch = pack(PAIRS)
    first = batch.target_offsets == 0
    sources = batch.target_sources[first & batch.target_mask].reshape(-1, 2)
    np.testing.assert_array_equal(sources[:, 0], sources[:, 1])
    assert len(sources) == len(PAIRS)


@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
def test_values_of_targets_are_gathered_by_pair_answer_and_token(layout):
    batch = pack(PAIRS[:4], layout=layout, rows=2, valid=3)
    expected = np.zeros((4, 2, 70))
    for i, (_, answers, _) in enumerate(PAIRS[:3]):
        for k, answer in enumerate(answers):
            expected[i, k, : len(answer)] = answer
    np.testing.assert_array_equal(batch.gather_tokens(batch.target_tokens.astype(np.float32), 70), expected)


@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
def test_a_ragged_step_and_its_parts_hold_their_own_pairs(layout):
    """Part k holds the k-th run of pairs; the last part of this step is empty."""
    ragged = [*PAIRS[:5], *[None] * 3]
    batch = pack(PAIRS[:8], layout=layout, rows=2, valid=5)
    assert_holds(batch, ragged, layout)
    assert batch.weight.tolist() == [1] * 5 + [0] * 3
    assert not batch.answer_slots[5:].any()
    parts = pack(PAIRS[:8], layout=layout, rows=2, valid=5, accumulation=4)
    for k in range(4):
        part = jax.tree.map(lambda x, k=k: x[k], parts)
        assert_holds(part, ragged[2 * k : 2 * k + 2], layout)


def test_rows_are_of_near_equal_load():
    units = make_units(np.array([[len(p), len(a), len(b)] for p, (a, b), _ in PAIRS]), np.ones((9, 2)), "shared")
    (rows,) = Packer("shared", 3, None, 1).rows(
        np.array([[len(p), len(a), len(b)] for p, (a, b), _ in PAIRS]), np.ones((9, 2), int)
    )
    loads = [sum(unit.size for unit in row) for row in rows]
    assert sorted(unit for row in rows for unit in row) == sorted(units)
    assert max(loads) - min(loads) <= max(unit.size for unit in units)


def test_a_row_that_no_pair_fits_in_is_refused():
    with pytest.raises(UserError, match=r"batch.row_length: 128 is shorter than a pair of 192 tokens; .*max_length"):
        pack(PAIRS, row_length=128)


def test_only_learned_tokens_are_targets():
    ids = np.arange(1, 9, dtype=np.int32)
    learned = np.array([1, 1, 0, 0, 1, 0, 0, 1], bool)
    examples = [(ids[:3], (ids,), learned), (ids[:2], (ids[:4],), None), None]
    lengths, num_targets = np.array([[3, 8], [2, 4], [0, 0]]), np.array([[4], [4], [0]])
    packer = Packer("shared", 1, None, 1)
    (rows,) = packer.rows(lengths, num_targets)
    batch = pack_rows(rows, packer.shape([rows]), examples, np.array([1, 1, 0]), 1)
    assert_holds(batch, examples, "shared")
    assert batch.target_tokens[batch.target_mask].tolist() == [1, 2, 5, 8, 1, 2, 3, 4]
    assert batch.target_sources[batch.target_mask].tolist() == [2, 3, 6, 9, 12, 13, 14, 15]


# ---------------------------------------------------------------------------------------------------- blocks


def dense_blocks(row: list[Unit]) -> np.ndarray:
    """The pairs of blocks between which a token sees another, from the rule token by token."""
    segment = np.concatenate([np.full(unit.size, i) for i, unit in enumerate(row)])
    branch = np.concatenate([np.repeat(range(1 + len(u.answers)), [u.prompt, *u.answers]) for u in row])
    place = np.arange(len(segment))
    seen = (segment[:, None] == segment) & (place <= place[:, None])
    seen &= (branch == 0) | (branch == branch[:, None])
    size = -(-len(place) // BLOCK) * BLOCK
    padded = np.zeros((size, size), bool)
    padded[: len(place), : len(place)] = seen
    blocks = padded.reshape(size // BLOCK, BLOCK, size // BLOCK, BLOCK)
    return np.argwhere(blocks.any((1, 3)))


@pytest.mark.parametrize("num_answers", [1, 2])
def test_visited_blocks_are_those_in_which_something_is_seen(num_answers):
    draw = np.random.Generator(np.random.Philox(num_answers))
    for _ in range(60):
        sizes = draw.choice([1, 2, 30, 63, 64, 65, 128, 150], (draw.integers(1, 5), 1 + num_answers))
        row = [Unit(i, tuple(range(num_answers)), int(p), tuple(map(int, own)), 0) for i, (p, *own) in enumerate(sizes)]
        np.testing.assert_array_equal(visible_blocks(row), dense_blocks(row))


# ---------------------------------------------------------------------------------------------------- shapes


def slots(shapes, needed):
    """Token slots when each step takes the first shape that holds it."""
    return sum(next(s.rows * s.length for s in shapes if s.holds(one)) for one in needed)


@pytest.mark.parametrize("seed", range(4))
def test_shapes_are_the_best_of_all_choices(seed):
    """Against every choice of at most 3 lengths, with rows as many as devices."""
    draw = np.random.Generator(np.random.Philox(seed))
    needed = [
        BatchShape(2, int(64 * n), int(64 * m), 3, int(16 * n), 64, int(64 * n))
        for n, m in draw.integers(1, 9, (30, 2))
    ]
    lengths = sorted({shape.length for shape in needed})
    for most in (1, 2, 3):
        shapes = choose_shapes(needed, most, min_saving=0)
        assert len(shapes) <= most
        assert list(shapes) == sorted(shapes)
        choices = [
            [*chosen, lengths[-1]] for number in range(most) for chosen in itertools.combinations(lengths[:-1], number)
        ]
        cost = lambda bounds: sum(2 * min(b for b in bounds if b >= one.length) for one in needed)  # noqa: E731
        assert slots(shapes, needed) == min(map(cost, choices))


def test_another_shape_is_taken_only_where_it_saves():
    even = [BatchShape(1, 1024, 64, 2, 16, 64, 64)] * 99 + [BatchShape(1, 960, 64, 2, 16, 64, 64)]
    assert len(choose_shapes(even, 4)) == 1
    split = [BatchShape(1, 1024, 64, 2, 16, 64, 64)] * 50 + [BatchShape(1, 512, 64, 2, 16, 64, 64)] * 50
    assert [shape.length for shape in choose_shapes(split, 4)] == [512, 1024]
    many = [BatchShape(1, 64 * n, 64, 2, 16, 64, 64) for n in range(1, 101)]
    shapes = choose_shapes(many, 4)
    assert len(shapes) == 4
    assert slots(shapes, many) < 0.66 * 100 * 6400
    assert all(any(shape.holds(one) for shape in shapes) for one in many)


def test_a_step_takes_the_smallest_shape_that_holds_it():
    lengths = np.array([[60, 30, 30], [70, 20, 60]])
    packer = Packer("shared", 1, None, 1)
    parts = packer.rows(lengths, lengths[:, 1:])
    needed = packer.shape(parts)
    assert (needed.rows, needed.length, needed.targets, needed.answers) == (1, 320, 192, 4)
    assert (needed.longest, needed.branch_length) == (192, 256)  # 130, and 60 + 70 + 30 + 60
    wide = BatchShape(1, 512, 256, 4, 64, 256, 512)
    few_targets = BatchShape(1, 512, 128, 4, 64, 256, 256)
    assert Packer("shared", 1, None, 1, (needed, wide)).shape(parts) == needed
    assert Packer("shared", 1, None, 1, (few_targets, wide)).shape(parts) == wide
    beyond = Packer("shared", 1, None, 1, (few_targets,)).shape(parts)  # met after the shapes were chosen
    assert beyond.holds(needed)
    assert beyond.holds(few_targets)
