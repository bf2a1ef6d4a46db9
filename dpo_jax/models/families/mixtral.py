"""Mixtral: Mistral with experts in every layer, their routing weights renormalized to sum to 1."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import mistral, mixture
from dpo_jax.models.families.family import Family, invalid


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options for experts; router noise is refused, because it would change the log-probs."""
    if hf.get("router_jitter_noise"):
        raise invalid("router_jitter_noise", hf["router_jitter_noise"], "routing must be deterministic; set it to 0")
    return {"experts": mixture.experts(hf, 8, renormalize=True)}


FAMILY = Family(
    architecture="MixtralForCausalLM",
    keys=mistral.FAMILY.keys | mixture.KEYS | {"router_jitter_noise"},
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "rope_theta": 1e6,
    },
    derived=frozenset({"num_key_value_heads", "head_dim"}),
    pattern=mistral.FAMILY.pattern,
    options=options,
    tensors=mixture.tensors("block_sparse_moe", gate="w1", up="w3", down="w2"),
)
