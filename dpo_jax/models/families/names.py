"""Names that a family's files give to parameters, and the modules that can have adapters."""

from dpo_jax.models.families.registry import FAMILIES
from dpo_jax.models.options import DecoderConfig
from dpo_jax.models.projections import layer_projections


def tensor_name(config: DecoderConfig, leaf: str) -> str:
    """Return the tensor name of a parameter in the family's files; {} stands for the layer.

    ``leaf``: path of the parameter in the tree.
    """
    return FAMILIES[config.family].tensor(leaf)


def modules(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Return the projections of each module of a layer that can have an adapter, in the order of its rows.

    {} stands for the layer.
    """
    names_of: dict[str, tuple[str, ...]] = {}
    for name in (name for name, row in layer_projections(config).items() if row.adaptable):
        module = tensor_name(config, f"layers/{name}").removesuffix(".weight")
        names_of[module] = (*names_of.get(module, ()), name)
    return names_of


def target_name(module: str) -> str:
    """Return the name by which `config.LoraConfig` and PEFT choose a module."""
    return module.rpartition(".")[2]


def target_names(config: DecoderConfig) -> tuple[str, ...]:
    """Return the names of the modules that can have adapters, in layer order."""
    return tuple(dict.fromkeys(map(target_name, modules(config))))
