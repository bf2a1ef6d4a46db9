"""Granite 3 and 4, dense: Llama with four scale factors, for embeddings, scores, residual branches and logits."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, attention_biases, flag, number
from dpo_jax.models.families.patterns import alike


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the four factors and the options for biases."""
    return {
        "embed_scale": float(number(hf, "embedding_multiplier", 1.0)),
        "attention_scale": float(number(hf, "attention_multiplier", 1.0)),
        "residual_scale": float(number(hf, "residual_multiplier", 1.0)),
        "logit_scale": 1 / float(number(hf, "logits_scaling", 1.0)),
        **attention_biases(hf),
        "mlp_bias": flag(hf, "mlp_bias"),
    }


FAMILY = Family(
    architecture="GraniteForCausalLM",
    reward=None,
    keys=frozenset(
        {
            "attention_bias",
            "mlp_bias",
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
        }
    ),
    derived=frozenset({"num_key_value_heads"}),
    pattern=alike,
    options=options,
)
