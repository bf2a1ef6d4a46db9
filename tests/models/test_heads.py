"""Scores of a reward model: where they are read, and that transformers reads the same ones."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from small import HF_CONFIG, pack, random_pairs, random_params, small_model

from dpo_jax.errors import UserError
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.heads import answer_ends, make_scores_fn, reward_hf_config
from dpo_jax.weights.huggingface import export_params, load_params

PAD = HF_CONFIG["vocab_size"] - 1
UNTIED = HF_CONFIG | {"model_type": "qwen2", "num_key_value_heads": 2}
TIED = HF_CONFIG | {"tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 8, "vocab_size": 160, "n_positions": 512,
        "initializer_range": 0.15}  # fmt: skip
COMMON = {key: HF_CONFIG[key] for key in HF_CONFIG if key not in ("model_type", "rms_norm_eps", "rope_theta")}
PLAIN = {key: COMMON[key] for key in COMMON if key != "num_key_value_heads"}


def reward_model(hf_config: dict) -> Model:
    return Model(config=decoder_config(reward_hf_config(hf_config, PAD)))


def pairs():
    """The small random pairs, without the padding token."""
    avoid = lambda tokens: np.where(tokens == PAD, 1, tokens)  # noqa: E731
    return [(avoid(prompt), tuple(map(avoid, answers)), learned) for prompt, answers, learned in random_pairs()]


@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
def test_scores_are_read_at_the_last_token_of_each_answer(layout):
    packed = pack(pairs(), layout=layout, rows=2)
    ends = np.asarray(jax.jit(answer_ends)(packed))
    for (prompt, answers, _), slots in zip(pairs(), packed.answer_slots, strict=True):
        for answer, slot in zip(answers, slots, strict=True):
            row, index = divmod(int(slot), packed.answers_per_row)
            assert packed.tokens[row, ends[row, index]] == answer[-1]
            assert packed.positions[row, ends[row, index]] == len(prompt) + len(answer) - 1


def test_scores_do_not_depend_on_the_layout():
    model = replace(small_model(), config=replace(small_model().config, scores=1))
    weights = random_params(model)
    scores_fn = jax.jit(make_scores_fn(model))
    shared, padded = (
        scores_fn(weights, pack(pairs(), layout=layout, rows=rows, valid=6))
        for layout, rows in (("shared", 2), ("padded", 1))
    )
    np.testing.assert_allclose(shared.sum, padded.sum, atol=2e-5)
    np.testing.assert_array_equal(shared.count, [[*map(len, answers)] for _, answers, _ in pairs()[:6]] + [[0, 0]] * 2)
    assert np.abs(shared.sum[:6]).min() > 0
    assert not np.any(shared.sum[6:])


@pytest.mark.usefixtures("optimized")  # unoptimized, sums of float32 are rounded more often
@pytest.mark.parametrize("hf_config", [
    pytest.param(TIED, id="tied"),
    pytest.param(UNTIED, id="untied"),
    pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow),
    pytest.param(PLAIN | {"model_type": "gpt_neox", "hidden_act": "gelu"}, id="gpt_neox", marks=pytest.mark.slow),
    pytest.param(COMMON | {"model_type": "phi", "hidden_act": "gelu"}, id="phi", marks=pytest.mark.slow),
    pytest.param(COMMON | {"model_type": "phi3"}, id="phi3", marks=pytest.mark.slow),
    pytest.param(COMMON | {"model_type": "glm4", "head_dim": 8}, id="glm4", marks=pytest.mark.slow),
    pytest.param(COMMON | {"model_type": "starcoder2", "hidden_act": "gelu"}, id="starcoder2", marks=pytest.mark.slow),
])  # fmt: skip
def test_transformers_computes_the_same_scores(hf_config, torch, tmp_path):
    model = reward_model(hf_config)
    params = jax.tree.map(jnp.asarray, random_params(model))
    exported = reward_hf_config(hf_config, PAD)
    export_params(params, model, hf_config=exported, out_dir=tmp_path / "ours", dtype="float32", source_dir=None,
                  overwrite=False)  # fmt: skip
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())  # no tensor missing, unexpected or of another shape
    expected = scores_of_transformers(theirs, torch)
    packed = pack(pairs(), rows=2)
    actual = jax.jit(make_scores_fn(model))(params, packed)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual.sum, expected, atol=1e-5, rtol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    read = Model(config=decoder_config(json.loads((tmp_path / "theirs" / "config.json").read_text())))
    assert read.config == model.config
    loaded = load_params(tmp_path / "theirs", read, shardings=None, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_family_without_reward_models_is_refused():
    with pytest.raises(UserError, match=r"model_type: 'cohere2' cannot be used: transformers has no class for reward"):
        reward_hf_config(COMMON | {"model_type": "cohere2"}, PAD)


def scores_of_transformers(model, torch) -> np.ndarray:
    """Its scores [B, K] of the pairs, each prompt and answer as a right-padded row."""
    sequences = [np.concatenate([prompt, answer]) for prompt, answers, _ in pairs() for answer in answers]
    tokens = np.full((len(sequences), max(map(len, sequences))), PAD)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    with torch.no_grad():
        inputs = torch.tensor(tokens)
        return model(inputs, attention_mask=(inputs != PAD).long()).logits.numpy().reshape(-1, 2)
