"""Keys and tensors that families of mixtures of experts share."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families.family import flag, invalid, number, one_of, size
from dpo_jax.models.options import ExpertConfig
from dpo_jax.models.projections import EXPERTS

KEYS = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits"}
)
# Of Qwen's: all layers are alike here, so none may have a plain feed-forward.
QWEN_KEYS = KEYS | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}


def tensors(block: str = "mlp", **modules: str) -> dict[str, str]:
    """Return the tensor name of each matrix of the experts; {} stand for layer and expert.

    ``block``: the module that holds them in place of ``mlp``; ``modules``: other names of the last part of a module.
    """
    names = {}
    for row in EXPERTS.values():
        path, _, module = row.module.replace("mlp", block, 1).rpartition(".")
        names[f"layers/{row.name}"] = f"model.layers.{{}}.{path}.{modules.get(row.name, module)}.weight"
    return names


def experts(hf: Mapping[str, Any], default: int, **options: Any) -> ExpertConfig:
    """Return the options of the experts, with sizes and loss coefficient from the file; ``options``: the other fields.

    transformers reads either name of the number of experts, which is ``default`` without one; two must agree.
    """
    names = [key for key in ("num_experts", "num_local_experts") if key in hf] or ["num_experts"]
    count, per_token = size(hf, names[0], default), size(hf, "num_experts_per_tok")
    if size(hf, names[-1], default) != count:
        raise invalid(names[-1], hf[names[-1]], f"{names[0]} is {count}; remove the wrong one from the file")
    if per_token > count:
        raise invalid("num_experts_per_tok", per_token, f"it must be at most the number of experts, {count}")
    if hf.get("hidden_act", "silu") != "silu":
        raise invalid("hidden_act", hf["hidden_act"], "experts support only silu")
    flag(hf, "output_router_logits")
    coef = hf["router_aux_loss_coef"]
    coef = 0.0 if one_of(coef, (0, 0.0)) else float(number(hf, "router_aux_loss_coef"))
    return ExpertConfig(number=count, per_token=per_token, balance_coef=coef, **options)


def qwen(hf: Mapping[str, Any], default: int, **options: Any) -> dict[str, Any]:
    """Read the options of Qwen's experts, whose size is ``moe_intermediate_size`` instead of ``intermediate_size``."""
    if hf.get("decoder_sparse_step", 1) != 1:
        raise invalid("decoder_sparse_step", hf["decoder_sparse_step"], "it must be 1, as all layers must have experts")
    if hf.get("mlp_only_layers"):
        raise invalid("mlp_only_layers", hf["mlp_only_layers"], "it must be empty, as all layers must have experts")
    mixture = experts(hf, default, renormalize=flag(hf, "norm_topk_prob"), **options)
    return {"ffn": size(hf, "moe_intermediate_size"), "experts": mixture}
