"""Llama 2, 3, 3.1, 3.2, and all that share the type: biases where the config says so, no window, no norms of heads."""

from dpo_jax.models.families.family import Family

FAMILY = Family(
    architecture="LlamaForCausalLM",
    keys=frozenset({"attention_bias", "mlp_bias"}),
    derived=frozenset({"num_key_value_heads", "head_dim"}),
)
