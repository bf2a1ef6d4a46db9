"""Online DPO: its labels and its gradient against a computation by hand, its checks, resume, and what is refused."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_forward import log_probs

from dpo_jax.batch import Adapted, PreferenceBatch, pad_pairs
from dpo_jax.config import DPOConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.inference import generate
from dpo_jax.methods.online_dpo import labeled_pairs, online_dpo
from dpo_jax.methods.setup import assemble
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.runs.directory import RunDir, read_json
from dpo_jax.step import pair_gradient
from dpo_jax.train import train

STEPS = 4
TEXTS = ["Once upon a time", "One day, a girl", "Tim and Sue went to the park.", "The cat"]


def options(shared: Path, folder: Path, name: str = "run", online=None, **sections) -> DPOConfig:
    """A short run on stories260K and four prompts, three answers to each."""
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    tree = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {
            "train": str(data), "max_length": 64, "store": str(folder / "store"), "workers": 1,
            "online": {"reward": {"function": "rewards:vowels"}, "answers": 3} | (online or {}),
        },
        "sampling": {"max_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"pairs": 4},
        "run": {"dir": str(folder / name), "steps": STEPS, "progress": False, "report": False},
    }  # fmt: skip
    return parse_config({key: tree.get(key, {}) | sections.get(key, {}) for key in tree | sections}, {}, DPOConfig)


def train_on_one(config: DPOConfig) -> None:
    """Train on one device, for which a program compiles fastest."""
    train(config, devices=jax.devices()[:1])


def lines_of(config: DPOConfig) -> list[dict]:
    return read_json(RunDir(Path(config.run.dir)).metrics)


def metrics_of(config: DPOConfig) -> list[dict]:
    return [row for row in lines_of(config) if "grad_norm" in row]


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    """A run to its end, with its evaluation and report."""
    config = options(shared, tmp_path_factory.mktemp("online"), run={"report": True}, data={"eval_fraction": 0.25})
    train_on_one(config)
    return config


def test_best_and_worst_are_paired_and_labeled_by_the_difference_of_their_scores():
    scores = jnp.array([[0.0, 2.0, -1.0], [5.0, 5.0, 5.0], [1.0, 0.0, 1.0]])
    pairs, label = labeled_pairs(scores)
    assert pairs.tolist() == [[1, 2], [0, 2], [0, 1]]
    np.testing.assert_allclose(label, jax.nn.sigmoid(jnp.array([3.0, 0.0, 1.0])), rtol=1e-6)
    assert labeled_pairs(scores, "hard")[1].tolist() == [1.0, 0.5, 1.0]


def test_the_first_step_is_proven_and_the_sampler_agrees_in_all(run):
    rows = metrics_of(run)
    assert len(rows) == STEPS
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=3e-6)
    assert abs(rows[0]["rewards/margins"]) < 1e-5
    assert rows[0]["sampled_kl"] == 0
    assert rows[-1]["sampled_kl"] != 0
    assert max(row["mean_sampler_error"] for row in rows) < 1e-5
    for row in rows:
        assert 0 < row["score/worst"] < row["score"] < row["score/best"] < 1
        assert row["sampled_tokens"] > 0
        assert row["pairs"] == 4


def test_the_run_is_evaluated_against_the_reference_and_reported(run):
    first, last = (row for row in lines_of(run) if "eval_held_out_score" in row)
    assert (first["eval_held_out_sampled_kl"], first["eval_held_out_win_rate"]) == (0, 0.5)
    assert last["eval_held_out_sampled_kl"] != 0
    report = (Path(run.run.dir) / "report.html").read_text()
    assert "Online DPO" in report
    assert "sigmoid, beta 0.1, soft labels of the best and the worst of 3 answers" in report


def by_hand(method, weights, reference, prompts, answers, scores) -> dict:
    """The gradient of online DPO with sequences padded one by one, in both orders."""
    model, loss = replace(method.setup.model, attention="xla"), method.setup.config.loss

    def sums(weights, batch):
        shape = batch.tokens.shape
        tokens = batch.tokens.reshape(-1, shape[-1])
        logps = log_probs(model, weights, tokens, jnp.full(len(tokens), shape[-1]))
        each = jnp.take_along_axis(logps[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0].reshape(*shape[:2], -1)
        return jnp.where(batch.mask[:, :, 1:], each, 0.0).sum(-1)

    best, worst = scores.argmax(1), scores.argmin(1)
    gap = np.take_along_axis(scores, best[:, None], 1) - np.take_along_axis(scores, worst[:, None], 1)
    p = 1 / (1 + np.exp(-gap[:, 0]))
    batch = pad_pairs(prompts, *([row[i] for row, i in zip(answers, index, strict=True)] for index in (best, worst)))

    def objective(weights):
        s = sums(weights, batch) - sums(reference, batch)
        margin = loss.beta * (s[:, 0] - s[:, 1])
        both = jnp.concatenate([margin, -margin]), jnp.concatenate([2 * p, 2 * (1 - p)])
        return (-jax.nn.log_sigmoid(both[0]) * both[1]).mean()

    return jax.jit(jax.grad(objective))(weights)


@pytest.mark.parametrize(
    "batch",
    [
        {"pairs": 4},
        pytest.param({"pairs": 4, "accumulation": 2}, marks=pytest.mark.slow),
        pytest.param({"pairs": 4, "layout": "padded"}, marks=pytest.mark.slow),
    ],
    ids=["shared", "accumulated", "padded"],
)
def test_the_gradient_is_that_of_padded_pairs_in_both_orders(shared, tmp_path, batch):
    config = options(shared, tmp_path, batch=batch, run={"token_stats": False})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        method, start = online_dpo(assemble(config, mesh), {})
        weights = jax.tree.map(jnp.copy, start.trained)
        state = method.first_state(start)
        key = jax.random.key(0)
        reference = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), weights)
        data = method.batch(0, state)
        accumulation = batch.get("accumulation", 1)
        grads, policy, _ = jax.jit(
            partial(pair_gradient, logps_fn=method.setup.logps_fn, loss=config.loss, accumulation=accumulation)
        )(weights, replace(data.frozen, reference=reference), data.batch)
        ids = method.setup.batches.order.step_ids(0)
        copy = generate.rollout_weights(method.setup.model, weights, mesh)
        graded = method.sampler(copy, method.setup.batches.store, ids, 0)
        answers = [[answer.tokens for answer in row] for row in graded.answers]
        expected = by_hand(method, weights, reference, graded.prompts, answers, graded.scores)
    difference, size = (
        np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(tree)))
        for tree in (jax.tree.map(jnp.subtract, grads, expected), expected)
    )
    assert difference / size < 2e-5
    assert 0.5 < float(policy.label.min()) < float(policy.label.max()) < 0.6  # scores differ by less than 0.4


def test_an_answer_without_end_pays_the_penalty_before_it_is_judged(shared, tmp_path):
    config = options(shared, tmp_path, online={"missing_eos_penalty": 9.0})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        method, start = online_dpo(assemble(config, mesh), {})
        state = method.first_state(start)
        sampler = method.sampler

        def first_ended(*arguments):  # of the three answers to each prompt
            graded = sampler(*arguments)
            rows = [[answer._replace(ended=k == 0) for k, answer in enumerate(row)] for row in graded.answers]
            return graded._replace(answers=rows)

        label = np.asarray(replace(method, sampler=first_ended).batch(0, state).batch.label)
    assert (label > 0.999).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"rank": 2}, "batch": {"pairs": 4, "accumulation": 2}},
        {"reference": {"sync_every": 2}, "online": {"labels": "hard"}},
        {"loss": {"type": "simpo"}},
    ],
    ids=["lora", "sync", "reference-free"],
)
def test_variants_agree_with_the_sampler_and_start_at_margin_0(shared, tmp_path, sections):
    config = options(shared, tmp_path, data={"eval_fraction": 0.25}, **sections)
    train_on_one(config)
    rows = metrics_of(config)
    assert max(row["mean_sampler_error"] for row in rows) < 1e-5
    assert ("sampled_kl" in rows[0]) == ("loss" not in sections)
    first = lines_of(config)[0]
    assert first.get("eval_held_out_win_rate", 0.5) == 0.5
    assert ("eval_held_out_win_rate" in first) == ("loss" not in sections)
    if "sync_every" in sections.get("reference", {}):
        kl = [abs(row["sampled_kl"]) for row in rows]
        assert kl[0] == 0 < kl[1]


@pytest.mark.slow
def test_tied_answers_leave_equal_models_as_they_are(shared, tmp_path):
    config = options(shared, tmp_path, online={"reward": {"function": "rewards:equal"}})
    train_on_one(config)
    for row in metrics_of(config):
        assert row["tied"] == 1
        assert row["grad_norm"] < 1e-5


@pytest.mark.slow
def test_8_devices_sample_the_same_tokens_and_make_the_same_update(shared, tmp_path):
    rows = []
    for name, mesh in (("one", {"fsdp": 1}), ("eight", {"data": 2, "fsdp": 2, "tensor": 2})):
        config = options(shared, tmp_path, name, mesh=mesh, batch={"pairs": 8})
        train(config, devices=jax.devices()[:1] if name == "one" else jax.devices())
        rows.append(metrics_of(config)[:2])
    for one, eight in zip(*rows, strict=True):
        for name in ("score", "score/best", "length", "sampled_tokens"):
            assert one[name] == eight[name]
        for name in ("loss", "grad_norm", "sampled_kl", "logps/chosen"):
            np.testing.assert_allclose(one[name], eight[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_sampler_with_other_weights_is_refused(shared, tmp_path, monkeypatch):
    def scaled(model, weights, mesh):
        return jax.tree.map(lambda x: 1.1 * x, generate.rollout_weights(model, weights, mesh))

    monkeypatch.setattr(sys.modules["dpo_jax.methods.on_policy"], "rollout_weights", scaled)
    with pytest.raises(UserError, match=r"mean_sampler_error is .*different log-probs"):
        train_on_one(options(shared, tmp_path))


@pytest.mark.slow
def test_adapters_that_the_sampler_lacks_are_refused(shared, tmp_path, monkeypatch):
    def without(model, weights, mesh):
        assert isinstance(weights, Adapted)
        return generate.rollout_weights(model, weights.base, mesh)

    monkeypatch.setattr(sys.modules["dpo_jax.methods.on_policy"], "rollout_weights", without)
    with pytest.raises(UserError, match=r"mean_sampler_error is .*different log-probs"):
        train_on_one(options(shared, tmp_path, lora={"rank": 2}, optimizer={"learning_rate": 1e-1}))


@pytest.mark.slow
def test_answers_of_another_slot_are_refused(shared, tmp_path, monkeypatch):
    gather = PreferenceBatch.gather_pairs
    monkeypatch.setattr(PreferenceBatch, "gather_pairs", lambda self, values: jnp.roll(gather(self, values), 1, axis=0))
    with pytest.raises(UserError, match=r"mean_sampler_error is .*different log-probs"):
        train_on_one(options(shared, tmp_path))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"online": {"answers": 1}}, "data.online.answers must be at least 2, got 1"),
        ({"sampling": {"top_p": 0.9}}, "sampling.top_p: 0.9 cannot be used: training needs samples of the unmodified"),
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature: 0.7 cannot be used"),
        ({"sampling": {"max_tokens": 64}}, "sampling.max_tokens: 64 cannot be used: data.max"),
        ({"online": {"reward": {}}}, "data.online.reward.path: None cannot be used: give a reward model, or a Python"),
        ({"reference": {"mode": "cached"}}, "reference.mode: 'cached' cannot be used: new answers need"),
        ({"loss": {"types": ["sigmoid", "sft"]}}, "loss.types: ('sigmoid', 'sft') cannot be used: sft imitates"),
        ({"loss": {"type": "orpo"}}, "loss.type: 'orpo' cannot be used: orpo imitates the chosen answers"),
        ({"loss": {"type": "aot"}}, "loss.type: 'aot' cannot be used: aot sorts the pairs of a step"),
        ({"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing: 0.1 cannot be used: soft labels are probabilities"),
        ({"loss": {"weighting": "wpo"}}, "loss.weighting: 'wpo' cannot be used"),
        ({"data": {"append_eos": False}}, "data.append_eos: False cannot be used: the policy ends its answers"),
        ({"data": {"invalid_rows": {"equal_answers": "keep"}}}, "data.invalid_rows.equal_answers: 'keep' cannot"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_line(shared, tmp_path, sections, message):
    with pytest.raises(UserError) as refusal:
        options(shared, tmp_path, **sections)
    assert message in str(refusal.value)


def test_eval_reads_the_pairs_of_the_data(tmp_path):
    config = tmp_path / "config.yaml"
    tree = {"model": {"path": "m"}, "data": {"train": "a"}, "run": {"dir": "r"}}
    online = {"reward": {"function": "rewards:vowels"}}
    config.write_text(json.dumps(tree | {"data": tree["data"] | {"online": online}, "sampling": {"max_tokens": 8}}))
    read = parse_config(config, {}, DPOConfig).without_online()
    assert read == parse_config(tree, {}, DPOConfig)
    read = parse_config(config, {"data.eval.dev": "pairs", "data.shuffle": False, "run.seed": 3}, DPOConfig)
    assert read.without_online().data.train == (read.data.eval["dev"],)  # the others may be prompts alone
