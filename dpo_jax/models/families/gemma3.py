"""Gemma 3: Gemma 2 without caps, with RMSNorm of each query and key head, and full attention in every sixth layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo_jax.models.families import gemma2
from dpo_jax.models.families.family import Family, number, size
from dpo_jax.models.families.patterns import FULL, SLIDING, every, full_and_sliding, layer_types, window
from dpo_jax.models.families.rope import ropes_by_type
from dpo_jax.models.options import LayerKind
from dpo_jax.models.projections import TENSORS


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the kinds of layers: full attention has a larger rotary base than sliding attention."""
    thetas = {
        FULL: float(number(hf, "rope_theta", 1_000_000.0)),
        SLIDING: float(number(hf, "rope_local_base_freq", 10_000.0)),
    }
    ropes = ropes_by_type(hf, thetas)
    types = layer_types(hf, layers, every(size(hf, "sliding_window_pattern", 6), layers))
    return full_and_sliding(types, window(hf, 4096), ropes[FULL], ropes[SLIDING])


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    reward="Gemma3TextForSequenceClassification",
    keys=gemma2.KEYS | {"rope_local_base_freq", "sliding_window_pattern"},
    defaults=gemma2.DEFAULTS | {"vocab_size": 262_208, "num_attention_heads": 8},  # published files leave these out
    pattern=pattern,
    options=lambda hf: gemma2.options(hf, None, None) | {"qk_norm": "head"},
    tensors=gemma2.TENSORS,
)

_TEXT_TENSORS = TENSORS | gemma2.TENSORS
WITH_VISION = replace(
    FAMILY,
    architecture="Gemma3ForConditionalGeneration",
    reward="Gemma3ForSequenceClassification",
    wraps="text_config",
    keys=frozenset(
        {
            "text_config",
            "vision_config",
            "mm_tokens_per_image",
            "image_token_index",
            "boi_token_index",
            "eoi_token_index",
            "image_token_id",
            "boi_token_id",
            "eoi_token_id",
        }
    ),
    tensors={leaf: name.replace("model.", "model.language_model.", 1) for leaf, name in _TEXT_TENSORS.items()},
    renamed={"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
    carried=frozenset(
        {
            "model.vision_tower.",
            "model.multi_modal_projector.",
            "vision_tower.",
            "multi_modal_projector.",
        }
    ),
)
