"""The order of the data: known answers, every example once an epoch, shares kept at every step."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dpo_jax.batching.order import _GOLDEN, chairman_assignment, integer_shares, make_order, mix_words, permutation
from dpo_jax.config import SourceConfig
from dpo_jax.errors import UserError


def order(groups, **options):
    defaults: dict = {"weights": None, "seed": 3, "shuffle": True, "batch": 4, "steps": None, "epochs": None}
    return make_order(groups=groups, **(defaults | options))


def all_ids(order):
    return np.concatenate([order.step_ids(step) for step in range(order.num_steps)])


def test_hash_gives_the_published_stream():
    """The first five outputs of splitmix64 from seed 1234567."""
    words = np.array([(1234567 + i * _GOLDEN) % 2**64 for i in range(1, 6)], np.uint64)
    assert mix_words(words).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_permutation_never_changes():
    """Runs made by an older version must continue in the same order: these answers are fixed for good."""
    assert permutation(10, 0, 0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert permutation(10, 0, 1).tolist() == [6, 0, 4, 5, 2, 7, 9, 1, 8, 3]
    assert permutation(10, 2**63 - 1, 12345).tolist() == [1, 7, 0, 4, 2, 9, 6, 5, 3, 8]
    assert order([np.arange(7)], batch=3).step_ids(0).tolist() == [3, 1, 4]
    mixed = order([np.arange(7), np.arange(7, 12)], weights=[0.7, 0.3], batch=10, steps=2)
    assert mixed.step_ids(1).tolist() == [3, 8, 0, 6, 4, 10, 2, 5, 10, 1]


def test_permutation_is_one_and_looks_random():
    seen = set()
    for seed in range(3):
        for epoch in range(3):
            drawn = permutation(2000, seed, epoch)
            assert sorted(drawn) == list(range(2000))
            assert abs(np.corrcoef(drawn, np.arange(2000))[0, 1]) < 0.1
            seen.add(drawn.tobytes())
    assert len(seen) == 9


@pytest.mark.parametrize("weights", [None, [0.7, 0.3]])
@pytest.mark.parametrize("length", [{"steps": 1}, {"steps": 5}, {"epochs": 0.4}, {"epochs": 3}])
def test_examples_that_are_drawn_at_all(weights, length):
    one = order([np.arange(10, 27), np.arange(40, 50)], weights=weights, **length)
    ids = all_ids(one)
    assert one.drawn_ids().tolist() == sorted(set(ids[ids >= 0].tolist()))


@pytest.mark.parametrize("batch", [1, 4, 10, 64])
def test_every_example_once_an_epoch_and_the_last_step_is_ragged(batch):
    one = order([np.arange(10, 27), np.arange(40, 50)], batch=batch, epochs=2)
    ids = all_ids(one)
    assert len(ids) == one.num_steps * batch
    assert one.num_steps == -(-54 // batch)
    assert (ids[:54] >= 0).all()
    assert (ids[54:] == -1).all()
    examples = [*range(10, 27), *range(40, 50)]
    assert sorted(ids[:27]) == examples
    assert sorted(ids[27:54]) == examples
    assert not np.array_equal(ids[:27], ids[27:54])
    assert one.epoch(one.num_steps) == 2.0
    assert one.epoch(0) == 0.0


def test_steps_are_full_and_pass_over_epochs():
    run = order([np.arange(5)], batch=4, steps=10)
    ids = all_ids(run)
    assert len(ids) == 40
    assert run.num_steps == 10
    for start in range(0, 40, 5):
        assert sorted(ids[start : start + 5]) == list(range(5))
    assert run.epoch(5) == 4.0


@pytest.mark.parametrize(("epochs", "draws"), [(None, 30), (0.5, 15), (1.1, 33), (0.001, 1), (0.05, 2)])
def test_fractions_of_an_epoch(epochs, draws):
    assert order([np.arange(30)], epochs=epochs).num_draws == draws


def test_file_order():
    run = order([np.arange(5), np.arange(5, 7)], shuffle=False, batch=3, steps=4)
    assert all_ids(run).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]


def test_the_examples_of_a_step_do_not_depend_on_the_batch_size():
    def run(batch):
        groups = [np.arange(50), np.arange(50, 70)]
        return all_ids(order(groups, weights=[2, 1], batch=batch, steps=240 // batch))

    assert np.array_equal(run(8), run(24))
    assert np.array_equal(run(8), run(1))


def test_seeds_and_sources_have_orders_of_their_own():
    same = [np.arange(100), np.arange(100, 200)]
    ids = all_ids(order(same, weights=[1, 1], batch=10, epochs=1))
    first, second = ids[ids < 100], ids[ids >= 100] - 100
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    assert not np.array_equal(ids, all_ids(order(same, weights=[1, 1], batch=10, epochs=1, seed=4)))


@pytest.mark.parametrize(
    "weights",
    [[0.7, 0.3], [1, 1, 1], [0.999, 0.001], [0.5, 0.25, 0.2, 0.05], [1e-4] * 5 + [1.0], [1 / 3, 0.123456789, 3.14159],
     [0.9] + [0.01] * 10, [1e9, 1e-9], [5.0], [100, 1, 1, 1, 20, 20, 100, 1]],
)  # fmt: skip
def test_shares_are_kept_within_one_pair_after_every_step(weights):
    sizes = [5 + 13 * i for i in range(len(weights))]
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    run = order(groups, weights=weights, batch=7, steps=600)
    share = np.array(weights, float) / sum(weights)
    counts = np.zeros(len(weights))
    for step in range(run.num_steps):
        counts += np.bincount(np.searchsorted(starts, run.step_ids(step), side="right") - 1, minlength=len(weights))
        assert np.abs(counts - share * 7 * (step + 1)).max() < 1


def test_a_source_passes_through_its_own_epochs():
    run = order([np.arange(6), np.arange(6, 100)], weights=[3, 1], batch=8, steps=30)
    ids = all_ids(run)
    small = ids[ids < 6]
    for start in range(0, len(small) - 5, 6):
        assert sorted(small[start : start + 6]) == list(range(6))
    assert run.epoch(25) == 2.0


def test_assignment_repeats_after_the_sum_of_the_shares():
    shares = integer_shares([0.5, 0.25, 0.2, 0.05])
    assert shares == [10, 5, 4, 1]
    twice = chairman_assignment(shares, 40)
    assert np.array_equal(twice[:20], twice[20:])
    assert np.bincount(twice).tolist() == [20, 10, 8, 2]


def test_threads_and_order_of_calls_do_not_matter():
    run = order([np.arange(31), np.arange(31, 90)], weights=[1, 2], batch=5, steps=300)
    expected = [order([np.arange(31), np.arange(31, 90)], weights=[1, 2], batch=5, steps=300).step_ids(s).tolist()
                for s in range(300)]  # fmt: skip
    steps = permutation(300, 9, 9).tolist()
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda step: run.step_ids(step).tolist(), steps))
    assert all(drawn[i] == expected[step] for i, step in enumerate(steps))


def test_nothing_to_draw_is_refused():
    with pytest.raises(UserError, match="no training examples are left"):
        order([np.arange(0)])
    with pytest.raises(UserError, match=r"data.train.1.*weight 0.5"):
        order([np.arange(3), np.arange(0)], weights=[0.5, 0.5])


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(UserError, match=rf"weight must be .*, got {weight}"):
        SourceConfig(path="a.jsonl", weight=weight)
