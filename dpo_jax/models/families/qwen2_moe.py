"""Qwen1.5-MoE, Qwen2 with experts: Qwen2 with experts in every layer, and one more that all tokens have."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import mixture, qwen2
from dpo_jax.models.families.family import Family, flag, invalid, size
from dpo_jax.models.families.patterns import FULL, SLIDING, by_type, layer_types, window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the kinds of layers: unless ``layer_types`` says otherwise, every other one has a window.

    Those are among the first ``max_window_layers``; in Qwen2 they are the layers after these.
    """
    is_sliding = flag(hf, "use_sliding_window")
    num_sliding = hf.get("max_window_layers", 28)
    if type(num_sliding) is not int or num_sliding < 0:
        raise invalid("max_window_layers", num_sliding, "it must be an integer, 0 or more")
    default = [SLIDING if is_sliding and i < num_sliding and i % 2 == 0 else FULL for i in range(layers)]
    types = layer_types(hf, layers, default)
    sliding_window = window(hf, 4096) if is_sliding else None
    if SLIDING in types and sliding_window is None:
        raise invalid("layer_types", types, "sliding attention needs use_sliding_window and a sliding_window")
    kinds = {FULL: LayerKind(rope=rope(hf)), SLIDING: LayerKind(window=sliding_window, rope=rope(hf))}
    return by_type(types, kinds)


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read biases and experts."""
    shared = size(hf, "shared_expert_intermediate_size")
    return {"qkv_bias": flag(hf, "qkv_bias"), **mixture.qwen(hf, 60, shared_ffn=shared)}


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
