"""Llama 2, 3, 3.1, 3.2 and other models of this type: biases set by the config, no window, no QK norm."""

from dpo_jax.models.families.family import Family

FAMILY = Family(
    architecture="LlamaForCausalLM",
    keys=frozenset({"attention_bias", "mlp_bias"}),
    derived=frozenset({"num_key_value_heads", "head_dim"}),
)
