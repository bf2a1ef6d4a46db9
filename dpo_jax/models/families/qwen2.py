"""Qwen2, Qwen2.5: Llama with query, key and value biases, and a sliding window in all, some or none of its layers."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family
from dpo_jax.models.families.patterns import (
    FULL,
    SLIDING,
    full_and_sliding,
    max_window_layers,
    switched_window,
    window,
    windowed_types,
)
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind

WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the kinds of layers from ``layer_types`` or, in older files, ``max_window_layers``."""
    window(hf, 4096)  # an invalid value is refused even if use_sliding_window is false
    sliding_window, full_layers = switched_window(hf, 4096), min(max_window_layers(hf), layers)
    if sliding_window is None:
        full_layers = layers
    default = [FULL] * full_layers + [SLIDING] * (layers - full_layers)
    types = windowed_types(hf, layers, default, sliding_window)
    return full_and_sliding(types, sliding_window, rope(hf), rope(hf))


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    keys=WINDOW_KEYS,
    defaults={"num_key_value_heads": 32},
    derived=frozenset({"num_key_value_heads"}),
    pattern=pattern,
    options=lambda hf: {"qkv_bias": True},
)
