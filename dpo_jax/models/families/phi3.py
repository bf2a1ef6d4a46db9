"""Phi-3, Phi-3.5 and Phi-4: Llama with fused matrices and LongRoPE; in some, only part of each head's dims rotate."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import Family, tensors_of
from dpo_jax.models.families.patterns import window
from dpo_jax.models.families.rope import PARTIAL_KEY, rope, rotary_dims
from dpo_jax.models.families.scalings import ORIGINAL
from dpo_jax.models.options import LayerKind

MODULES = {
    "query": "self_attn.qkv_proj",
    "key": "self_attn.qkv_proj",
    "value": "self_attn.qkv_proj",
    "gate": "mlp.gate_up_proj",
    "up": "mlp.gate_up_proj",
}


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the pattern of layers that are all alike; old files call LongRoPE su or yarn."""
    new_names = {"su": "longrope", "yarn": "longrope"}
    scalings = {key: dict(hf[key]) for key in ("rope_scaling", "rope_parameters") if isinstance(hf.get(key), dict)}
    for scaling in scalings.values():
        names = {key: scaling[key] for key in ("type", "rope_type") if isinstance(scaling.get(key), str)}
        scaling |= {key: new_names.get(name, name) for key, name in names.items()}
    return (LayerKind(window=window(hf, None), rope=rope({**hf, **scalings}, partial=True)),)


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    keys=frozenset({"sliding_window", ORIGINAL, PARTIAL_KEY}),
    defaults={"rms_norm_eps": 1e-5, ORIGINAL: 4096, "max_position_embeddings": 4096},
    derived=frozenset({"num_key_value_heads", "head_dim"}),
    pattern=pattern,
    options=lambda hf: {"rotary_dims": rotary_dims(hf)},
    tensors=tensors_of("model.layers.{}.", MODULES),
)
