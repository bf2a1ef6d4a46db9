"""Adapters and reward models of families whose modules are fused, transposed or named otherwise, against `peft`."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_models import hf_model, some_tokens
from safetensors.numpy import load_file

from dpo_jax.batch import Adapted
from dpo_jax.config import LoraConfig
from dpo_jax.errors import UserError
from dpo_jax.models.adapters import make_lora, merge, start_adapters
from dpo_jax.models.decoder import Model, plain_batch
from dpo_jax.models.families import decoder_config
from dpo_jax.models.flops import Work, adapter_flops
from dpo_jax.weights.hub import read_hf_config
from dpo_jax.weights.huggingface import load_params
from dpo_jax.weights.peft import export_adapters, load_adapters

pytestmark = [
    pytest.mark.usefixtures("torch"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
LORA = LoraConfig(rank=3, alpha=1.5)
TARGETS = {
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}


def plain_model(folder: Path, lora: LoraConfig) -> Model:
    config = decoder_config(read_hf_config(folder))
    return Model(config=config, attention="xla", lora=make_lora(lora, config))


def on_first_device(tree: Any) -> Any:
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)


def logits(model: Model, weights: Any) -> np.ndarray:
    tokens = some_tokens()
    batch = plain_batch(jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1]))
    return np.asarray(jax.jit(lambda weights: model.hidden(weights, batch) @ model.unembedding(weights).T)(weights))


@cache
def peft_model(name: str, folder: Path) -> np.ndarray:
    """Save a model and its random adapters, made by PEFT, in a directory; return the logits with them."""
    import peft
    import torch

    model = hf_model(name)
    model.save_pretrained(folder / "model")
    options = {"r": 3, "lora_alpha": 1.5, "target_modules": list(TARGETS[name]), "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapters")
    with torch.no_grad():
        return adapted.eval()(torch.tensor(some_tokens(), dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt_neox")) for name in TARGETS]
)
def test_adapters_of_peft_are_the_same_function_both_ways(peft, name, tmp_path):
    expected = peft_model(name, tmp_path)
    model = plain_model(tmp_path / "model", LORA)
    params = load_params(tmp_path / "model", model, shardings=None, dtype="float32")
    adapters = load_adapters(tmp_path / "adapters", model, LORA, on_first_device(model.adapter_shapes()))
    assert np.abs(logits(model, params) - expected).max() > 0.1
    np.testing.assert_allclose(logits(model, Adapted(adapters, params)), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(model, merge(Adapted(adapters, params), model)), expected, atol=1e-4, rtol=0)

    export_adapters(adapters, model, LORA, str(tmp_path / "model"), tmp_path / "out")
    actual, expected_tensors = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out", "adapters")
    )
    assert actual.keys() == expected_tensors.keys()
    assert all(np.array_equal(actual[key], tensor) for key, tensor in expected_tensors.items())
    loaded = peft.PeftModel.from_pretrained(hf_model(name), tmp_path / "out").eval()
    np.testing.assert_allclose(torch_logits(loaded), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_moe"])
def test_peft_adapts_no_modules_that_only_end_alike(peft, name, tmp_path):
    """Gemma 3's vision tower has projections of the same names, and a mixture's experts those of the shared expert."""
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "model")
    model = plain_model(tmp_path / "model", LORA)
    adapters = start_adapters(model, jax.random.key(0), "kaiming")
    export_adapters(adapters, model, LORA, str(tmp_path / "model"), tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "out")
    stored = {key.removesuffix(".weight") for key in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    adapted = {key.removesuffix(".default.weight") for key in loaded.state_dict() if ".lora_" in key}
    assert adapted == stored
    again = load_adapters(tmp_path / "out", model, LORA, on_first_device(model.adapter_shapes()))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(some_tokens(), dtype=torch.long)).logits.numpy()


CONFIGS = {
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "vocab_size": 128},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_targets_are_the_modules_of_the_model(name):
    config = decoder_config(CONFIGS[name])
    lora = make_lora(LORA, config)
    assert lora is not None
    assert lora.targets == {"query", "key", "value", "out", "up", "down"}
    assert dict(lora.shared) == {"key": "query", "value": "query"}
    with pytest.raises(UserError) as error:
        make_lora(LoraConfig(rank=3, targets=("q_proj",)), config)
    remedy = f"it matches none of the model's {', '.join(TARGETS[name])}; * matches all"
    assert str(error.value) == f"lora.targets: 'q_proj' cannot be used: {remedy}"


def test_a_fused_module_has_one_a():
    config = decoder_config(CONFIGS["gpt_neox"])
    lora = make_lora(LoraConfig(rank=3, targets=("query_key_value",)), config)
    assert lora is not None
    shapes = Model(config=config, lora=lora).adapter_shapes()["layers"]
    assert {name: {factor: leaf.shape for factor, leaf in pair.items()} for name, pair in shapes.items()} == {
        "query": {"a": (2, 3, 64), "b": (2, 4, 16, 3)},
        "key": {"b": (2, 4, 16, 3)},
        "value": {"b": (2, 4, 16, 3)},
    }
    assert adapter_flops(config, Work(tokens=1, seen=0, targets=0), lora) == 2 * 2 * 3 * (64 + 3 * 64)
