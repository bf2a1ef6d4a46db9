"""Qwen2, Qwen2.5: Llama with query, key and value biases, and a sliding window in all, some or none of its layers."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, flag, invalid
from dpo_jax.models.families.patterns import FULL, SLIDING, by_type, layer_types, window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind

WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the kinds of layers from ``layer_types`` or, in older files, ``max_window_layers``."""
    sliding_window, full_layers = window(hf, 4096), hf.get("max_window_layers", 28)
    if not flag(hf, "use_sliding_window"):
        sliding_window = None
    if type(full_layers) is not int or full_layers < 0:
        raise invalid("max_window_layers", full_layers, "it must be an integer, 0 or more")
    full_layers = layers if sliding_window is None else min(full_layers, layers)
    types = layer_types(hf, layers, [FULL] * full_layers + [SLIDING] * (layers - full_layers))
    if SLIDING in types and sliding_window is None:
        raise invalid("layer_types", types, "sliding attention needs use_sliding_window and a sliding_window")
    kinds = {FULL: LayerKind(rope=rope(hf)), SLIDING: LayerKind(window=sliding_window, rope=rope(hf))}
    return by_type(types, kinds)


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    keys=WINDOW_KEYS,
    defaults={"num_key_value_heads": 32},
    derived=frozenset({"num_key_value_heads"}),
    pattern=pattern,
    options=lambda hf: {"qkv_bias": True},
)
