"""Gemma 2: norms before and after each block, capped scores and logits, and a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import gemma
from dpo_jax.models.families.family import Family, invalid, number
from dpo_jax.models.families.patterns import every, full_and_sliding, layer_types, window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind

KEYS = gemma.FAMILY.keys | {
    "hidden_activation",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window_size",
}
DEFAULTS = gemma.DEFAULTS | {"num_key_value_heads": 4}
TENSORS = {
    "layers/attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/ffn_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/ffn_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the pattern of one layer with a window and one without, unless ``layer_types`` says otherwise."""
    sliding_window = window(hf, 4096)
    if hf.get("sliding_window_size", sliding_window) != sliding_window:  # published files have both
        raise invalid(
            "sliding_window_size", hf["sliding_window_size"], f"it must equal sliding_window, {sliding_window}"
        )
    return full_and_sliding(layer_types(hf, layers, every(2, layers)), sliding_window, rope(hf), rope(hf))


def options(
    hf: Mapping[str, Any], attention_cap: float | None = 50.0, logit_cap: float | None = 30.0
) -> dict[str, Any]:
    """Read the scale of attention scores and the soft caps of scores and logits; null means no cap."""

    def cap(key: str, default: float | None) -> float | None:
        return None if hf.get(key, default) is None else float(number(hf, key, default))

    return gemma.options(hf) | {
        "post_norm": True,
        "activation": hf.get("hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": float(number(hf, "query_pre_attn_scalar", 256)) ** -0.5,
        "attention_softcap": cap("attn_logit_softcapping", attention_cap),
        "logit_softcap": cap("final_logit_softcapping", logit_cap),
    }


FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    keys=KEYS,
    defaults=DEFAULTS,
    pattern=pattern,
    options=options,
    tensors=TENSORS,
)
