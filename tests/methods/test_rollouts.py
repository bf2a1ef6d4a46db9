"""Judges of sampled answers: what a reward model reads, where a function runs, and which answer wins."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reward_models import save_reward_model

from dpo_jax.config import PPOConfig
from dpo_jax.config.file import parse_config
from dpo_jax.inference.generate import Answer
from dpo_jax.methods.on_policy import wins
from dpo_jax.methods.rollouts import Graded, answer_tail, make_judge, make_rollout, prompt_tokens
from dpo_jax.methods.setup import assemble
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.weights.open import open_model

TEXTS = {"Once upon a time": " there was a dog.", "One day, a girl": " went to the park."}


def config_of(shared: Path, folder: Path, reward: Any) -> PPOConfig:
    """A run on the prompts of `TEXTS`."""
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in TEXTS))
    tree = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {"train": str(data), "max_length": 64, "store": str(folder / "store"), "workers": 1},
        "reward": reward,
        "sampling": {"max_tokens": 32},
        "batch": {"prompts": 2},
        "run": {"dir": str(folder / "run"), "steps": 1, "progress": False},
    }
    return parse_config(tree, {}, PPOConfig)


def test_a_reward_model_gives_the_same_scores_by_the_policy_s_tokens_and_by_the_text(shared, tmp_path):
    """Prompts that are text use no chat template, so another one changes how the reward model reads, not what."""
    config = config_of(shared, tmp_path, str(tmp_path / "reward"))
    setup = assemble(config, make_mesh(config.mesh, jax.devices()[:1]))
    store, tokenizer, tail = setup.batches.store, setup.tokenizer, answer_tail(setup)
    prompts = [prompt_tokens(store, i) for i in range(2)]
    wholes = [tokenizer(prompt + text)["input_ids"] for prompt, text in TEXTS.items()]
    answers = []
    for prompt, whole in zip(prompts, wholes, strict=True):
        assert whole[: len(prompt)] == prompt
        cut = whole[len(prompt) :]
        of_prompt = [(cut, False), (cut + tail, True), (tail, True)]
        answers.append([Answer(tokens, [0.0] * len(tokens), ended) for tokens, ended in of_prompt])
    scores = {}
    for name, template in (("tokens", None), ("text", "{{ messages }}")):
        save_reward_model(open_model(config.model, "cpu"), tmp_path / "reward", template)
        judge, _ = make_judge(setup, config.reward, tail)
        scores[name] = judge(store, np.arange(2), prompts, answers)
    np.testing.assert_allclose(scores["text"], scores["tokens"], atol=1e-6)
    assert len(set(np.round(scores["tokens"].ravel(), 4))) == 6


def test_a_function_that_uses_jax_runs_on_one_device(shared, tmp_path):
    """Another process would wait for ever for an array over the devices of all."""
    config = config_of(shared, tmp_path, {"function": "rewards:devices"})
    setup = assemble(config, make_mesh(config.mesh))
    prompts = [prompt_tokens(setup.batches.store, i) for i in range(2)]
    with jax.set_mesh(setup.mesh):
        judge, _ = make_judge(setup, config.reward, answer_tail(setup))
        scores = judge(setup.batches.store, np.arange(2), prompts, [[Answer([5], [0.0], False)]] * 2)
    np.testing.assert_array_equal(scores, [[1.0], [1.0]])


def test_an_answer_ties_with_the_same_tokens_and_with_the_same_score():
    def graded(tokens, scores):
        return Graded([[1]] * 4, [[Answer([t], [0.0], False)] for t in tokens], np.array(scores, np.float32)[:, None])

    won = wins(graded([5, 6, 7, 8], [1.0, 0.5, 0.2, 0.9]), graded([5, 7, 8, 9], [0.9, 0.5, 0.3, 0.1]))
    np.testing.assert_array_equal(won, [0.5, 0.5, 0.0, 1.0])


def test_a_rollout_has_each_token_s_log_prob_at_its_place_and_nothing_in_empty_slots():
    answers = [[Answer([7, 8], [-1.0, -2.0], True), Answer([9], [-3.0], False)],
               [Answer([7, 8, 9], [-4.0, -5.0, -6.0], True), Answer([5], [-7.0], True)]]  # fmt: skip
    graded = Graded([[1], [2]], answers, np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
    rollout = make_rollout(np.array([4, -1, 6, -1]), graded, 3, accumulation=2)  # each part has an empty slot
    empty = [[0, 0, 0]] * 2
    np.testing.assert_array_equal(
        rollout.sampled_logps, [[[[-1, -2, 0], [-3, 0, 0]], empty], [[[-4, -5, -6], [-7, 0, 0]], empty]]
    )
    np.testing.assert_array_equal(rollout.mask, rollout.sampled_logps != 0)
    np.testing.assert_array_equal(rollout.ended, [[[True, False], [False] * 2], [[True, True], [False] * 2]])
    np.testing.assert_array_equal(rollout.scores, [[[1, 2], [0, 0]], [[3, 4], [0, 0]]])
