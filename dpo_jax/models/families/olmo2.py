"""OLMo 2: norms after attention and feed-forward instead of before them, and RMSNorm over all query or key heads."""

from dpo_jax.models.families.family import Family, attention_biases
from dpo_jax.models.families.patterns import alike

TENSORS = {
    "layers/attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/ffn_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}

FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    keys=frozenset({"attention_bias"}),
    defaults={"rms_norm_eps": 1e-5},
    derived=frozenset({"num_key_value_heads"}),
    pattern=alike,
    options=lambda hf: {
        "pre_norm": False,
        "post_norm": True,
        "qk_norm": "all",
        **attention_biases(hf),
    },
    tensors=TENSORS,
)
