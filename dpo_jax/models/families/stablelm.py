"""StableLM 3B and StableLM 2 1.6B: Llama with LayerNorm and its biases; a quarter of each head's dims rotate."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, flag
from dpo_jax.models.families.rope import PARTIAL_KEY, rope, rotary_dims
from dpo_jax.models.options import LayerKind


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options for biases, the residual stream and rotary dims."""
    return {
        "norm": "layer",
        "norm_bias": True,
        "residual": "shared" if flag(hf, "use_parallel_residual") else "sequential",
        "qkv_bias": flag(hf, "use_qkv_bias"),
        "rotary_dims": rotary_dims(hf, 0.25),
    }


FAMILY = Family(
    architecture="StableLmForCausalLM",
    names={"rms_norm_eps": "layer_norm_eps"},
    keys=frozenset({PARTIAL_KEY, "use_qkv_bias", "use_parallel_residual"}),
    defaults={"layer_norm_eps": 1e-5, "num_key_value_heads": 32},
    derived=frozenset({"head_dim"}),
    pattern=lambda hf, layers: (LayerKind(rope=rope(hf, partial=True)),),
    options=options,
)
