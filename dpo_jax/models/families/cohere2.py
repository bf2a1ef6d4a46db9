"""Command R7B, Command A: attention and feed-forward share a LayerNorm; only layers with a window use RoPE."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, attention_biases, number, size
from dpo_jax.models.families.patterns import every, full_and_sliding, layer_types, window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind

# Keys that published files have and transformers ignores.
IGNORED_KEYS = frozenset(
    {
        "layer_switch",
        "order_of_interleaved_layers",
        "position_embedding_type",
        "rotary_pct",
        "use_embedding_sharing",
        "use_gated_activation",
        "use_parallel_block",
        "use_parallel_embedding",
    }
)


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the pattern of three layers with a window and one without, unless ``layer_types`` says otherwise."""
    types = layer_types(hf, layers, every(size(hf, "sliding_window_pattern", 4), layers))
    return full_and_sliding(types, window(hf, 4096), full=None, sliding=rope(hf))


FAMILY = Family(
    architecture="Cohere2ForCausalLM",
    reward=None,
    names={"rms_norm_eps": "layer_norm_eps"},
    keys=IGNORED_KEYS | {"attention_bias", "logit_scale", "sliding_window", "sliding_window_pattern", "layer_types"},
    defaults={"layer_norm_eps": 1e-5, "tie_word_embeddings": True},
    derived=frozenset({"num_key_value_heads", "head_dim"}),
    pattern=pattern,
    options=lambda hf: {
        "norm": "layer",
        "residual": "shared",
        "rotary_interleaved": True,
        "logit_scale": float(number(hf, "logit_scale", 0.0625)),
        **attention_biases(hf),
    },
)
