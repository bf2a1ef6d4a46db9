"""Qwen3, dense: Llama with RMSNorm of each query and key head, a default head_dim of 128, and Qwen2's window keys."""

from dpo_jax.models.families import qwen2
from dpo_jax.models.families.family import Family, attention_biases

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    keys=qwen2.WINDOW_KEYS | {"attention_bias"},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    derived=frozenset({"num_key_value_heads"}),
    pattern=qwen2.pattern,
    options=lambda hf: {**attention_biases(hf), "qk_norm": "head"},
)
