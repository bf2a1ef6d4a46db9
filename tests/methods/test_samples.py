"""Samples of an evaluation: whose answers they are, and what is computed of them."""

import json
from types import SimpleNamespace

import jax
import pytest

from dpo_jax.config import DPOConfig, MeshConfig, ModelConfig, RunConfig, SFTConfig
from dpo_jax.config.file import parse_config
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.inference.generate import generate, rollout_weights
from dpo_jax.methods import samples
from dpo_jax.methods.rollouts import EVALUATION
from dpo_jax.methods.samples import PromptAnswerer, SamplePrompts
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.runs.directory import read_json
from dpo_jax.train import train
from dpo_jax.weights.open import open_model

PROMPTS = ["Once upon a time", "Once upon a time", "One day, a girl", "The cat"]
SAMPLING = {"max_tokens": 6, "temperature": 0.8}


@pytest.fixture
def sampled(shared, tmp_path):
    """Train two steps on four pairs, two of them with one prompt, and return the samples of the run."""

    def run(name, kind=DPOConfig, **sections):
        rows = [{"prompt": prompt, "chosen": f" there was {i}.", "rejected": " no"} for i, prompt in enumerate(PROMPTS)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = str(tmp_path / "pairs.jsonl")
        if kind is SFTConfig:
            rows = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in rows]
            pairs = str(tmp_path / "answers.jsonl")
            (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "model": {"path": str(shared / "models" / "stories260K"), "dtype": "float32"},
            "data": {
                "train": pairs,
                "eval": {"dev": pairs},
                "max_length": 64,
                "store": str(tmp_path / "store"),
                "workers": 1,
            },
            "sampling": SAMPLING,
            "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
            "batch": {"examples" if kind is SFTConfig else "pairs": 4},
            "run": {
                "dir": str(tmp_path / name),
                "steps": 2,
                "seed": 3,
                "samples": 3,
                "progress": False,
                "report": False,
            },
        }
        config = parse_config({key: tree.get(key, {}) | sections.get(key, {}) for key in tree | sections}, {}, kind)
        train(config, devices=jax.devices()[:1])
        return read_json(tmp_path / name / "samples.jsonl")

    return run


def answers_of(path, prompts) -> list[str]:
    """What a model answers with the keys of an evaluation."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        opened = open_model(ModelConfig(path=str(path), dtype="float32"), "cpu")
        tokenizer = opened.tokenizer()
        weights = rollout_weights(opened.model, opened.load(mesh), mesh)
        tokens, ends = tokenizer(prompts)["input_ids"], [tokenizer.eos_token_id]
        options = SamplingConfig(**SAMPLING)
        answers = generate(opened.model, weights, tokens, options, mesh, end_ids=ends, seed=3, step=EVALUATION)
        return [answer.text(tokenizer, prompt) for answer, prompt in zip(answers, tokens, strict=True)]


@pytest.mark.parametrize("mode", ["cached", pytest.param("live", marks=pytest.mark.slow)])
def test_the_policy_answers_at_each_evaluation_next_to_the_reference(mode, sampled, shared, tmp_path):
    rows = sampled("run", reference={"mode": mode})
    assert [(row["step"], row["row"], row["prompt"]) for row in rows] == [
        (step, i, PROMPTS[i]) for step in (0, 2) for i in (0, 2, 3)
    ]
    before, after = ([row["policy"]["text"] for row in part] for part in (rows[:3], rows[3:]))
    different = [PROMPTS[i] for i in (0, 2, 3)]
    assert before == answers_of(shared / "models" / "stories260K", different)
    assert after == answers_of(tmp_path / "run", different) != before
    assert [row["reference"]["text"] for row in rows] == 2 * before
    for row in rows:
        assert row["policy"]["finish_reason"] == "stop" or row["policy"]["num_tokens"] == SAMPLING["max_tokens"]


@pytest.mark.slow
def test_a_reference_that_moves_answers_anew(sampled):
    rows = sampled("run", reference={"sync_every": 1, "sync_mix": 1.0})
    assert all(row["policy"] == row["reference"] for row in rows)
    assert rows[0]["policy"] != rows[3]["policy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sections"), [(DPOConfig, {"loss": {"type": "simpo"}, "lora": {"rank": 2}}), (SFTConfig, {})]
)
def test_without_a_reference_the_start_stands_next_to_the_policy(kind, sections, sampled):
    rows = sampled("run", kind, **sections)
    assert (
        [row["start"] for row in rows[:3]] == [row["policy"] for row in rows[:3]] == [row["start"] for row in rows[3:]]
    )
    assert [row["policy"] for row in rows[3:]] != [row["start"] for row in rows[3:]]


def test_answers_are_the_same_in_blocks(shared, monkeypatch):
    """The keys of a row are its own, and rows that fill a block are left out."""
    setup = SimpleNamespace(
        config=SimpleNamespace(run=RunConfig(dir="x", seed=3), sampling=SamplingConfig(**SAMPLING)),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
    )
    opened = open_model(ModelConfig(path=str(shared / "models" / "stories260K"), dtype="float32"), "cpu")
    prompts = opened.tokenizer()(PROMPTS[1:])["input_ids"]
    answerer = PromptAnswerer(setup, opened.model, {"dev": SamplePrompts(None, None, prompts)}, [2])
    with jax.set_mesh(setup.mesh):
        whole = answerer(weights := opened.load(setup.mesh))
        monkeypatch.setattr(samples, "MAX_ROWS", 2)
        assert [answer.tokens for answer in answerer(weights)["dev"]] == [answer.tokens for answer in whole["dev"]]
