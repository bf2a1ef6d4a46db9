"""Published shapes are read as any config.json, agree with those at hand, and have the published sizes."""

import json

import pytest

from dpo_jax.models.decoder import Model, count_params
from dpo_jax.models.families import FAMILIES, decoder_config
from dpo_jax.weights.known import KNOWN, known_config

COUNTS = {  # parameters
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": 8_030_326_784,
    "alignment-handbook/zephyr-7b-sft-full": 7_241_732_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "allenai/OLMo-2-1124-7B-SFT": 7_298_617_344,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2b": 2_506_172_416,
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "openai-community/gpt2-large": 774_030_080,
    "microsoft/phi-2": 2_779_683_840,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "CohereLabs/c4ai-command-r7b-12-2024": 8_028_033_024,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "unsloth/gpt-oss-20b-BF16": 20_914_757_184,
}


@pytest.mark.parametrize("name", COUNTS)
def test_known_models_have_the_published_number_of_parameters(name):
    hf = known_config(name)
    assert hf is not None
    assert count_params(Model(config=decoder_config(hf))) == COUNTS[name]


def test_every_family_has_a_known_model():
    known = {KNOWN[name]["model_type"] for name in COUNTS}
    assert known == {name for name, family in FAMILIES.items() if family.wraps is None}


@pytest.mark.parametrize(
    ("name", "file"), [("meta-llama/Meta-Llama-3-8B", "llama3-8b"), ("Qwen/Qwen3-1.7B", "qwen3-1.7b")]
)
def test_known_models_are_what_their_files_say(shared, name, file):
    published = json.loads((shared / "model_configs" / f"{file}.json").read_text())
    assert decoder_config(KNOWN[name]) == decoder_config(published)
    assert {key: published.get(key) for key in KNOWN[name]} == KNOWN[name]


def test_what_is_not_known_is_none_and_what_is_handed_out_is_a_copy():
    assert known_config("meta-llama/Llama-4") is None
    first = known_config("Qwen/Qwen3-8B")
    assert first is not None
    first["vocab_size"] = 1
    assert known_config("Qwen/Qwen3-8B")["vocab_size"] == 151936
    for name in KNOWN:
        decoder_config(KNOWN[name])
