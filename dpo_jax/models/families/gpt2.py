"""GPT-2: learned positions, LayerNorm and biases, a plain feed-forward, and matrices with their inputs first."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, flag, size, tensors_of
from dpo_jax.models.options import LayerKind

MODULES = {
    "attention_norm": "ln_1",
    "ffn_norm": "ln_2",
    "query": "attn.c_attn",
    "key": "attn.c_attn",
    "value": "attn.c_attn",
    "out": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
TENSORS = tensors_of("transformer.h.{}.", MODULES) | {
    "embed": "transformer.wte.weight",
    "position_embed": "transformer.wpe.weight",
    "final_norm": "transformer.ln_f.weight",
    "final_norm_bias": "transformer.ln_f.bias",
}


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the number of positions and the scale of attention."""
    return {
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "learned_positions": size(hf, "n_positions"),
        "attention_scale": None if flag(hf, "scale_attn_weights") else 1.0,
    }


FAMILY = Family(
    architecture="GPT2LMHeadModel",
    reward="GPT2ForSequenceClassification",
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    unused=frozenset({"num_key_value_heads", "intermediate_size"}),
    # those of summaries belong to models with two heads
    keys=frozenset({
        "scale_attn_weights", "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout",
    }),
    defaults={
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    derived=frozenset({"n_inner"}),
    pattern=lambda hf, layers: (LayerKind(rope=None),),
    options=options,
    tensors=TENSORS,
    transposed=frozenset(TENSORS[f"layers/{name}"] for name in ("query", "out", "up", "down")),
    renamed={"": "transformer."},
    ignored=frozenset({"attn.bias", "attn.masked_bias"}),
)  # fmt: skip
