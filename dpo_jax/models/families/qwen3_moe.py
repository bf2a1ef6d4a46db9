"""Qwen3-MoE, such as Qwen3-30B-A3B: Qwen3 with experts, and the same window, if any, in every layer."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import mixture, qwen3
from dpo_jax.models.families.family import Family, flag, invalid
from dpo_jax.models.families.patterns import window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the kind of all layers; with a window, ``max_window_layers``, which transformers ignores, must be 0."""
    if not flag(hf, "use_sliding_window"):
        return (LayerKind(rope=rope(hf)),)
    if hf.get("max_window_layers"):
        raise invalid("max_window_layers", hf["max_window_layers"], "it must be 0, as all layers have the window")
    return (LayerKind(window=window(hf, 4096), rope=rope(hf)),)


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    keys=mixture.QWEN_KEYS | {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers"},
    defaults={
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 0.001,
    },
    pattern=pattern,
    options=lambda hf: {**qwen3.FAMILY.options(hf), **mixture.qwen(hf, 128)},
    tensors=mixture.tensors(),
)
