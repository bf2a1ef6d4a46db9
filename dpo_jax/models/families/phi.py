"""Phi-1, Phi-1.5 and Phi-2: LayerNorm, biases (of the logits, too), and a plain feed-forward parallel to attention."""

from dpo_jax.models.families.family import Family, tensors_of
from dpo_jax.models.families.rope import PARTIAL_KEY, rope, rotary_dims
from dpo_jax.models.options import LayerKind

MODULES = {"out": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}

FAMILY = Family(
    architecture="PhiForCausalLM",
    names={"rms_norm_eps": "layer_norm_eps"},
    keys=frozenset({PARTIAL_KEY}),
    defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
    derived=frozenset({"num_key_value_heads", "head_dim"}),
    pattern=lambda hf, layers: (LayerKind(rope=rope(hf, partial=True)),),
    options=lambda hf: {
        "norm": "layer",
        "norm_bias": True,
        "residual": "shared",
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "unembed_bias": True,
        "rotary_dims": rotary_dims(hf, 0.5),
    },
    tensors=tensors_of("model.layers.{}.", MODULES)
    | {
        "final_norm": "model.final_layernorm.weight",
        "final_norm_bias": "model.final_layernorm.bias",
    },
)
