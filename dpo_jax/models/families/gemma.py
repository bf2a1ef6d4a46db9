"""Gemma 1: scaled embeddings, RMSNorm by 1 + weight, and a feed-forward gated by GELU."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, attention_biases, invalid, size
from dpo_jax.models.families.patterns import alike

DEFAULTS = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder options that all Gemma models share."""
    activation = hf.get("hidden_act")
    return {
        # "gelu" in old files means this approximation, for which the models were trained
        "activation": "gelu_pytorch_tanh" if activation == "gelu" else activation,
        "norm_offset": 1.0,
        "embed_scale": size(hf, "hidden_size") ** 0.5,
        **attention_biases(hf),
    }


def _options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, after checking ``hidden_activation``, which published files have but transformers ignores."""
    fields = options(hf)
    if hf.get("hidden_activation") not in (None, fields["activation"]):
        raise invalid("hidden_activation", hf["hidden_activation"], f"it must be {fields['activation']}, as hidden_act")
    return fields


FAMILY = Family(
    architecture="GemmaForCausalLM",
    keys=frozenset({"attention_bias", "hidden_activation"}),
    defaults=DEFAULTS,
    pattern=alike,
    options=_options,
)
