"""Qwen2, Qwen2.5: Llama with query, key and value biases, and the same sliding window, or none, in all layers."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, flag, invalid, size
from dpo_jax.models.options import LayerKind

WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the window that all layers share, from ``layer_types`` or, in older files, ``max_window_layers``."""
    window, full_layers = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    if window is not None and type(window) is not int:
        raise invalid("sliding_window", window, "it must be an integer or null")
    window = size(hf, "sliding_window", 4096) if flag(hf, "use_sliding_window") and window is not None else None
    if type(full_layers) is not int or full_layers < 0:
        raise invalid("max_window_layers", full_layers, "it must be an integer, 0 or more")
    types, key = hf.get("layer_types"), "layer_types"
    if types is None:
        full_layers, key = layers if window is None else min(full_layers, layers), "max_window_layers"
        types = ["full_attention"] * full_layers + ["sliding_attention"] * (layers - full_layers)
    elif not isinstance(types, list) or len(types) != layers:
        raise invalid(key, types, f"it must be a list of num_hidden_layers={layers} names")
    if all(kind == "full_attention" for kind in types):
        return (LayerKind(),)
    if all(kind == "sliding_attention" for kind in types) and window is not None:
        return (LayerKind(window=window),)
    raise invalid(key, hf.get(key, 28), "all layers must have the same sliding window, or none")


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    keys=WINDOW_KEYS,
    pattern=pattern,
    derived=frozenset({"num_key_value_heads"}),
    kv_heads=32,
    qkv_bias=True,
)
