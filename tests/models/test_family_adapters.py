"""Adapters of families whose modules are fused, transposed or named otherwise, and of experts, against `peft`."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_models import MIXTURES, hf_model, some_tokens
from parity import router_gap
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
    # parameters of experts: both, which PEFT nests, or one
    "qwen3_moe": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "gpt_oss": ("q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),  # gate and up alternate, inputs first
    "qwen2_moe": ("gate_proj", "down_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),  # shared expert, too
    "mixtral": ("o_proj", "mlp.experts.down_proj"),
    "olmoe": ("k_proj", "mlp.experts.gate_up_proj"),
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
    options = {"r": 3, "lora_alpha": 1.5, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    parameters = [target for target in TARGETS[name] if "." in target]
    modules = [target for target in TARGETS[name] if "." not in target]
    torch.manual_seed(0)
    config = peft.LoraConfig(**options, target_modules=modules, target_parameters=parameters or None)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder / "adapters")
    assert name not in MIXTURES or router_gap(adapted, some_tokens()) > 1e-3
    with torch.no_grad():
        return adapted.eval()(torch.tensor(some_tokens(), dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("gpt_neox", "qwen3_moe"))) for name in TARGETS],
)
def test_adapters_of_peft_are_the_same_function_both_ways(peft, name, tmp_path):
    expected, lora = peft_model(name, tmp_path), replace(LORA, targets=TARGETS[name])
    model = plain_model(tmp_path / "model", lora)
    params = load_params(tmp_path / "model", model, shardings=None, dtype="float32")
    adapters = load_adapters(tmp_path / "adapters", model, lora, on_first_device(model.adapter_shapes()))
    assert np.abs(logits(model, params) - expected).max() > 0.1
    np.testing.assert_allclose(logits(model, Adapted(adapters, params)), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(model, merge(Adapted(adapters, params), model)), expected, atol=1e-4, rtol=0)

    export_adapters(adapters, model, lora, str(tmp_path / "model"), tmp_path / "out")
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
MIXTURE = decoder_config({
    "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 24, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128,
})  # fmt: skip


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


ATTENTION = {"query", "key", "value", "out"}


@pytest.mark.parametrize(("patterns", "expected"), [
    (["*"], ATTENTION),
    (["mlp.experts.*"], {"gate", "up", "down"}),
    (["mlp.experts.down*"], {"down"}),
    (["q_proj", "*.*.gate_up_proj"], {"query", "gate", "up"}),
])  # fmt: skip
def test_wildcards_match_no_dot_so_experts_are_adapted_on_request(patterns, expected):
    lora = make_lora(LoraConfig(rank=3, targets=tuple(patterns)), MIXTURE)
    assert lora is not None
    assert lora.targets == expected
    assert dict(lora.shared) == ({"up": "gate"} if "up" in expected else {})


def test_no_target_is_a_matrix_of_one_expert():
    choices = "q_proj, k_proj, v_proj, o_proj, mlp.experts.gate_up_proj, mlp.experts.down_proj"
    with pytest.raises(UserError) as error:
        make_lora(LoraConfig(rank=3, targets=("up_proj",)), MIXTURE)
    remedy = f"it matches none of the model's {choices}; * matches all but the experts"
    assert str(error.value) == f"lora.targets: 'up_proj' cannot be used: {remedy}"


EXPERT_LORA = LoraConfig(rank=3, targets=("k_proj", "mlp.experts.*"))


def test_adapters_of_experts_cost_what_a_token_uses_of_them():
    lora = make_lora(EXPERT_LORA, MIXTURE)
    assert lora is not None
    a_token = 32 + 32 + 2 * (32 + 2 * 24) + 2 * (24 + 32)  # of k_proj, and of the two experts of a token
    assert adapter_flops(MIXTURE, Work(tokens=5, seen=0, targets=0), lora) == 2 * 2 * 3 * a_token * 5
    shapes = Model(config=MIXTURE, lora=lora).adapter_shapes()["layers"]
    assert {name: {factor: leaf.shape for factor, leaf in pair.items()} for name, pair in shapes.items()} == {
        "key": {"a": (2, 3, 32), "b": (2, 4, 8, 3)},
        "gate": {"a": (2, 4, 3, 32), "b": (2, 4, 24, 3)},
        "up": {"b": (2, 4, 24, 3)},
        "down": {"a": (2, 4, 3, 24), "b": (2, 4, 32, 3)},
    }


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "zero_a"])
def test_adapters_of_experts_start_like_others(init):
    adapters = start_adapters(Model(config=MIXTURE, lora=make_lora(EXPERT_LORA, MIXTURE)), jax.random.key(0), init)
    gate, down = adapters["layers"]["gate"], adapters["layers"]["down"]
    zero, drawn = ("a", "b") if init == "zero_a" else ("b", "a")
    assert not np.any(gate[zero])
    bounds = {"kaiming": (32**-0.5, 24**-0.5), "zero_a": (3**-0.5, 3**-0.5)}.get(init)
    for pair, inputs in ((gate, 0), (down, 1)):
        if bounds is None:
            assert np.std(pair[drawn]) == pytest.approx(1 / 3, rel=0.2)
        else:
            assert 0.97 * bounds[inputs] < np.abs(pair[drawn]).max() <= bounds[inputs]


def write_adapters(lora: LoraConfig, folder: Path) -> Path:
    model = Model(config=MIXTURE, lora=make_lora(lora, MIXTURE))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.adapter_shapes())
    export_adapters(zeros, model, lora, "base", folder)
    return folder


@pytest.fixture(scope="module")
def expert_adapters(tmp_path_factory) -> Path:
    return write_adapters(EXPERT_LORA, tmp_path_factory.mktemp("experts") / "adapters")


@pytest.mark.parametrize(("written", "targets", "line"), [
    ({}, ["k_proj"], "target_parameters: ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'] cannot be used"),
    ({}, ["k_proj"], "lora.targets has no expert parameters; name the same in both"),
    ({}, ["k_proj", "mlp.experts.down_proj"], "lora.targets has mlp.experts.down_proj; name the same in both"),
    ({"target_parameters": ["experts.down_proj"]}, None,
     "lora.targets has mlp.experts.gate_up_proj, mlp.experts.down_proj; name the same in both"),
    ({"target_parameters": None}, None, "target_parameters: None cannot be used"),
    ({"target_parameters": "mlp.experts.*"}, None, "target_parameters: 'mlp.experts.*' cannot be used: give a list"),
    ({"target_parameters": ["mlp.experts.gate_up_proj", "q_proj.weight"]}, None,
     "the model has no expert matrices named q_proj.weight; merge these adapters"),
    ({"lora_dropout": 0.1}, None,
     "lora_dropout: 0.1 cannot be used: expert adapters do not support dropout; set it to 0"),
    ({"use_dora": True}, None, "use_dora: True cannot be used"),
    ({"lora_bias": True}, None, "lora_bias: True cannot be used"),
    ({"fan_in_fan_out": True}, None, "fan_in_fan_out: True cannot be used"),
    ({}, ["q_proj", "mlp.experts.*"], "contains base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"),
])  # fmt: skip
def test_adapters_of_experts_that_differ_from_the_config_are_refused(expert_adapters, tmp_path, written, targets, line):
    for path in expert_adapters.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(options | written))
    lora = replace(EXPERT_LORA, targets=tuple(targets or EXPERT_LORA.targets))
    model = Model(config=MIXTURE, lora=make_lora(lora, MIXTURE))
    with pytest.raises(UserError) as refused:
        load_adapters(tmp_path, model, lora, on_first_device(model.adapter_shapes()))
    assert str(refused.value).startswith("lora.path: ")
    assert line in str(refused.value)


def test_adapters_of_a_deeper_mixture_are_refused(tmp_path):
    lora, config = replace(EXPERT_LORA, targets=("mlp.experts.*",)), replace(MIXTURE, layers=1)
    folder, model = write_adapters(lora, tmp_path / "adapters"), Model(config=config, lora=make_lora(lora, config))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts.* no counterpart in this model: use "):
        load_adapters(folder, model, lora, on_first_device(model.adapter_shapes()))
