"""Step number to batch: the same from any thread and in any order, with the right counts, in few shapes."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from small_tokenizer import make_tokenizer
from test_packing import assert_holds, pack

from dpo_jax.batching.batches import set_batches, train_batches
from dpo_jax.config import DPOConfig, SFTConfig
from dpo_jax.config.file import parse_config
from dpo_jax.methods.setup import sets_of

NUM_PAIRS, PAIRS_A_STEP = 26, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """26 pairs from one word to fifty, a fifth of which weigh a half, and texts."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("batches")
    rows = [{"prompt": "ask " * (1 + i % 5), "chosen": "yes " * (1 + i), "rejected": "no " * (1 + (7 * i) % 26),
             "weight": 0.5 if i % 5 == 0 else 1.0, "margin": i / 4} for i in range(NUM_PAIRS)]  # fmt: skip
    Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    Dataset.from_list([{"text": "word " * (1 + i)} for i in range(10)]).to_parquet(folder / "texts.parquet")
    return folder


def make(folder, kind=DPOConfig, devices=1, **overrides):
    sft = kind is SFTConfig
    config = parse_config(
        {
            "model": {"path": "unused"},
            "data": {"train": str(folder / ("texts.parquet" if sft else "pairs.parquet")), "workers": 1,
                     "store": str(folder / "store")},
            "batch": {"examples" if sft else "pairs": PAIRS_A_STEP},
            "run": {"dir": str(folder / "run"), "epochs": 2},
        },
        overrides,
        kind,
    )  # fmt: skip
    sets = sets_of(config, make_tokenizer())
    return config, sets, train_batches(sets, config.batch, devices)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.ids, expected.ids)
    jax.tree.map(np.testing.assert_array_equal, found.batch, expected.batch)
    assert (found.step, found.num_tokens, found.fill) == (expected.step, expected.num_tokens, expected.fill)


def test_a_step_is_the_same_from_any_thread_in_any_order(folder):
    _, _, batches = make(folder)
    expected = [make(folder)[2](step) for step in range(batches.order.num_steps)]
    assert len(expected) == 2 * NUM_PAIRS // PAIRS_A_STEP
    with ThreadPoolExecutor(4) as pool:
        for step, found in zip(reversed(range(len(expected))), pool.map(batches, reversed(range(len(expected))))):  # noqa: B905
            assert_same(found, expected[step])
    for start in (0, 5, len(expected) - 1):
        ahead = list(batches.ahead(range(start, len(expected))))
        assert len(ahead) == len(expected) - start
        for found, one in zip(ahead, expected[start:], strict=True):
            assert_same(found, one)
    assert not list(batches.ahead(range(3, 3)))


def test_a_seed_changes_the_order(folder):
    (_, _, one), (_, _, other) = make(folder), make(folder, **{"run.seed": 1})
    assert any(not np.array_equal(one(step).ids, other(step).ids) for step in range(3))


@pytest.mark.parametrize("options", [{}, {"batch.layout": "repeated"}, {"batch.layout": "padded"},
                                     {"batch.row_length": 256}], ids=str)  # fmt: skip
def test_a_step_holds_its_pairs_in_every_layout(folder, options):
    """The pairs of the store, whatever lays them, and their weights; tokens counted as TRL counts them."""
    _, sets, batches = make(folder, devices=2, **{"run.epochs": 1, **options})
    _, _, plain = make(folder, **{"run.epochs": 1})
    seen = []
    for step in range(batches.order.num_steps):
        data = batches(step)
        np.testing.assert_array_equal(data.ids, plain(step).ids)
        pairs = [None if i < 0 else sets.train.example(i) for i in data.ids]
        layout = options.get("batch.layout", "shared")
        assert_holds(data.batch, pairs, layout)
        real = data.ids[data.ids >= 0]
        seen += real.tolist()
        assert data.batch.weight.tolist() == [0 if i < 0 else sets.train.weights[i] for i in data.ids]
        assert data.batch.margin.tolist() == [0 if i < 0 else sets.train.rows[i] / 4 for i in data.ids]
        expected = sum(2 * len(p) + len(a) + len(b) for p, (a, b), _ in filter(None, pairs))
        assert data.num_tokens == expected
        assert data.fill == (data.batch.segments > 0).mean()
        assert data.batch.tokens.shape[0] % 2 == 0
    assert sorted(seen) == list(range(NUM_PAIRS))
    assert data.ids.tolist().count(-1) == 2  # the last step is ragged
    assert set(data.batch.weight.tolist()) <= {0.0, 0.5, 1.0}


def test_parts_of_a_step_are_its_runs_of_pairs(folder):
    _, sets, batches = make(folder, **{"batch.accumulation": 2, "run.epochs": 1})
    for step in (0, batches.order.num_steps - 1):
        data = batches(step)
        assert data.batch.valid.shape == (2, 2)
        for k in range(2):
            part = jax.tree.map(lambda x, k=k: x[k], data.batch)
            ids = data.ids[2 * k : 2 * k + 2]
            assert_holds(part, [None if i < 0 else sets.train.example(i) for i in ids], "shared")


def test_few_shapes_hold_the_run(folder):
    """A short run compiles one shape; a long one up to max_shapes, if they save slots."""
    _, _, short = make(folder)
    shapes = {short(step).batch.tokens.shape for step in range(short.order.num_steps)}
    assert len(shapes) == len(short.packer.shapes) == 1
    _, _, long = make(folder, **{"run.epochs": 60, "batch.pairs": 1})
    assert long.order.num_steps > 1000
    steps = range(0, long.order.num_steps, 31)
    shapes = {long(step).batch.tokens.shape for step in steps}
    assert 1 < len(shapes) <= len(long.packer.shapes) <= 4
    _, _, one = make(folder, **{"run.epochs": 60, "batch.pairs": 1, "batch.max_shapes": 1})
    assert len(one.packer.shapes) == 1
    fill = lambda batches: np.mean([batches(step).fill for step in steps])  # noqa: E731
    assert fill(long) > fill(one)


def test_a_set_is_held_once_in_order(folder):
    config, sets, _ = make(folder)
    ids = np.arange(0, NUM_PAIRS, 3)
    batches = set_batches(sets.train, ids, config.batch, 1)
    found = np.concatenate([batches(step).ids for step in range(batches.order.num_steps)])
    assert found.tolist() == [*ids, *[-1] * (-len(ids) % PAIRS_A_STEP)]


def test_texts_are_one_answer_each(folder):
    _, sets, batches = make(folder, SFTConfig, **{"run.epochs": 1})
    for step in range(batches.order.num_steps):
        data = batches(step)
        pairs = [None if i < 0 else sets.train.example(i) for i in data.ids]
        assert_holds(data.batch, pairs, "shared")
        assert data.num_tokens == sum(len(p) + len(a) for p, (a,), _ in filter(None, pairs))
        assert data.batch.answer_slots.shape == (PAIRS_A_STEP, 1)


def test_the_helper_of_other_tests_packs_as_runs_do(folder):
    _, sets, batches = make(folder, **{"run.epochs": 1})
    data = batches(0)
    packed = pack([sets.train.example(i) for i in data.ids])
    for name in ("target_tokens", "target_answers", "answer_slots", "valid"):
        laid = getattr(data.batch, name)
        held = getattr(packed, name)
        np.testing.assert_array_equal(laid[..., : held.shape[-1]] if laid.ndim == held.ndim else laid, held)
