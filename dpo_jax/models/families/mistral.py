"""Mistral: Llama without biases, with the same sliding window in all layers unless it is null."""

from dpo_jax.models.families.family import Family
from dpo_jax.models.families.patterns import window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind

FAMILY = Family(
    architecture="MistralForCausalLM",
    keys=frozenset({"sliding_window"}),
    defaults={"num_key_value_heads": 8},
    derived=frozenset({"head_dim"}),
    pattern=lambda hf, layers: (LayerKind(window=window(hf, 4096), rope=rope(hf)),),
)
