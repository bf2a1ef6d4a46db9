"""Value models of PPO: what they compute, what they start from, and which reward models cannot be their start."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_models import save_reward_model
from small import pack, random_pairs, random_params, small_model

from dpo_jax.batch import Adapted
from dpo_jax.config import LoraConfig, ModelConfig, PPOConfig, RewardConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.methods.ppo import ppo
from dpo_jax.methods.setup import Setup, assemble
from dpo_jax.methods.value_model import ValueModel, make_answer_logps_fn, make_outputs_fn, make_values_fn
from dpo_jax.models.adapters import make_lora
from dpo_jax.models.decoder import Model
from dpo_jax.models.heads import make_scores_fn, without_unembedding
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.policy_gradient import ActorCritic
from dpo_jax.train import train
from dpo_jax.weights.huggingface import export_params
from dpo_jax.weights.open import open_model

MAX_TOKENS = 70


def scored(model: Model) -> Model:
    return replace(model, config=replace(model.config, scores=1))


def test_a_shared_value_model_is_a_head_on_the_policy_s_hidden_states():
    """Also if these have a dim more for a bias of the unembedding; and the policy's layers learn from its loss."""
    model = replace(small_model(), config=replace(small_model().config, unembed_bias=True))
    weights, head, batch = random_params(model), random_params(scored(model))["score"], pack(random_pairs())
    outputs_fn = make_outputs_fn(model, ValueModel(scored(model), shared=True), MAX_TOKENS, chunk=64)

    def value_loss(params):
        logps, values = outputs_fn(params, batch)
        return (values**2).sum(), (logps, values)

    gradient = jax.jit(jax.value_and_grad(value_loss, has_aux=True))
    (_, (logps, values)), grads = gradient(ActorCritic(weights, {"score": head}))
    expected = jax.jit(make_answer_logps_fn(model, MAX_TOKENS, chunk=64))(weights, batch)
    np.testing.assert_allclose(logps, expected, atol=2e-5)
    own = make_values_fn(scored(model), MAX_TOKENS)
    layers = without_unembedding(weights) | {"score": head}
    own_value, own_grads = jax.jit(jax.value_and_grad(lambda p: (own(p, batch) ** 2).sum()))(layers)
    np.testing.assert_allclose((values**2).sum(), own_value, rtol=1e-5)
    trunk = {name: gradient for name, gradient in own_grads.items() if name != "score"}
    for actual, expected in ((grads.value["score"], own_grads["score"]), *zip(
        jax.tree.leaves(without_unembedding(grads.policy)), jax.tree.leaves(trunk), strict=True
    )):  # fmt: skip
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_the_head_of_a_shared_value_model_is_found_next_to_adapters():
    model, head = scored(small_model()), jnp.ones((1, 64))
    assert model.head({"score": head}) is head
    assert model.head(Adapted({"score": head}, {})) is head


def test_a_value_is_the_reward_model_s_score_of_the_answer_so_far():
    model = scored(small_model())
    weights, pairs = random_params(model), random_pairs()
    cut = [(prompt, tuple(answer[: max(len(answer) - 1, 1)] for answer in answers), w) for prompt, answers, w in pairs]
    values = np.asarray(jax.jit(make_values_fn(model, MAX_TOKENS))(weights, pack(pairs)))
    scores = np.asarray(jax.jit(make_scores_fn(model))(weights, pack(cut)).sum)
    lengths = np.array([[len(answer) for answer in answers] for _, answers, _ in pairs])
    last = np.take_along_axis(values, lengths[..., None] - 1, axis=-1)[..., 0]
    assert (lengths > 1).sum() > 10
    np.testing.assert_allclose(last[lengths > 1], scores[lengths > 1], atol=2e-5)
    assert not values[np.arange(MAX_TOKENS) >= lengths[..., None]].any()


def assembled(shared: Path, folder: Path, reward: str, **sections) -> Setup:
    """A run of which the value model starts from the reward model in the folder ``reward``."""
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Once upon a time"}) + "\n")
    tree = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "max_length": 32,
            "store": str(folder / "store"),
            "workers": 1,
        },
        "reward": {"path": str(folder / reward)},
        "sampling": {"max_tokens": 8},
        "ppo": {"value_model": "reward"},
        "batch": {"prompts": 1},
        "run": {"dir": str(folder / "run"), "steps": 1, "progress": False},
    }
    config = parse_config(tree | sections, {}, PPOConfig)
    return assemble(config, make_mesh(config.mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory) -> Path:
    """Two reward models with the policy's layers: one with its tokenizer, one with another chat template."""
    folder = tmp_path_factory.mktemp("reward_models")
    policy = open_model(ModelConfig(path=str(shared / "models" / "stories260K")), "cpu")
    save_reward_model(policy, folder / "tokens")
    save_reward_model(policy, folder / "text", "{{ messages }}")
    return folder


def test_the_value_model_starts_as_the_reward_model_or_as_a_head_of_zeros(shared, folder):
    setup = assembled(shared, folder, "tokens")
    expected = open_model(ModelConfig(path=str(folder / "tokens")), "cpu").load(setup.mesh)
    method, start = ppo(setup, {})
    jax.tree.map(np.testing.assert_array_equal, start.trained.value, expected)
    own = {id(x) for x in jax.tree.leaves(start.trained)}
    assert len(own) == len(jax.tree.leaves(start.trained))  # no array is there twice, as both are donated
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
    assert kinds(method.abstract_state.params) == kinds(start.trained)
    for sections in ({}, {"lora": {"rank": 2}}):
        method, start = ppo(assembled(shared, folder, "tokens", ppo={"value_model": "shared"}, **sections), {})
        assert kinds(method.abstract_state.params) == kinds(start.trained)
        assert [*start.trained.value] == ["score"]
        assert not np.any(start.trained.value["score"])


def test_reward_models_that_cannot_be_the_start_are_refused(shared, folder):
    with pytest.raises(UserError, match=r"ppo.value_model: 'reward' .* chat template differs; use policy$"):
        ppo(assembled(shared, folder, "text"), {})
    with pytest.raises(
        UserError, match=r"'reward' .* with lora.rank, .* did not train adapters on them; use policy, or"
    ):
        ppo(assembled(shared, folder, "tokens", lora={"rank": 2}), {})


@pytest.mark.slow
def test_with_adapters_the_value_model_has_those_of_the_reward_model_on_the_one_base(shared, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Once", "chosen": " upon a time", "rejected": " a cat"}) + "\n")
    model, device = str(shared / "models" / "stories260K"), jax.devices()[:1]
    tree = {
        "model": {"path": model},
        "lora": {"rank": 3, "alpha": 5},
        "data": {"train": str(pairs), "max_length": 32, "store": str(tmp_path / "store"), "workers": 1},
        "batch": {"pairs": 1},
        "run": {"dir": str(tmp_path / "reward"), "steps": 2, "progress": False},
    }
    train(parse_config(tree, {}, RewardConfig), devices=device)
    setup = assembled(shared, tmp_path, "reward", lora={"rank": 2})
    method, start = ppo(setup, {})
    adapters, merged = start.trained.value, open_model(ModelConfig(path=str(tmp_path / "reward")), "cpu")
    assert np.any(adapters["score"])
    assert jax.tree.map(jnp.shape, adapters) == jax.tree.map(lambda x: x.shape, method.abstract_state.params.value)
    batch, lora = pack(random_pairs()), make_lora(LoraConfig(**tree["lora"]), setup.model.config)
    values_fn = jax.jit(make_values_fn(replace(scored(setup.model), lora=lora), MAX_TOKENS))
    actual = values_fn(Adapted(adapters, method.base), batch)
    expected = jax.jit(make_values_fn(merged.model, MAX_TOKENS))(merged.load(setup.mesh), batch)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    train(setup.config, devices=device)

    policy = open_model(ModelConfig(path=model), "cpu")
    weights, hf_config = jax.tree.map(lambda x: 1.01 * x, policy.load(setup.mesh)), policy.source.hf_config
    export = {"out_dir": tmp_path / "other", "dtype": "float32", "source_dir": Path(model), "overwrite": True}
    export_params(weights, policy.model, hf_config=hf_config, **export)
    policy.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"share the weights of .*other, but .*reward did not train adapters on them"):
        ppo(assembled(shared, tmp_path, "reward", lora={"rank": 2}, model={"path": str(tmp_path / "other")}), {})
