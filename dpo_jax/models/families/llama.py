"""Llama 2, 3, 3.1, 3.2 and other models of this type: biases set by the config, no window, no QK norm."""

from dpo_jax.models.families.family import Family, attention_biases, flag
from dpo_jax.models.families.patterns import alike

FAMILY = Family(
    architecture="LlamaForCausalLM",
    keys=frozenset({"attention_bias", "mlp_bias"}),
    derived=frozenset({"num_key_value_heads", "head_dim"}),
    pattern=alike,
    options=lambda hf: {**attention_biases(hf), "mlp_bias": flag(hf, "mlp_bias")},
)
