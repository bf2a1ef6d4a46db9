"""Generation with a cache against full forward passes; a row alone, in a batch, in another bucket, on other meshes."""

import re
from dataclasses import replace

import full_forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batch import Adapted
from dpo_jax.config import LoraConfig, MeshConfig
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.inference import generate as module
from dpo_jax.inference.generate import Answer, answer_rows, generate, rollout_weights
from dpo_jax.inference.sampling import row_keys
from dpo_jax.models.adapters import make_lora
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.parallel.sharding import make_mesh, rollout_mesh

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
}
ONE = make_mesh(MeshConfig(), jax.devices()[:1])
GREEDY = SamplingConfig(temperature=0, max_tokens=20)
DRAWN = SamplingConfig(max_tokens=20)
NO_END = [-1]


def weights_of(model: Model, seed: int = 0):
    """Random weights that all matter."""
    draw = np.random.default_rng(seed)
    values = lambda leaf: draw.normal(0, 0.15, leaf.shape).astype(np.float32)  # noqa: E731
    norms = lambda path, leaf: leaf + 1 if "norm" in path[-1].key else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(norms, jax.tree.map(values, model.param_shapes()))


def ragged_prompts(count: int = 8, longest: int = 12) -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, 128, length).tolist() for length in draw.integers(3, longest + 1, count)]


def answers_of(model: Model, weights, prompts, options=DRAWN, mesh=ONE, end_ids=NO_END, **more) -> list[Answer]:
    return generate(model, rollout_weights(model, weights, mesh), prompts, options, mesh, end_ids=end_ids, **more)


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, dict]:
    model = Model(config=decoder_config(SIZES | FAMILIES["qwen3"]), attention="xla", matmul_precision="highest")
    return model, weights_of(model)


@pytest.mark.parametrize("name", [*FAMILIES, "lora"])
def test_greedy_is_that_of_full_forward_passes(name):
    config = decoder_config(SIZES | FAMILIES.get(name, FAMILIES["llama"]))
    model = Model(config=config, attention="xla", matmul_precision="highest")
    weights = weights_of(model)
    if name == "lora":
        model = replace(model, lora=make_lora(LoraConfig(rank=2, alpha=4)))
        draw = np.random.default_rng(2)
        adapters = jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), model.adapter_shapes())
        weights = Adapted(adapters, weights)
    prompts = ragged_prompts()
    tokens, logps = full_forward.greedy(model, weights, prompts, GREEDY.max_tokens)
    answers = answers_of(model, weights, prompts, GREEDY)
    assert [answer.tokens for answer in answers] == tokens.tolist()
    np.testing.assert_allclose([answer.logps for answer in answers], logps, atol=1e-5, rtol=0)
    assert not any(answer.ended for answer in answers)


def test_log_probs_of_drawn_tokens_are_those_of_a_full_forward_pass(tiny):
    model, weights = tiny
    prompts = ragged_prompts()
    options = replace(DRAWN, temperature=0.7, top_p=0.8, top_k=40)
    for prompt, answer in zip(prompts, answers_of(model, weights, prompts, options), strict=True):
        sequence = np.array([prompt + answer.tokens])
        after = full_forward.log_probs(model, weights, sequence, np.array([sequence.shape[1]]))[0]
        expected = np.asarray(after)[len(prompt) - 1 + np.arange(len(answer.tokens)), answer.tokens]
        np.testing.assert_allclose(answer.logps, expected, atol=1e-5, rtol=0)


def test_a_row_depends_on_nothing_but_its_prompt_and_key(tiny, monkeypatch):
    model, weights = tiny
    prompts = ragged_prompts()
    together = answers_of(model, weights, prompts)
    alone = [answers_of(model, weights, [prompt], first_row=row)[0] for row, prompt in enumerate(prompts)]
    assert [answer.tokens for answer in alone] == [answer.tokens for answer in together]
    monkeypatch.setattr(module, "SMALLEST_BUCKET", 64)
    assert [answer.tokens for answer in answers_of(model, weights, prompts)] == [answer.tokens for answer in together]
    assert together[0].tokens != answers_of(model, weights, prompts[:1], first_row=1)[0].tokens
    assert together[0].tokens != answers_of(model, weights, prompts[:1], step=1)[0].tokens
    assert together[0].tokens != answers_of(model, weights, prompts[:1], seed=1)[0].tokens


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_tokens_do_not_depend_on_the_mesh(sizes, tiny):
    model, weights = tiny
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))), jax.devices())
    prompts = ragged_prompts(6)  # fewer than devices: empty rows fill them
    expected, actual = answers_of(model, weights, prompts), answers_of(model, weights, prompts, mesh=mesh)
    assert [answer.tokens for answer in actual] == [answer.tokens for answer in expected]
    np.testing.assert_allclose([a.logps for a in actual], [a.logps for a in expected], atol=1e-5, rtol=0)


def test_answers_end_at_any_end_token(tiny):
    model, weights = tiny
    prompts = ragged_prompts()
    free = answers_of(model, weights, prompts)
    ends = [free[0].tokens[3], free[1].tokens[5]]
    for whole, answer in zip(free, answers_of(model, weights, prompts, end_ids=ends), strict=True):
        first = next((i + 1 for i, token in enumerate(whole.tokens) if token in ends), None)
        assert answer == Answer(whole.tokens[:first], whole.logps[:first], first is not None)


def test_the_loop_over_tokens_gathers_no_weight(tiny):
    model, weights = tiny
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    weights = rollout_weights(model, weights, mesh)
    with jax.set_mesh(rollout_mesh(mesh)):
        inputs = (jnp.ones((8, 16), jnp.int32), jnp.full(8, 16), row_keys(0, 0, jnp.arange(8)), jnp.array(NO_END))
        text = jax.jit(answer_rows, static_argnums=(0, 6)).lower(model, weights, *inputs, DRAWN).compile().as_text()
    gathered = re.findall(r"= (\S+) all-gather", text)
    assert "while(" in text
    assert not [
        shape for shape in gathered if np.prod([int(n) for n in re.findall(r"\d+", shape.split("]")[0])[1:]]) > 512
    ]
