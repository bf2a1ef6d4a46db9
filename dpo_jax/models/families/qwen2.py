"""Qwen2, Qwen2.5: Llama with biases of query, key and value, and one sliding window for all layers or none."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, flag, refuse, size
from dpo_jax.models.options import LayerKind

WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """The window that all layers have, by ``layer_types`` or by its older spelling; a mixture is refused."""
    window, full_layers = hf.get("sliding_window", 4096), hf.get("max_window_layers", 28)
    if window is not None and type(window) is not int:
        raise refuse("sliding_window", window, "a whole number or null is needed")
    window = size(hf, "sliding_window", 4096) if flag(hf, "use_sliding_window") and window is not None else None
    if type(full_layers) is not int or full_layers < 0:
        raise refuse("max_window_layers", full_layers, "a whole number is needed, 0 or more")
    types, key = hf.get("layer_types"), "layer_types"
    if types is None:
        full_layers, key = layers if window is None else min(full_layers, layers), "max_window_layers"
        types = ["full_attention"] * full_layers + ["sliding_attention"] * (layers - full_layers)
    elif not isinstance(types, list) or len(types) != layers:
        raise refuse(key, types, f"a list of num_hidden_layers, {layers}, names is needed")
    if all(kind == "full_attention" for kind in types):
        return (LayerKind(),)
    if all(kind == "sliding_attention" for kind in types) and window is not None:
        return (LayerKind(window=window),)
    raise refuse(key, hf.get(key, 28), "all layers must have the same sliding window, or none")


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    keys=WINDOW_KEYS,
    pattern=pattern,
    derived=frozenset({"num_key_value_heads"}),
    kv_heads=32,
    qkv_bias=True,
)
