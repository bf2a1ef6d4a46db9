"""GPT-NeoX, Pythia: LayerNorm, biases, a plain feed-forward parallel to attention, and some dims of a head rotate."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, attention_biases, flag, tensors_of
from dpo_jax.models.families.rope import rope, rotary_dims
from dpo_jax.models.options import LayerKind

MODULES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "query": "attention.query_key_value",
    "key": "attention.query_key_value",
    "value": "attention.query_key_value",
    "out": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
TENSORS = tensors_of("gpt_neox.layers.{}.", MODULES) | {
    "embed": "gpt_neox.embed_in.weight",
    "final_norm": "gpt_neox.final_layer_norm.weight",
    "final_norm_bias": "gpt_neox.final_layer_norm.bias",
    "unembed": "embed_out.weight",
}


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options for biases, the residual stream and rotary dims."""
    return {
        "norm": "layer",
        "norm_bias": True,
        "residual": "parallel" if flag(hf, "use_parallel_residual") else "sequential",
        "gated": False,
        **attention_biases(hf),
        "mlp_bias": True,
        "rotary_dims": rotary_dims(hf, 0.25, "rotary_pct"),
    }


FAMILY = Family(
    architecture="GPTNeoXForCausalLM",
    names={"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base"},
    unused=frozenset({"num_key_value_heads", "rms_norm_eps"}),
    keys=frozenset({"use_parallel_residual", "attention_bias", "rotary_pct"}),
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    pattern=lambda hf, layers: (LayerKind(rope=rope(hf, "rotary_emb_base", partial=True)),),
    options=options,
    tensors=TENSORS,
    grouped={TENSORS["layers/query"]: "heads", TENSORS["layers/query_bias"]: "heads"},
    renamed={"lm_head.": "embed_out."},
    ignored=frozenset({"attention.bias", "attention.masked_bias"}),
)
