"""Qwen1.5-MoE, Qwen2-57B-A14B: Qwen2 with experts and a shared expert in every layer."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import mixture, qwen2
from dpo_jax.models.families.family import Family, flag, size
from dpo_jax.models.families.patterns import (
    FULL,
    SLIDING,
    full_and_sliding,
    max_window_layers,
    switched_window,
    windowed_types,
)
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the kinds of layers: unless ``layer_types`` says otherwise, every other one has a window.

    Those are among the first ``max_window_layers``; in Qwen2 they are the layers after these.
    """
    is_sliding, num_sliding = flag(hf, "use_sliding_window"), max_window_layers(hf)
    default = [SLIDING if is_sliding and i < num_sliding and i % 2 == 0 else FULL for i in range(layers)]
    sliding_window = switched_window(hf, 4096)
    types = windowed_types(hf, layers, default, sliding_window)
    return full_and_sliding(types, sliding_window, rope(hf), rope(hf))


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options for biases and experts."""
    shared_ffn = size(hf, "shared_expert_intermediate_size")
    return {"qkv_bias": flag(hf, "qkv_bias"), **mixture.qwen(hf, 60, shared_ffn=shared_ffn)}


FAMILY = Family(
    architecture="Qwen2MoeForCausalLM",
    keys=mixture.QWEN_KEYS | qwen2.WINDOW_KEYS | {"shared_expert_intermediate_size", "qkv_bias"},
    defaults={
        "num_key_value_heads": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "router_aux_loss_coef": 0.001,
        "qkv_bias": True,
    },
    derived=frozenset({"num_key_value_heads"}),
    pattern=pattern,
    options=options,
    tensors=mixture.tensors(),
)
