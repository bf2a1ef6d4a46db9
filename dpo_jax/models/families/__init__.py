"""Model families: one file each, and what is read from a family's ``config.json`` and tensor names."""

from dpo_jax.models.families.config_file import context_length, decoder_config, refuse_positions
from dpo_jax.models.families.names import is_expert_parameter, modules, target_name, target_names, tensor_name
from dpo_jax.models.families.registry import FAMILIES

__all__ = [
    "FAMILIES",
    "context_length",
    "decoder_config",
    "is_expert_parameter",
    "modules",
    "refuse_positions",
    "target_name",
    "target_names",
    "tensor_name",
]
