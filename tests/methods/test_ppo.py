"""PPO and RLOO on models: runs from config to export, their resume, their checks, and what is refused."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from reward_models import save_reward_model
from rewards import vowels

from dpo_jax.batch import PreferenceBatch
from dpo_jax.config import MeshConfig, ModelConfig, PPOConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.inference import generate
from dpo_jax.methods.rollouts import checked_scores
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.runs.directory import RunDir, read_json
from dpo_jax.runs.session import Session
from dpo_jax.train import train
from dpo_jax.weights.open import open_model

STEPS = 4


def options(shared: Path, folder: Path, name: str = "run", **sections) -> PPOConfig:
    """A short run on stories260K and three prompts."""
    data = folder / "prompts.jsonl"
    texts = ["Once upon a time", "One day, a girl", "Tim and Sue went to the park.", "The cat"]
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tree = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {"train": str(data), "max_length": 64, "store": str(folder / "store"), "workers": 1},
        "reward": {"function": "rewards:vowels"},
        "sampling": {"max_tokens": 8},
        "ppo": {"kl_coef": 0.1, "epochs": 2, "answers": 2},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"prompts": 4},
        "run": {"dir": str(folder / name), "steps": STEPS, "progress": False, "report": False},
    }
    return parse_config({key: tree.get(key, {}) | sections.get(key, {}) for key in tree | sections}, {}, PPOConfig)


def with_reward_model(shared: Path, folder: Path, sections: dict) -> dict:
    """The sections, with a reward model in place of the function if the value model starts from it."""
    if sections.get("ppo", {}).get("value_model") != "reward":
        return sections
    save_reward_model(open_model(ModelConfig(path=str(shared / "models" / "stories260K")), "cpu"), folder / "reward")
    return sections | {"reward": {"path": str(folder / "reward"), "function": None}}


def train_on_one(config: PPOConfig) -> None:
    """Train on one device, for which a program compiles fastest."""
    train(config, devices=jax.devices()[:1])


def metrics_of(config: PPOConfig) -> list[dict]:
    return [row for row in read_json(RunDir(Path(config.run.dir)).metrics) if "grad_norm" in row]


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    """A run of PPO to its end, with its evaluation, report and export."""
    folder = tmp_path_factory.mktemp("ppo")
    config = options(shared, folder, run={"report": True, "export": True, "samples": 3}, data={"eval_fraction": 0.25})
    train_on_one(config)
    return config


def test_the_first_rollout_is_the_reference_s_and_its_first_ratios_are_1(run):
    rows = metrics_of(run)
    assert abs(rows[0]["sampled_kl"]) < 1e-5
    assert all(0 <= row["mean_ratio_error"] <= row["ratio_error"] < 1e-5 for row in rows)
    assert max(row["mean_sampler_error"] for row in rows) < 1e-5
    assert max(row["sampler_error"] for row in rows) < 1e-4
    assert rows[-1]["sampled_kl_k3"] > 0
    assert 0 < rows[0]["score"] < 1  # fractions survive
    np.testing.assert_allclose(rows[0]["rlhf_reward"], rows[0]["score"], atol=1e-6)


def test_the_run_is_evaluated_reported_and_exported(run):
    evaluations = [row for row in read_json(Path(run.run.dir) / "metrics.jsonl") if "eval_held_out_score" in row]
    assert [row["step"] for row in evaluations] == [0, STEPS]
    assert (evaluations[0]["eval_held_out_sampled_kl"], evaluations[0]["eval_held_out_win_rate"]) == (0, 0.5)
    assert evaluations[1]["eval_held_out_sampled_kl"] != 0
    report = (Path(run.run.dir) / "report.html").read_text()
    assert "Policy gradient" in report
    assert "gae, KL coefficient 0.1, 2 updates a step" in report
    assert "reference, and policy at step 0, score 0." in report
    exported = open_model(run.model.__class__(path=str(Path(run.run.dir) / "export")), "cpu")
    resaved = open_model(run.model.__class__(path=run.run.dir), "cpu")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    first, second = exported.load(mesh), resaved.load(mesh)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    start = open_model(run.model, "cpu").load(mesh)
    assert not np.array_equal(first["embed"], start["embed"])


def test_samples_are_scored_by_the_judge_and_begin_as_the_reference(run):
    first, last = read_json(Path(run.run.dir) / "samples.jsonl")
    assert [row["step"] for row in (first, last)] == [0, STEPS]
    assert first["policy"] == first["reference"] == last["reference"] != last["policy"]
    for answer in (first["policy"], last["policy"]):
        (score,) = vowels([first["prompt"]], [answer["text"]], [{"prompt": first["prompt"]}])
        assert answer["score"] == pytest.approx(score, abs=1e-6)


class Killed(Exception):
    """Ends a run between two steps."""


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="gae", marks=pytest.mark.slow),
        pytest.param({"ppo": {"estimator": "rloo"}, "lora": {"rank": 2}}, id="rloo-lora", marks=pytest.mark.slow),
        pytest.param({"lora": {"rank": 2}, "batch": {"accumulation": 2}}, id="gae-lora", marks=pytest.mark.slow),
        pytest.param({"ppo": {"value_model": "shared"}, "lora": {"rank": 2}}, id="shared-lora", marks=pytest.mark.slow),
        pytest.param({"ppo": {"value_model": "reward"}}, id="reward", marks=pytest.mark.weekly),
    ],
)
def test_a_run_killed_at_any_step_is_as_one_that_never_was(shared, tmp_path, monkeypatch, sections):
    sections = with_reward_model(shared, tmp_path, sections)
    whole = options(shared, tmp_path, "whole", **sections)
    train_on_one(whole)
    killed = options(shared, tmp_path, "killed", checkpoint={"every": 1, "keep": 9}, **sections)
    log = Session.log

    def log_and_die(self, step, metrics, facts):
        log(self, step, metrics, facts)
        if step + 1 in (1, 3) and not (tmp_path / f"died{step}").exists():
            (tmp_path / f"died{step}").touch()
            raise Killed

    monkeypatch.setattr(Session, "log", log_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            train_on_one(killed)
    train_on_one(killed)
    assert metrics_of(killed) == metrics_of(whole)
    assert metrics_of(whole)[-1]["sampled_kl_k3"] > 1e-6


@pytest.mark.parametrize(
    "value_model",
    [
        pytest.param("policy", marks=pytest.mark.weekly),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("reward", "shared")),
    ],
)
def test_8_devices_sample_the_same_tokens_and_make_the_same_update(shared, tmp_path, value_model):
    sections = with_reward_model(shared, tmp_path, {"ppo": {"value_model": value_model}})
    rows = []
    for name, mesh in (("one", {"fsdp": 1}), ("eight", {"data": 2, "fsdp": 2, "tensor": 2})):
        config = options(shared, tmp_path, name, mesh=mesh, batch={"prompts": 8}, **sections)
        train(config, devices=jax.devices()[:1] if name == "one" else jax.devices())
        rows.append(metrics_of(config)[0])
    for name in ("length", "sampled_tokens"):
        assert rows[0][name] == rows[1][name]
    for name in ("score", "loss", "grad_norm", "value_loss", "sampled_kl_k3"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], rtol=1e-4, atol=1e-6)


def test_rows_without_a_prompt_to_answer_may_be_errors(shared, tmp_path):
    causes = {"prompts_differ": "error", "empty_answer": "error"}  # of conversations that end with the wrong side
    assert options(shared, tmp_path, data={"invalid_rows": causes}).data.invalid_rows.prompts_differ == "error"


def test_the_seed_of_the_samples_may_be_given_without_shuffling(shared, tmp_path):
    assert options(shared, tmp_path, data={"shuffle": False}, run={"seed": 3}).run.seed == 3


@pytest.mark.slow
def test_positions_that_differ_between_sampling_and_training_are_refused(shared, tmp_path, monkeypatch):
    gather = PreferenceBatch.gather_tokens
    shifted = lambda self, values, n: jax.numpy.roll(gather(self, values, n), 1, axis=-1)  # noqa: E731
    monkeypatch.setattr(PreferenceBatch, "gather_tokens", shifted)
    with pytest.raises(UserError, match="sampler and train step compute different log-probs"):
        train_on_one(options(shared, tmp_path))


@pytest.mark.slow
def test_bfloat16_is_trained_and_shifted_positions_are_refused_in_it(shared, tmp_path, monkeypatch):
    config = options(shared, tmp_path, model={"dtype": "bfloat16"})
    train_on_one(config)
    errors = [(row["sampler_error"], row["mean_sampler_error"]) for row in metrics_of(config)]
    assert all(mean < 0.02 < largest for largest, mean in errors)  # the largest would refuse a run that is right
    gather = PreferenceBatch.gather_tokens
    shifted = lambda self, values, n: jax.numpy.roll(gather(self, values, n), 1, axis=-1)  # noqa: E731
    monkeypatch.setattr(PreferenceBatch, "gather_tokens", shifted)
    with pytest.raises(UserError, match="sampler and train step compute different log-probs"):
        train_on_one(options(shared, tmp_path, "shifted", model={"dtype": "bfloat16"}))


@pytest.mark.slow
def test_a_sampler_with_other_weights_is_refused(shared, tmp_path, monkeypatch):
    def scaled(model, weights, mesh):
        return jax.tree.map(lambda x: 1.1 * x, generate.rollout_weights(model, weights, mesh))

    monkeypatch.setattr(sys.modules["dpo_jax.methods.on_policy"], "rollout_weights", scaled)
    with pytest.raises(UserError, match=r"mean_sampler_error is .*different log-probs"):
        train_on_one(options(shared, tmp_path))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ppo": {"kl_estimator": "k3"}}, "ppo.kl_estimator: unknown option: the penalty is k1"),
        ({"sampling": {"top_p": 0.9}}, "sampling.top_p: 0.9 cannot be used: training needs samples"),
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature: 0.7 cannot be used"),
        ({"reference": {"mode": "cached"}}, "reference.mode: 'cached' cannot be used: new answers need a live ref"),
        ({"ppo": {"estimator": "rloo", "answers": 1}}, "ppo.answers: 1 cannot be used: rloo compares the answers"),
        ({"ppo": {"estimator": "rloo", "gae_lambda": 0.5}}, "ppo.gae_lambda"),
        (
            {"ppo": {"estimator": "rloo", "value_model": "shared"}},
            "ppo.value_model: 'shared' cannot be used: estimator",
        ),
        ({"ppo": {"value_model": "reward"}}, "ppo.value_model: 'reward' cannot be used: a reward function has no weig"),
        ({"reward": {"path": "somewhere"}}, "vowels' cannot be used: reward.path is set, too"),
        ({"reward": {"function": "vowels"}}, "reward.function: 'vowels' cannot be used: give a module and a function"),
        ({"data": {"invalid_rows": {"template_not_prefix": "drop"}}}, "data.invalid_rows.template_not_prefix"),
        ({"sampling": {"max_tokens": 64}}, "sampling.max_tokens: 64 cannot be used: data.max_length is 64"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(shared, tmp_path, sections, message):
    with pytest.raises(UserError) as refusal:
        options(shared, tmp_path, **sections)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "it returned 1 scores for 2 answers"),
        ([1.0, float("nan")], "score 1 is nan"),
        (None, "returned NoneType"),
        (["good", "bad"], "returned list"),
    ],
)
def test_scores_that_are_not_a_number_each_are_refused(scores, message):
    with pytest.raises(UserError, match=message):
        checked_scores("reward.function", "m:f", scores, 2)


def test_a_reward_function_that_fails_ends_the_run_in_one_line(shared, tmp_path):
    with pytest.raises(UserError, match=r"reward.function: json:nothing cannot be imported"):
        train_on_one(options(shared, tmp_path, reward={"function": "json:nothing"}))
    with pytest.raises(UserError, match=r"reward.function: json:loads failed: .*"):
        train_on_one(options(shared, tmp_path, reward={"function": "json:loads"}))
