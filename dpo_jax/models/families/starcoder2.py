"""StarCoder2: LayerNorm, biases, a plain feed-forward, and a sliding window in all layers unless it is null."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, flag, invalid, tensors_of
from dpo_jax.models.families.patterns import window
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind

MODULES = {"up": "mlp.c_fc", "down": "mlp.c_proj"}


# What published files say of all models of this type, and transformers does not read.
REQUIRED_VALUES = {"mlp_type": "default", "norm_type": "layer_norm"}


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read whether projections have biases."""
    for key, value in REQUIRED_VALUES.items():
        if hf.get(key, value) != value:
            raise invalid(key, hf[key], f"it must be {value}")
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), flag(hf, "use_bias"))
    return {"norm": "layer", "norm_bias": True, "gated": False, **biases}


FAMILY = Family(
    architecture="Starcoder2ForCausalLM",
    names={"rms_norm_eps": "norm_epsilon"},
    unused=frozenset({"rms_norm_eps"}),
    keys=frozenset({"sliding_window", "use_bias", *REQUIRED_VALUES}),
    defaults={
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "initializer_range": 0.018042,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    derived=frozenset({"head_dim"}),
    pattern=lambda hf, layers: (LayerKind(window=window(hf, None), rope=rope(hf)),),
    options=options,
    tensors=tensors_of("model.layers.{}.", MODULES),
)
