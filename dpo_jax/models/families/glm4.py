"""GLM-4, dense: norms before and after each block, half of each head's dims rotate, and gate and up are fused."""

from dpo_jax.models.families.family import Family, flag, tensors_of
from dpo_jax.models.families.rope import PARTIAL_KEY, rope, rotary_dims
from dpo_jax.models.options import LayerKind

MODULES = {
    "attention_post_norm": "post_self_attn_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
    "gate": "mlp.gate_up_proj",
    "up": "mlp.gate_up_proj",
}

FAMILY = Family(
    architecture="Glm4ForCausalLM",
    keys=frozenset({"attention_bias", PARTIAL_KEY}),
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "attention_bias": True,
    },
    pattern=lambda hf, layers: (LayerKind(rope=rope(hf, partial=True)),),
    options=lambda hf: {
        "post_norm": True,
        "qkv_bias": flag(hf, "attention_bias"),
        "rotary_dims": rotary_dims(hf, 0.5),
        "rotary_interleaved": True,
    },
    tensors=tensors_of("model.layers.{}.", MODULES),
)
