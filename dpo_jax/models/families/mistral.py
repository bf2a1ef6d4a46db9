"""Mistral: Llama without biases, with the same sliding window in all layers unless it is null."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, size
from dpo_jax.models.options import LayerKind


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Read the window of all layers from ``sliding_window``; null means no window, and the default is 4096."""
    is_null = "sliding_window" in hf and hf["sliding_window"] is None
    return (LayerKind(window=None if is_null else size(hf, "sliding_window", 4096)),)


FAMILY = Family(
    architecture="MistralForCausalLM",
    keys=frozenset({"sliding_window"}),
    pattern=pattern,
    derived=frozenset({"head_dim"}),
    kv_heads=8,
)
