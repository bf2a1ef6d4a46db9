"""gpt-oss: experts with biases and a clamped activation, attention sinks, and a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import mixture
from dpo_jax.models.families.family import Family, attention_biases, invalid, number, size
from dpo_jax.models.families.patterns import every, full_and_sliding, layer_types, window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind
from dpo_jax.models.projections import EXPERT_MODULE, EXPERT_PARAMETERS

YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
MATRICES = {name: f"{EXPERT_MODULE}.{parameter}" for name, parameter in EXPERT_PARAMETERS.items()}


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the pattern of one layer with a window and one without, unless ``layer_types`` says otherwise."""
    if hf.get("rope_parameters") is None and hf.get("rope_scaling") is None:
        hf = {**hf, "rope_parameters": YARN}
    return full_and_sliding(layer_types(hf, layers, every(2, layers)), window(hf, 128), rope(hf), rope(hf))


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options for biases and experts; quantized weights are refused."""
    if hf.get("quantization_config"):
        dequantize = "AutoModelForCausalLM.from_pretrained(path, quantization_config=Mxfp4Config(dequantize=True))"
        remedy = f"training needs weights that are not quantized; convert them: {dequantize}.save_pretrained(new_path)"
        raise invalid("quantization_config", hf["quantization_config"], remedy)
    per_token = size(hf, "num_experts_per_tok")
    if size(hf, "experts_per_token", per_token) != per_token:
        raise invalid("experts_per_token", hf["experts_per_token"], f"it must equal num_experts_per_tok, {per_token}")
    experts = mixture.experts(
        hf,
        128,
        softmax="chosen",
        router_bias=True,
        alpha=float(number(hf, "swiglu_alpha")),
        offset=1.0,
        limit=float(number(hf, "swiglu_limit")),
    )
    return {**attention_biases(hf), "mlp_bias": True, "sinks": True, "experts": experts}


FAMILY = Family(
    architecture="GptOssForCausalLM",
    keys=mixture.KEYS | {
        "sliding_window", "layer_types", "attention_bias", "swiglu_alpha", "swiglu_limit", "quantization_config",
        "experts_per_token", "initial_context_length",
    },
    defaults={
        "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
        "num_experts_per_tok": 4, "router_aux_loss_coef": 0.001, "attention_bias": True, "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    derived=frozenset({"num_key_value_heads", "head_dim"}),
    pattern=pattern,
    options=options,
    tensors={
        "layers/router": "model.layers.{}.mlp.router.weight",
        "layers/router_bias": "model.layers.{}.mlp.router.bias",
        **{f"layers/{name}": matrix for name, matrix in MATRICES.items()},
        **{f"layers/{name}_bias": f"{matrix}_bias" for name, matrix in MATRICES.items()},
    },
    grouped={MATRICES["up"] + end: "ffn" for end in ("", "_bias")},  # rows of gate and up alternate
    transposed=frozenset(MATRICES.values()),
)  # fmt: skip
