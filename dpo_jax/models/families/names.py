"""Names that a family's files give to parameters, and which parts of a model can have adapters."""

from dpo_jax.models.families.registry import FAMILIES
from dpo_jax.models.options import DecoderConfig
from dpo_jax.models.projections import EXPERT_MODULE, EXPERT_PARAMETERS, layer_projections


def tensor_name(config: DecoderConfig, leaf: str) -> str:
    """Return the tensor name of a parameter in the family's files; {} stands for the layer.

    ``leaf``: path of the parameter in the tree.
    """
    return FAMILIES[config.family].tensor(leaf)


def modules(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Return the projections of each module of a layer that can have an adapter, in the order of the module's rows.

    In place of the module of all experts stand its parameters, which have adapters of their own. {} stands for the
    layer.
    """
    names_of: dict[str, tuple[str, ...]] = {}
    for name, row in layer_projections(config).items():
        if not row.adaptable:
            continue
        module = tensor_name(config, f"layers/{name}").removesuffix(".weight")
        if row.stack:
            module = f"{EXPERT_MODULE}.{EXPERT_PARAMETERS[name]}"
        names_of[module] = (*names_of.get(module, ()), name)
    return names_of


def is_expert_parameter(module: str) -> bool:
    """Return whether a name from `modules` is that of a parameter of the experts, rather than of a module."""
    return module.startswith(f"{EXPERT_MODULE}.")


def target_name(module: str) -> str:
    """Return the name by which `config.LoraConfig` and PEFT choose a module or a parameter of the experts."""
    return ".".join(module.split(".")[-3 if is_expert_parameter(module) else -1 :])


def target_names(config: DecoderConfig) -> tuple[str, ...]:
    """Return the names of all modules and parameters that can have adapters, in layer order."""
    return tuple(dict.fromkeys(map(target_name, modules(config))))
