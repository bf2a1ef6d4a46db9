"""SmolLM3: Llama in which every fourth layer does not rotate its queries and keys."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, attention_biases, flag, invalid, one_of, size
from dpo_jax.models.families.patterns import FULL, SLIDING, shortest, switched_window, windowed_types
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the pattern of layers that rotate (1 in ``no_rope_layers``) and others, which may have a window."""
    interval = size(hf, "no_rope_layer_interval", 4)
    rotates = hf.get("no_rope_layers")
    if rotates is None:
        rotates = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(rotates, list) or len(rotates) != layers or not all(one_of(value, (0, 1)) for value in rotates):
        raise invalid("no_rope_layers", rotates, f"it must be a list of {layers} values (num_hidden_layers), 0 or 1")
    sliding_window = switched_window(hf, None)
    default = [FULL if rotated or sliding_window is None else SLIDING for rotated in rotates]
    types = windowed_types(hf, layers, default, sliding_window)
    windows, ropes = {FULL: None, SLIDING: sliding_window}, (None, rope(hf))
    kinds = zip(types, rotates, strict=True)
    return shortest([LayerKind(window=windows[layer_type], rope=ropes[rotated]) for layer_type, rotated in kinds])


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    keys=frozenset(
        {
            "attention_bias",
            "mlp_bias",
            "no_rope_layers",
            "no_rope_layer_interval",
            "use_sliding_window",
            "sliding_window",
            "layer_types",
        }
    ),
    defaults={"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    derived=frozenset({"num_key_value_heads"}),
    pattern=pattern,
    options=lambda hf: {**attention_biases(hf), "mlp_bias": flag(hf, "mlp_bias")},
)
