"""Supported model families, and conversion of a Hugging Face ``config.json`` to typed decoder options.

Every key of the file is either read here, known not to affect the computation, or refused by name.
"""

from collections.abc import Mapping
from typing import Any, get_args

from dpo_jax.models.families import (
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from dpo_jax.models.families.family import MAX_LAYERS, Family, flag, invalid, number, one_of, size
from dpo_jax.models.families.keys import EMPTY, HARMLESS_KEYS, NEUTRAL_VALUES, SHARED_KEYS
from dpo_jax.models.options import Activation, DecoderConfig
from dpo_jax.models.projections import layer_projections

FAMILIES = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "smollm3": smollm3.FAMILY,
    "granite": granite.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "olmoe": olmoe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
}


def _check_keys(hf: Mapping[str, Any], model_type: str, family: Family) -> None:
    architectures = hf.get("architectures") or [family.architecture]
    if architectures not in ([family.architecture], [family.reward_architecture]):
        raise invalid("architectures", architectures, f"for {model_type} it must be [{family.architecture!r}]")
    for key, value in hf.items():
        is_known = key in SHARED_KEYS or key in HARMLESS_KEYS or key in family.keys or key.startswith("_")
        if not is_known and not one_of(value, NEUTRAL_VALUES.get(key, EMPTY)):
            remedy = f"the {model_type} decoder has no such option; remove it from the file if it has no effect"
            raise invalid(key, value, remedy)


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Convert a parsed Hugging Face ``config.json`` to typed options.

    Raises:
        UserError: unknown ``model_type``, invalid value, or a key that requests an unsupported computation.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise invalid("model_type", model_type, f"choose from {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    _check_keys(hf, model_type, family)
    hf = {**family.defaults, **hf}
    hidden, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    layers = size(hf, "num_hidden_layers", most=MAX_LAYERS)
    derived = {"num_key_value_heads": heads, "head_dim": hidden // heads}
    sizes = {**hf, **{key: derived[key] for key in family.derived if hf.get(key, 0) is None}}
    kv_heads = size(sizes, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise invalid("num_key_value_heads", kv_heads, f"it must divide num_attention_heads, {heads}")
    if hf.get("head_dim") is None and hidden % heads:
        raise invalid("num_attention_heads", heads, f"it must divide hidden_size, {hidden}, or head_dim must be given")
    head_dim = size(sizes, "head_dim", hidden // heads)
    if head_dim % 2:
        raise invalid("head_dim", head_dim, "it must be even for rotary embeddings")
    if "max_position_embeddings" in hf:
        size(hf, "max_position_embeddings")
    options = {"activation": hf.get("hidden_act", "silu"), **family.options(hf)}
    if options["activation"] not in get_args(Activation):
        raise invalid("hidden_act", options["activation"], f"choose from {', '.join(get_args(Activation))}")
    if "ffn" not in options:
        options["ffn"] = size(hf, "intermediate_size")
    return DecoderConfig(
        vocab=size(hf, "vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=float(number(hf, "rms_norm_eps", 1e-6)),
        pattern=family.pattern(hf, layers),
        tied=flag(hf, "tie_word_embeddings"),
        scores=int(hf.get("architectures") == [family.reward_architecture]),
        init_std=float(number(hf, "initializer_range", 0.02, most=1)),
        family=model_type,
        **options,
    )


def tensor_name(config: DecoderConfig, leaf: str) -> str:
    """Return the name in the files of a parameter; {} stands for the layer.

    ``leaf``: path of the parameter in the tree.
    """
    return FAMILIES[config.family].tensor(leaf)


def modules(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Return the projections of each module of a layer that can have an adapter, in the order of its rows.

    {} stands for the layer.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in (name for name, row in layer_projections(config).items() if row.adaptable):
        module = tensor_name(config, f"layers/{name}").removesuffix(".weight")
        found[module] = (*found.get(module, ()), name)
    return found


def target_name(module: str) -> str:
    """Return the name by which `config.LoraConfig` and PEFT choose a module."""
    return module.rpartition(".")[2]


def target_names(config: DecoderConfig) -> tuple[str, ...]:
    """Return the names of the modules that can have adapters, in layer order."""
    return tuple(dict.fromkeys(map(target_name, modules(config))))
