"""The reference: arrays of its own, log-probs kept whole or made again, and a start that is proven."""

import json
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_tokenizer import make_tokenizer

from dpo_jax.batch import PairLogps
from dpo_jax.config import DPOConfig, LossConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.inference.agreement import AGREEMENT
from dpo_jax.inference.reference import copy_weights
from dpo_jax.methods.setup import assemble, evaluate_sets, make_reference, reference_weights
from dpo_jax.methods.start_check import check_first, mean_margin, prove_start, start_logps, starts_equal
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.runs.checksums import weights_id
from dpo_jax.step import init_state, train_step
from dpo_jax.weights.open import load_weights

NUM_PAIRS = 10


def pointers(tree):
    return {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_copy_shares_no_memory_and_outlives_what_it_copies(dtype):
    """A cast to the same type alone would give the same array, and die with it."""
    weights = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}
    expected = jax.tree.map(lambda x: np.array(x.astype(dtype or x.dtype)), weights)
    copy = copy_weights(weights, dtype)
    assert not pointers(copy) & pointers(weights)
    jax.block_until_ready(jax.jit(lambda x: jax.tree.map(jnp.sin, x), donate_argnums=0)(weights))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))
    jax.tree.map(np.testing.assert_array_equal, copy, expected)
    assert jax.tree.map(lambda x: x.dtype, copy) == jax.tree.map(lambda x: x.dtype, expected)


# ------------------------------------------------------------------------------- a small run, assembled but not run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pairs, two of which are held out, and a tokenizer."""
    folder = tmp_path_factory.mktemp("reference")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"prompt": f"Q{i} " + "x" * i, "chosen": "yes" * (1 + i), "rejected": "no"} for i in range(NUM_PAIRS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@cache
def parts_of(folder, **overrides):
    """The parts of a run on one device, and its weights at the start."""
    config = parse_config(
        {
            "model": {"path": "builtin:tiny", "tokenizer": str(folder / "tokenizer")},
            "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.2, "workers": 1, "shuffle": False,
                     "store": str(folder / "store")},
            "batch": {"pairs": 3},
            "run": {"dir": str(folder / "run"), "epochs": 1},
        },
        {name.replace("__", "."): value for name, value in overrides.items()},
        DPOConfig,
    )  # fmt: skip
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    parts = assemble(config, mesh)
    return parts, load_weights(parts.source, parts.model, config.model, mesh)


@pytest.fixture
def live(folder):
    return parts_of(folder)


@pytest.fixture
def cached(folder):
    """Its cache is written again."""
    parts, start = parts_of(folder, reference__mode="cached")
    for path in parts.batches.store.path.glob("reference-*"):
        path.unlink()
    return parts, start


def test_a_live_reference_is_a_copy_of_the_start(live):
    parts, start = live
    reference = make_reference(parts, reference_weights(parts, start))
    assert not pointers(reference.params) & pointers(start)
    jax.tree.map(np.testing.assert_array_equal, reference.params, start)
    assert reference.of(parts.batches(0), parts.batches.store) is reference.params
    assert weights_id(reference.params) == weights_id(start)


def test_cached_log_probs_are_the_live_ones(live, cached):
    """In every step, empty slots of the last one included, and for the held-out set."""
    live_reference = make_reference(live[0], live[1])
    parts, start = cached
    reference = make_reference(parts, start)
    for step in range(parts.batches.order.num_steps):
        data = parts.batches(step)
        batch = parts.place(data.batch)
        kept = reference.of(data, parts.batches.store)
        run = jax.device_get(live[0].logps_step(live_reference.params, batch))
        np.testing.assert_allclose(kept.sum, run.sum, rtol=2e-6)
        for name in ("count", "valid", "weight"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(run, name), err_msg=name)
        assert isinstance(kept, PairLogps)
    assert (data.ids < 0).any()
    moved = jax.tree.map(lambda x: x * 1.1, start)
    ours, own = evaluate_sets(parts, moved, reference)
    theirs, other = evaluate_sets(live[0], moved, live_reference)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4), name
    assert abs(theirs["eval_held_out_rewards/margins"]) > 1e-3
    for one, two in zip(own[0]["by_length"], other[0]["by_length"], strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_cached_log_probs_of_an_accumulated_step_lie_in_its_parts(folder, cached):
    parts, _ = parts_of(folder, reference__mode="cached", batch__pairs=4, batch__accumulation=2)
    reference = make_reference(cached[0], cached[1])
    for step in range(2):
        data = parts.batches(step)
        found = reference.of(data, parts.batches.store)
        assert found.sum.shape == (2, 2, 2)
        together = reference.sums(parts.logps_step, data, parts.batches.store, [])
        np.testing.assert_array_equal(found.sum.reshape(4, 2), together)
        np.testing.assert_array_equal(found.valid, data.batch.valid)


def test_a_cached_reference_runs_no_forward_pass(cached, live):
    """Counted: a live reference is a second pass in the step and in evaluation, a cached one is none."""
    parts, start = cached
    reference = make_reference(parts, start)
    passes = []

    def counted(params, batch):
        passes.append(batch)
        return parts.logps_fn(params, batch)

    data = parts.batches(0)
    optimizer = optax.sgd(1.0)
    step = partial(train_step, logps_fn=counted, loss=parts.loss, optimizer=optimizer)
    state, batch = init_state(start, optimizer), parts.place(data.batch)
    for argument, count in ((start, 2), (reference.of(data, parts.batches.store), 1)):
        passes.clear()
        jax.eval_shape(step, state, argument, batch)
        assert len(passes) == count

    scored = []

    def counting_step(params, batch):
        scored.append(params)
        return parts.logps_step(params, batch)

    moved = jax.tree.map(lambda x: x * 1.1, start)
    evaluate_sets(replace(parts, logps_step=counting_step), moved, reference)
    assert scored
    assert all(params is moved for params in scored)
    num_batches = len(scored)
    evaluate_sets(replace(parts, logps_step=counting_step), moved, make_reference(*live))
    assert len(scored) == 3 * num_batches


# ---------------------------------------------------------------------------------------------------------- step 0


def test_a_start_that_is_its_own_reference_is_proven_bit_for_bit(live):
    parts, start = live
    policy, fixed = start_logps(parts, make_reference(parts, start), start)
    np.testing.assert_array_equal(policy, fixed)
    assert policy.shape == (3, 2)
    prove_start(parts, policy, fixed)
    other = jax.tree.map(lambda x: x * (1 + 1e-6), start)
    policy, _ = start_logps(parts, make_reference(parts, start), other)
    with pytest.raises(UserError, match=r"step 0: policy and reference are the same weights, .* \(allowed: 0\)"):
        prove_start(parts, policy, fixed)
    with pytest.raises(UserError, match="differ by nan"):
        prove_start(parts, policy * np.nan, fixed)


def test_a_cached_start_is_proven_within_a_bound(cached):
    parts, start = cached
    policy, fixed = start_logps(parts, make_reference(parts, start), start)
    prove_start(parts, policy, fixed)
    with pytest.raises(UserError, match=r"the cache in data\.store is stale or damaged"):
        prove_start(parts, policy, fixed * (1 + 3e-5))


@pytest.mark.parametrize("weight", [1.0, 3000.0])
def test_a_weighed_first_step_is_no_false_alarm(live, weight):
    parts, _ = live
    store = replace(parts.batches.store, weights=np.full(NUM_PAIRS, weight, np.float32))
    parts = replace(parts, batches=replace(parts.batches, store=store))
    data = parts.batches(0)
    loss = np.float32(np.log(2) * weight) * (1 + 1e-6)
    values = {"loss": loss, "logps/chosen": -4.0, "logps/rejected": -1.0, "kl": 0.0}
    check_first(parts, values, data)
    with pytest.raises(UserError, match=r"step 0: the loss is"):
        check_first(parts, values | {"loss": 1.001 * values["loss"]}, data)


def test_only_the_same_numbers_start_equal(folder):
    same, other = {"weights": "a", "reference": "a"}, {"weights": "a", "reference": "b"}
    config = parts_of(folder)[0].config
    assert starts_equal(config, same)
    assert not starts_equal(config, other)
    assert not starts_equal(config, same | {"adapters": "c"})
    cast = replace(config, reference=replace(config.reference, dtype="bfloat16"))
    assert not starts_equal(cast, same)
    assert starts_equal(replace(cast, model=replace(cast.model, param_dtype="bfloat16")), same)


def test_the_margin_of_another_reference_is_said():
    assert mean_margin(np.array([[-10, -14], [-9, -3]]), np.array([[-11, -12], [-9.5, -5]])) == (3 - 1.5) / 2


@pytest.mark.parametrize(("dtype", "bound"), AGREEMENT.items())
@pytest.mark.parametrize("weighting", ["none", "wpo"])  # of wpo the first loss is not known
def test_the_first_step_has_margins_of_0_within_the_bound_of_its_arithmetic(live, dtype, bound, weighting):
    """Also where margins of two signs cancel, so that loss and mean margin are right."""
    parts, _ = live
    parts = replace(parts, config=replace(parts.config, loss=LossConfig(weighting=weighting)),
                    model=replace(parts.model, dtype=dtype))  # fmt: skip
    values = {"loss": np.log(2), "logps/chosen": -30.0, "logps/rejected": -40.0, "rewards/margins": 0.0}
    check_first(parts, values | {"kl": (0.9 * bound * 40) ** 2 / 2}, parts.batches(0))
    for kl in ((1.1 * bound * 40) ** 2 / 2, np.nan):
        with pytest.raises(UserError, match=r"step 0: .* in the train step their log-probs differ by"):
            check_first(parts, values | {"kl": kl}, parts.batches(0))


@pytest.mark.parametrize("type_", ["sigmoid", "hinge", "ipo", "sppo_hard"])
def test_the_first_step_has_the_loss_of_margin_0(live, type_):
    parts, start = live
    parts = replace(parts, config=replace(parts.config, loss=LossConfig(type=type_)))
    data = parts.batches(0)
    expected = {"sigmoid": np.log(2), "hinge": 1, "ipo": 25, "sppo_hard": 50}[type_]
    values = {"loss": expected, "logps/chosen": -40.0, "logps/rejected": -15.0, "kl": 0.0}
    check_first(parts, values, data)
    for wrong in (1.001, 0.999, np.nan):
        with pytest.raises(UserError, match=r"step 0: the loss is .* but at margin 0 it is"):
            check_first(parts, values | {"loss": expected * wrong}, data)
    if type_ == "sigmoid":  # and it is what the step computes
        optimizer = optax.sgd(1.0)
        step = jax.jit(
            lambda state, reference, batch: train_step(
                state, reference, batch, logps_fn=parts.logps_fn, loss=parts.loss, optimizer=optimizer
            )
        )
        _, metrics = step(init_state(start, optimizer), start, parts.place(data.batch))
        check_first(parts, jax.device_get(metrics), data)
        assert abs(float(metrics["loss"]) - np.log(2)) < 3e-6
