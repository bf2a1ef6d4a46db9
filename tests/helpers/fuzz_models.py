"""Fuzzed files of models: what is read from them is what safetensors, transformers and PEFT read."""

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import safetensors
from fuzzing import as_json, damaged, mutated, refused
from hypothesis import strategies as st
from small import HF_CONFIG
from transformers import AutoConfig, PretrainedConfig

from dpo_jax.config import LoraConfig
from dpo_jax.models.adapters import make_lora, start_adapters
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.families.keys import HARMLESS_KEYS
from dpo_jax.models.options import DecoderConfig, LayerKind, LinearScaling, Llama3Scaling, Rope
from dpo_jax.weights.hub import read_hf_config
from dpo_jax.weights.peft import _HARMLESS, CONFIG, TENSOR_FILE, export_adapters, load_adapters
from dpo_jax.weights.safetensors import DTYPES, INDEX, WEIGHTS, Tensor, find_tensors, read_header

# --------------------------------------------------------------------------------------------- safetensors

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}


def tensor_file(shapes: dict[str, tuple[str, list[int]]]) -> tuple[dict, bytes]:
    """Header and data of a valid file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (code, shape) in shapes.items():
        end = start + math.prod(shape) * WIDTHS[code]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    return header, bytes(range(256)) * (start // 256) + bytes(range(start % 256))


shapes = st.dictionaries(
    st.sampled_from(["a", "b.weight", "é", "model.layers.0.self_attn.q_proj.weight"]),
    st.tuples(st.sampled_from(list(WIDTHS)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=4,
)


@st.composite
def safetensors_bytes(draw: st.DrawFn) -> bytes:
    """A file whose header was changed as a tree, or the whole as bytes."""
    header, data = tensor_file(draw(shapes))
    text = as_json(draw(mutated(st.just(header)))).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    return draw(damaged(st.just(whole))) if draw(st.integers(0, 3)) == 0 else whole


def assert_tensors(actual: dict[str, Tensor], data: bytes) -> None:
    """The same names, types, shapes and bytes as the library's."""
    expected = dict(safetensors.deserialize(data))
    assert sorted(actual) == sorted(expected)
    for name, tensor in actual.items():
        assert (tensor.code, list(tensor.shape)) == (expected[name]["dtype"], list(expected[name]["shape"]))
        values, was_refused = refused(tensor.read, str(tensor.path), name)
        assert was_refused == (tensor.code not in DTYPES)
        if not was_refused:
            assert values.shape == tensor.shape
            assert values.dtype == DTYPES[tensor.code]
            assert values.tobytes() == bytes(expected[name]["data"])


def check_safetensors(data: bytes) -> bool:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        tensors, was_refused = refused(lambda: read_header(path), str(path))
        if not was_refused:
            assert_tensors(tensors, data)
        return not was_refused


SHARDS = {
    "model-1.safetensors": {"a": ("F32", [2, 3]), "b": ("BF16", [4])},
    "model-2.safetensors": {"c": ("F32", [1])},
}
INDEX_TREE = {
    "metadata": {"total_size": 36},
    "weight_map": {name: file for file, held in SHARDS.items() for name in held},
}
# an index, and whether a single file is next to it
indexed = st.tuples(mutated(st.just(INDEX_TREE)), st.integers(0, 4).map(lambda n: n == 0))


def check_index(value: tuple[Any, bool]) -> bool:
    """Each tensor is that of the file that transformers would take it from, which lies in the folder."""
    tree, single = value
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = {**SHARDS, **({WEIGHTS: {"a": ("F32", [1, 1])}} if single else {})}
        written = {}
        for file, held in files.items():
            header, data = tensor_file(held)
            text = json.dumps(header).encode()
            written[file] = len(text).to_bytes(8, "little") + text + data
            (folder / file).write_bytes(written[file])
        (folder / INDEX).write_text(as_json(tree))
        tensors, was_refused = refused(lambda: find_tensors(folder), str(folder))
        if was_refused:
            return False
        # transformers takes a single file and does not look at the index; of an index it takes whole files
        named = {WEIGHTS} if single else set(tree["weight_map"].values())
        wanted = {tensor: file for file in named for tensor in files[file]}
        assert {tensor: found.path.name for tensor, found in tensors.items()} == wanted
        for found in tensors.values():
            assert found.path.parent == folder
            with safetensors.safe_open(found.path, "numpy") as opened:
                assert found.shape == tuple(opened.get_slice(found.name).get_shape())
        return True


# --------------------------------------------------------------------------------------------- config.json

FAMILY_CONFIGS = [
    HF_CONFIG | {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    HF_CONFIG | {"num_key_value_heads": 2, "rope_scaling": {"type": "linear", "factor": 2.0}},
    HF_CONFIG
    | {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    HF_CONFIG | {"model_type": "mistral", "sliding_window": 16, "head_dim": 16, "num_key_value_heads": 2},
    HF_CONFIG | {"model_type": "mistral", "sliding_window": None, "architectures": ["MistralForCausalLM"]},
    HF_CONFIG | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    HF_CONFIG | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
    HF_CONFIG
    | {"model_type": "qwen3", "head_dim": 8, "attention_bias": False, "layer_types": ["full_attention"] * 2,
       "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "sliding_window": None},
]  # fmt: skip
MORE_KEYS = [
    "rope_parameters", "rope_scaling", "head_dim", "num_key_value_heads", "sliding_window", "use_sliding_window",
    "layer_types", "max_window_layers", "attention_bias", "mlp_bias", "tie_word_embeddings", "partial_rotary_factor",
    "is_causal", "quantization_config", "torch_dtype", "bos_token_id", "x",
]  # fmt: skip
MORE_VALUES = [None, False, True, 0, 1, 2, 4, 16, 0.5, {}, [], "default", "sliding_attention",
               ["sliding_attention"] * 2, {"type": "linear", "factor": 4.0}, {"rope_theta": 500.0},
               {"rope_type": "default", "rope_theta": 5e5}]  # fmt: skip


@st.composite
def hf_configs(draw: st.DrawFn) -> Any:
    """A valid config.json, some keys added, some mutated."""
    tree = dict(draw(st.sampled_from(FAMILY_CONFIGS)))
    for _ in range(draw(st.integers(0, 2))):
        tree[draw(st.sampled_from(MORE_KEYS))] = draw(st.sampled_from(MORE_VALUES))
    return draw(mutated(st.just(tree), most=2))


def read_decoder_config(folder: Path) -> DecoderConfig:
    return decoder_config(read_hf_config(folder))


def by_transformers(hf: PretrainedConfig) -> dict[str, Any]:
    """What transformers' models take from their config, in this program's words."""
    rope = hf.rope_parameters
    scaling = {
        "default": lambda: None,
        "linear": lambda: LinearScaling(factor=rope["factor"]),
        "llama3": lambda: Llama3Scaling(
            **{name: rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor")},
            original_max_position_embeddings=rope["original_max_position_embeddings"],
        ),
    }[rope["rope_type"]]()
    if hf.model_type.startswith("qwen"):
        windows = [hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types]
    else:
        windows = [None if hf.model_type == "llama" else hf.sliding_window] * hf.num_hidden_layers
    rotation = Rope(theta=rope["rope_theta"], scaling=scaling)
    bias = getattr(hf, "attention_bias", False)
    return {
        "vocab": hf.vocab_size,
        "hidden": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": hf.num_attention_heads,
        "kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "ffn": hf.intermediate_size,
        "norm_eps": hf.rms_norm_eps,
        "kinds": tuple(dict.fromkeys(LayerKind(window=window, rope=rotation) for window in windows)),
        "activation": hf.hidden_act,
        "qkv_bias": bias or hf.model_type == "qwen2",
        "out_bias": bias and hf.model_type in ("llama", "qwen3"),
        "mlp_bias": getattr(hf, "mlp_bias", False),
        "qk_norm": "head" if hf.model_type == "qwen3" else "none",
        "windows": tuple(windows),
        "tied": hf.tie_word_embeddings,
        "init_std": hf.initializer_range,
    }


def check_hf_config(tree: Any) -> bool:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(as_json(tree))
        config, was_refused = refused(lambda: read_decoder_config(folder), "config.json")
        if was_refused:
            return False
        # what says nothing of the computation may be anything here
        read = {key: value for key, value in read_hf_config(folder).items() if key not in HARMLESS_KEYS}
        # transformers takes 1.0 but not 1 for these
        read |= {key: float(read[key]) for key in ("rms_norm_eps", "initializer_range") if read.get(key) is not None}
        (folder / "config.json").write_text(json.dumps(read))
        expected = by_transformers(AutoConfig.from_pretrained(folder))
        actual = {field: getattr(config, field) for field in expected}
        assert actual == expected
        return True


hf_config_bytes = damaged(st.sampled_from(FAMILY_CONFIGS).map(lambda tree: json.dumps(tree).encode()))


def check_hf_config_bytes(data: bytes) -> bool:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(data)
        tree, was_refused = refused(lambda: read_hf_config(folder), str(folder))
        if not was_refused:
            assert repr(tree) == repr(json.loads(data))  # NaN is not equal to itself
            refused(lambda: decoder_config(tree), "config.json")
        return not was_refused


# --------------------------------------------------------------------------------------------- adapters

LORA = LoraConfig(rank=2, alpha=8.0, targets=("q_proj", "v_proj"))


@cache
def adapter_files() -> tuple[Model, dict, bytes]:
    """A model, and the two files of its adapters as they are written."""
    config = decoder_config(HF_CONFIG)
    model = Model(config=config, attention="xla", lora=make_lora(LORA, config))
    with TemporaryDirectory() as name:
        folder = Path(name) / "adapters"
        export_adapters(start_adapters(model, jax.random.key(0), "gaussian"), model, LORA, "base", folder)
        return model, json.loads((folder / CONFIG).read_text()), (folder / TENSOR_FILE).read_bytes()


@cache
def torch_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**HF_CONFIG))


ADAPTER_KEYS = [
    "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "use_dora", "fan_in_fan_out",
    "lora_bias", "target_modules", "target_parameters", "exclude_modules", "layers_pattern", "init_lora_weights", "x",
]  # fmt: skip
ADAPTER_VALUES = [
    None, True, False, [], {}, ["q_proj"], ["q_proj", "v_proj"], {"q_proj": 4}, "all-linear", "q_proj", [0], 0,
    ".*(q_proj|v_proj)", "gaussian", "pissa",
]  # fmt: skip


@st.composite
def adapter_configs(draw: st.DrawFn, valid: dict) -> Any:
    """A valid adapter_config.json, some keys set, some mutated."""
    tree = dict(valid)
    for _ in range(draw(st.integers(0, 2))):
        tree[draw(st.sampled_from(ADAPTER_KEYS))] = draw(st.sampled_from(ADAPTER_VALUES))
    return draw(mutated(st.just(tree), most=2))


def adapters() -> st.SearchStrategy:
    """Configs made from one that is written here: a strategy may not."""
    return adapter_configs(adapter_files()[1])


def by_peft(folder: Path) -> dict[str, float]:
    """Module with adapters -> what multiplies B A there, as PEFT puts them into the model."""
    import copy

    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    # what says nothing of the computation may be anything here
    given = json.loads((folder / CONFIG).read_text())
    read = {key: value for key, value in given.items() if key not in _HARMLESS and value is not None}
    (folder / CONFIG).write_text(json.dumps(read))
    injected = inject_adapter_in_model(PeftConfig.from_pretrained(folder), copy.deepcopy(torch_model()))
    return {
        name: module.scaling["default"] for name, module in injected.named_modules() if isinstance(module, LoraLayer)
    }


def check_adapter_config(tree: Any) -> bool:
    model, _, tensors = adapter_files()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / CONFIG).write_text(as_json(tree))
        (folder / TENSOR_FILE).write_bytes(tensors)
        whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: whole, model.adapter_shapes())
        loaded, was_refused = refused(lambda: load_adapters(folder, model, LORA, shardings), str(folder))
        if was_refused:
            return False
        expected = dict(safetensors.deserialize(tensors))
        modules = {f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in LORA.targets}
        assert by_peft(folder) == dict.fromkeys(modules, model.lora.scale)
        for layer in range(2):
            for leaf, target in (("query", "q_proj"), ("value", "v_proj")):
                for part in "ab":
                    named = f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{part.upper()}.weight"
                    assert np.asarray(loaded["layers"][leaf][part][layer]).tobytes() == bytes(expected[named]["data"])
        return True
