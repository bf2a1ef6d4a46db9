"""OLMoE: RMSNorm over all query or key heads; experts in every layer, their routing weights not renormalized."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import mixture
from dpo_jax.models.families.family import Family, attention_biases, flag
from dpo_jax.models.families.patterns import alike


def options(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options for biases and experts."""
    experts = mixture.experts(hf, 64, renormalize=flag(hf, "norm_topk_prob"))
    return {"qk_norm": "all", **attention_biases(hf), "experts": experts}


FAMILY = Family(
    architecture="OlmoeForCausalLM",
    reward=None,
    keys=mixture.KEYS | {"attention_bias", "norm_topk_prob"},
    defaults={"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01},
    derived=frozenset({"num_key_value_heads"}),
    pattern=alike,
    options=options,
    tensors=mixture.tensors(),
)
