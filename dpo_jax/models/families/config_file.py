"""Conversion of a Hugging Face ``config.json`` to typed decoder options.

Every key of the file is either read here, known not to affect the computation, or refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from dpo_jax.errors import UserError
from dpo_jax.models.families.family import MAX_LAYERS, Family, flag, invalid, number, one_of, size
from dpo_jax.models.families.keys import EMPTY_VALUES, HARMLESS_KEYS, NEUTRAL_VALUES, SHARED_KEYS
from dpo_jax.models.families.registry import FAMILIES
from dpo_jax.models.options import Activation, DecoderConfig, LongropeScaling

ACTIVATION_NAMES = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # the same functions


def _check_keys(hf: Mapping[str, Any], model_type: str, family: Family) -> None:
    architectures = hf.get("architectures") or [family.architecture]
    if architectures not in [[name] for name in (family.architecture, family.reward_architecture) if name is not None]:
        raise invalid("architectures", architectures, f"for {model_type} it must be [{family.architecture!r}]")
    known_keys = {*map(family.key, SHARED_KEYS), *HARMLESS_KEYS, *family.keys, *family.unused}
    for key, value in hf.items():
        is_known = key in known_keys or key.startswith("_")
        if not is_known and not one_of(value, NEUTRAL_VALUES.get(key, EMPTY_VALUES)):
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
    if family.wraps is not None:
        return replace(decoder_config(text_config(hf)), family=model_type, scores=_num_scores(hf, family))
    hf = {**family.defaults, **{key: value for key, value in hf.items() if key not in family.unused}}
    hidden, heads = size(hf, family.key("hidden_size")), size(hf, family.key("num_attention_heads"))
    layers = size(hf, family.key("num_hidden_layers"), most=MAX_LAYERS)
    fallbacks = {"num_key_value_heads": heads, "head_dim": hidden // heads, family.key("intermediate_size"): 4 * hidden}
    sizes = {**hf, **{key: fallbacks[key] for key in family.derived if hf.get(key, 0) is None}}
    kv_heads = size(sizes, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise invalid("num_key_value_heads", kv_heads, f"it must divide num_attention_heads, {heads}")
    if hf.get("head_dim") is None and hidden % heads:
        raise invalid("num_attention_heads", heads, f"it must divide hidden_size, {hidden}, or head_dim must be given")
    head_dim = size(sizes, "head_dim", hidden // heads)
    if head_dim % 2:
        raise invalid("head_dim", head_dim, "it must be even for rotary embeddings")
    if family.key("max_position_embeddings") in hf:
        size(hf, family.key("max_position_embeddings"))
    pattern = family.pattern(hf, layers)
    options = {"activation": hf.get(family.key("hidden_act"), "silu"), **family.options({**hf, "head_dim": head_dim})}
    choices = {**{name: name for name in get_args(Activation)}, **ACTIVATION_NAMES}
    if options["activation"] not in [*choices]:
        raise invalid(family.key("hidden_act"), options["activation"], f"choose from {', '.join(choices)}")
    options["activation"] = choices[options["activation"]]
    ffn = options.pop("ffn") if "ffn" in options else size(sizes, family.key("intermediate_size"))
    config = DecoderConfig(
        vocab=size(hf, "vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        norm_eps=float(number(hf, family.key("rms_norm_eps"), 1e-6)),
        pattern=pattern,
        tied=flag(hf, "tie_word_embeddings"),
        scores=_num_scores(hf, family),
        init_std=float(number(hf, "initializer_range", 0.02, most=1)),
        family=model_type,
        **options,
    )
    for scaling in (kind.rope.scaling for kind in config.kinds if kind.rope is not None):
        if isinstance(scaling, LongropeScaling) and 2 * len(scaling.factors) != config.rotated:
            remedy = f"it must have a factor for each pair of the {config.rotated} dims that rotate"
            key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
            raise invalid(f"{key}.short_factor", list(scaling.factors), remedy)
    return config


def _num_scores(hf: Mapping[str, Any], family: Family) -> int:
    return int(hf.get("architectures") == [family.reward_architecture])


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``config.json`` of a model's decoder: the file itself, or that of the text model which it wraps."""
    model_type = hf.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or family.wraps is None:
        return hf
    text_hf = hf.get(family.wraps)
    if not isinstance(text_hf, dict) or text_hf.get("model_type") != f"{model_type}_text":
        raise invalid(family.wraps, text_hf, f"it must be a dictionary of model_type {model_type}_text")
    outer_keys = {key: hf[key] for key in ("tie_word_embeddings",) if key in hf}
    return {key: value for key, value in text_hf.items() if key != "architectures"} | outer_keys


def context_length(hf: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that a model is made for, if its ``config.json`` names one."""
    text_hf = text_config(hf)
    return text_hf.get(FAMILIES[text_hf["model_type"]].key("max_position_embeddings"))


def refuse_positions(config: DecoderConfig, length: int, option: str, value: object) -> None:
    """Raise ``UserError`` if the decoder does not define sequences of ``length`` tokens, which ``option`` asks for."""
    max_positions = config.max_positions
    if max_positions is not None and length > max_positions:
        limit = f"the model's learned positions or rope scaling are defined for up to {max_positions} tokens"
        raise UserError(option, value, f"{limit}, but sequences may have {length}; shorten them")
