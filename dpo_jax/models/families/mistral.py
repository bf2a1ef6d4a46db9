"""Mistral: Llama without biases, and with one sliding window for all layers unless it is null."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, size
from dpo_jax.models.options import LayerKind


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """The number alone decides."""
    has_none = "sliding_window" in hf and hf["sliding_window"] is None
    return (LayerKind(window=None if has_none else size(hf, "sliding_window", 4096)),)


FAMILY = Family(
    architecture="MistralForCausalLM",
    keys=frozenset({"sliding_window"}),
    pattern=pattern,
    derived=frozenset({"head_dim"}),
    kv_heads=8,
)
