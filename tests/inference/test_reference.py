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
from dpo_jax.inference.evaluation import evaluation_of, score_sets
from dpo_jax.inference.reference import copy_weights
from dpo_jax.methods.dpo import make_reference, reference_weights
from dpo_jax.methods.setup import assemble
from dpo_jax.methods.start_check import check_first, mean_margin, prove_start, start_logps, starts_equal
from dpo_jax.models.options import ExpertConfig
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
def setup_of(folder, **overrides):
    """The setup of a run on one device, and its weights at the start."""
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
    setup = assemble(config, mesh)
    return setup, load_weights(setup.source, setup.model, config.model, mesh)


def reference_of(setup, weights):
    """The reference of a run, which uses it for all its sets."""
    return make_reference(setup, weights, (setup.batches, *setup.evals.values()))


def evaluated(setup, weights, reference):
    scored = score_sets(setup.evals, setup.logps_step, setup.to_devices, weights, reference, {})
    return evaluation_of(scored, setup.config.objective)


@pytest.fixture
def live(folder):
    return setup_of(folder)


@pytest.fixture
def cached(folder):
    """Its cache is written again."""
    setup, start = setup_of(folder, reference__mode="cached")
    for path in setup.batches.store.path.glob("reference-*"):
        path.unlink()
    return setup, start


def test_a_live_reference_is_a_copy_of_the_start(live):
    setup, start = live
    reference = reference_of(setup, reference_weights(setup, start))
    assert not pointers(reference.weights) & pointers(start)
    jax.tree.map(np.testing.assert_array_equal, reference.weights, start)
    assert weights_id(reference.weights) == weights_id(start)


def test_cached_log_probs_are_the_live_ones(live, cached):
    """In every step, empty slots of the last one included, and for the held-out set."""
    live_reference = reference_of(live[0], live[1])
    setup, start = cached
    reference = reference_of(setup, start)
    for step in range(setup.batches.order.num_steps):
        data = setup.batches(step)
        batch = setup.to_devices(data.batch)
        kept = reference.of(data, setup.batches.store)
        run = jax.device_get(live[0].logps_step(live_reference.weights, batch))
        np.testing.assert_allclose(kept.sum, run.sum, rtol=2e-6)
        for name in ("count", "valid", "weight"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(run, name), err_msg=name)
        assert isinstance(kept, PairLogps)
    assert (data.ids < 0).any()
    moved = jax.tree.map(lambda x: x * 1.1, start)
    ours, own = evaluated(setup, moved, reference)
    theirs, other = evaluated(live[0], moved, live_reference)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4), name
    assert abs(theirs["eval_held_out_rewards/margins"]) > 1e-3
    for one, two in zip(own[0]["by_length"], other[0]["by_length"], strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_cached_log_probs_of_an_accumulated_step_lie_in_its_parts(folder, cached):
    setup, _ = setup_of(folder, reference__mode="cached", batch__pairs=4, batch__accumulation=2)
    reference = reference_of(cached[0], cached[1])
    for step in range(2):
        data = setup.batches(step)
        found = reference.of(data, setup.batches.store)
        assert found.sum.shape == (2, 2, 2)
        together = reference.sums(setup.logps_step, data, setup.batches.store, [])
        np.testing.assert_array_equal(found.sum.reshape(4, 2), together)
        np.testing.assert_array_equal(found.valid, data.batch.valid)


def test_a_cached_reference_runs_no_forward_pass(cached, live):
    """Counted: a live reference is a second pass in the step and in evaluation, a cached one is none."""
    setup, start = cached
    reference = reference_of(setup, start)
    passes = []

    def counted(params, batch):
        passes.append(batch)
        return setup.logps_fn(params, batch)

    data = setup.batches(0)
    optimizer = optax.sgd(1.0)
    step = partial(train_step, logps_fn=counted, loss=setup.config.objective, optimizer=optimizer)
    state, batch = init_state(start, optimizer), setup.to_devices(data.batch)
    for argument, count in ((start, 2), (reference.of(data, setup.batches.store), 1)):
        passes.clear()
        jax.eval_shape(step, state, argument, batch)
        assert len(passes) == count

    scored = []

    def counting_step(params, batch):
        scored.append(params)
        return setup.logps_step(params, batch)

    moved = jax.tree.map(lambda x: x * 1.1, start)
    evaluated(replace(setup, logps_step=counting_step), moved, reference)
    assert scored
    assert all(params is moved for params in scored)
    num_batches = len(scored)
    evaluated(replace(setup, logps_step=counting_step), moved, reference_of(*live))
    assert len(scored) == 3 * num_batches


# ---------------------------------------------------------------------------------------------------------- step 0


def test_a_start_that_is_its_own_reference_is_proven_bit_for_bit(live):
    setup, start = live
    policy, fixed = start_logps(setup, reference_of(setup, start), start)
    np.testing.assert_array_equal(policy, fixed)
    assert policy.shape == (3, 2)
    prove_start(setup, policy, fixed)
    other = jax.tree.map(lambda x: x * (1 + 1e-6), start)
    policy, _ = start_logps(setup, reference_of(setup, start), other)
    with pytest.raises(UserError, match=r"step 0: policy and reference have the same weights, .* \(tolerance: 0\)"):
        prove_start(setup, policy, fixed)
    with pytest.raises(UserError, match="differ by nan"):
        prove_start(setup, policy * np.nan, fixed)


def test_a_cached_start_is_proven_within_a_bound(cached):
    setup, start = cached
    policy, fixed = start_logps(setup, reference_of(setup, start), start)
    prove_start(setup, policy, fixed)
    with pytest.raises(UserError, match=r"the cache in data\.store is stale or damaged"):
        prove_start(setup, policy, fixed * (1 + 3e-5))


def test_two_programs_of_a_mixture_may_choose_other_experts_for_a_few_answers(cached):
    setup, _ = cached
    config = replace(setup.model.config, experts=ExpertConfig(number=4, per_token=2))
    setup = replace(setup, model=replace(setup.model, config=config))
    policy = np.full((50, 2), -40.0)
    reference = policy.copy()
    reference[3, 1] *= 1 + 5e-3
    assert "log-probs of 1 of 100 answers differ by more than 1e-05" in prove_start(setup, policy, reference)
    with pytest.raises(UserError, match=r"differ by 0\.0005 relative to their size on average \(tolerance: 0\.0001\)"):
        prove_start(setup, policy, policy * (1 + 5e-4))


@pytest.mark.parametrize("weight", [1.0, 3000.0])
def test_a_weighed_first_step_is_no_false_alarm(live, weight):
    setup, _ = live
    store = replace(setup.batches.store, weights=np.full(NUM_PAIRS, weight, np.float32))
    setup = replace(setup, batches=replace(setup.batches, store=store))
    data = setup.batches(0)
    loss = np.float32(np.log(2) * weight) * (1 + 1e-6)
    values = {"loss": loss, "logps/chosen": -4.0, "logps/rejected": -1.0, "kl": 0.0}
    check_first(setup, values, data)
    with pytest.raises(UserError, match=r"step 0: the loss is"):
        check_first(setup, values | {"loss": 1.001 * values["loss"]}, data)


def test_only_the_same_numbers_start_equal(folder):
    same, other = {"weights": "a", "reference": "a"}, {"weights": "a", "reference": "b"}
    config = setup_of(folder)[0].config
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
    setup, _ = live
    setup = replace(setup, config=replace(setup.config, loss=LossConfig(weighting=weighting)),
                    model=replace(setup.model, dtype=dtype))  # fmt: skip
    values = {"loss": np.log(2), "logps/chosen": -30.0, "logps/rejected": -40.0, "rewards/margins": 0.0}
    check_first(setup, values | {"kl": (0.9 * bound * 40) ** 2 / 2}, setup.batches(0))
    for kl in ((1.1 * bound * 40) ** 2 / 2, np.nan):
        with pytest.raises(UserError, match=r"step 0: .* in the train step their log-probs differ by"):
            check_first(setup, values | {"kl": kl}, setup.batches(0))


@pytest.mark.parametrize("type_", ["sigmoid", "hinge", "ipo", "sppo_hard"])
def test_the_first_step_has_the_loss_of_margin_0(live, type_):
    setup, start = live
    setup = replace(setup, config=replace(setup.config, loss=LossConfig(type=type_)))
    data = setup.batches(0)
    expected = {"sigmoid": np.log(2), "hinge": 1, "ipo": 25, "sppo_hard": 50}[type_]
    values = {"loss": expected, "logps/chosen": -40.0, "logps/rejected": -15.0, "kl": 0.0}
    check_first(setup, values, data)
    for wrong in (1.001, 0.999, np.nan):
        with pytest.raises(UserError, match=r"step 0: the loss is .* but it must be"):
            check_first(setup, values | {"loss": expected * wrong}, data)
    if type_ == "sigmoid":  # and it is what the step computes
        optimizer = optax.sgd(1.0)
        step = jax.jit(
            lambda state, reference, batch: train_step(
                state, reference, batch, logps_fn=setup.logps_fn, loss=setup.config.objective, optimizer=optimizer
            )
        )
        _, metrics = step(init_state(start, optimizer), start, setup.to_devices(data.batch))
        check_first(setup, jax.device_get(metrics), data)
        assert abs(float(metrics["loss"]) - np.log(2)) < 3e-6
