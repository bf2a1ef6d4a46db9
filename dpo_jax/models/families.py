"""Which decoders exist, and how a Hugging Face ``config.json`` becomes the typed options of one.

Every key of the file is either read here, known to leave the computation as it is, or refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from dpo_jax.errors import UserError, shown, unusable
from dpo_jax.models.options import Activation, DecoderConfig, LinearScaling, Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What one ``model_type`` means where its config.json is silent."""

    architecture: str
    keys: frozenset[str]  # keys of its own, next to those that all have
    kv_heads: int | None  # default; None: as many as query heads
    derived: frozenset[str]  # sizes that follow from the others where they are null; elsewhere null is refused
    head_dim: int | None = None  # default; None: hidden / heads
    qkv_bias: bool = False
    qk_norm: bool = False


_LAYER_TYPES = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

FAMILIES = {
    "llama": _Family(
        architecture="LlamaForCausalLM", kv_heads=None, keys=frozenset({"attention_bias", "mlp_bias"}),
        derived=frozenset({"num_key_value_heads", "head_dim"}),
    ),
    "mistral": _Family(
        architecture="MistralForCausalLM", kv_heads=8, keys=frozenset({"sliding_window"}),
        derived=frozenset({"head_dim"}),
    ),
    "qwen2": _Family(
        architecture="Qwen2ForCausalLM", kv_heads=32, keys=_LAYER_TYPES, qkv_bias=True,
        derived=frozenset({"num_key_value_heads"}),
    ),
    "qwen3": _Family(
        architecture="Qwen3ForCausalLM", kv_heads=32, keys=_LAYER_TYPES | {"attention_bias"}, head_dim=128,
        qk_norm=True, derived=frozenset({"num_key_value_heads"}),
    ),
}  # fmt: skip

_SHARED_KEYS = frozenset({
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
})  # fmt: skip

# Dropout belongs here: this program trains without any. The rest concerns storage, generation, tokens and tools.
_HARMLESS_KEYS = frozenset({
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "use_cache", "pretraining_tp", "torch_dtype", "dtype", "transformers_version", "id2label",
    "label2id", "num_labels", "return_dict", "chunk_size_feed_forward", "problem_type", "tokenizer_class",
    "task_specific_params", "name_or_path", "model_max_length", "bos_token", "eos_token", "pad_token", "max_length",
    "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "diversity_penalty", "num_beams", "num_beam_groups", "num_return_sequences", "encoder_no_repeat_ngram_size",
    "no_repeat_ngram_size", "unsloth_version", "unsloth_fixed", "transformers.js_config", "is_llama_config",
})  # fmt: skip
_EMPTY = (None, False, 0, 0.0, "", [], {})
# Keys that transformers reads in the config of any model, with the values that leave the computation as it is.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "is_causal": (True, None),
    "partial_rotary_factor": (1, 1.0, None),
    "original_max_position_embeddings": (None,),
    "layer_types": (None,),
    "quantization_config": (None, {}),
}
_MAX_LAYERS, _MAX_SIZE = 10_000, 2**31 - 1  # larger numbers are mistakes, and their arrays would fit nowhere


def _refuse(key: str, value: object, why: str) -> UserError:
    return unusable(f"config.json: {key}", value, why)


def _one_of(value: object, options: Sequence[object]) -> bool:
    """As ``in``, but also for what is read from a file and cannot be compared or hashed; 1 is not True here."""
    return any(value is option or (type(value) is type(option) and value == option) for option in options)


def _number(hf: Mapping[str, Any], key: str, default: float | None = None, most: float = 1e30) -> Any:
    """A positive number; an absent key takes the default."""
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise _refuse(key, value, f"a positive number is needed, at most {most:g}")
    return value


def _size(hf: Mapping[str, Any], key: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
    value = _number(hf, key, default, most)
    if not isinstance(value, int):
        raise _refuse(key, value, "a whole number is needed")
    return value


def _flag(hf: Mapping[str, Any], key: str) -> bool:
    value = hf.get(key, False)
    if not isinstance(value, bool):
        raise _refuse(key, value, "true or false is needed")
    return value


def _rope(hf: Mapping[str, Any]) -> tuple[float, LinearScaling | Llama3Scaling | None]:
    """Base and scaling, as transformers 5 writes them (``rope_parameters``) or as older ones do (``rope_scaling``).

    Where both are given, transformers takes the older key whole, base too, and other programs the newer.
    """
    old, new = (_read_rope(hf, key) for key in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise _refuse("rope_scaling", hf["rope_scaling"], f"rope_parameters, {shown(hf['rope_parameters'])}, says "
                      "otherwise, and programs differ in which they take; remove the wrong one from the file"
                      )  # fmt: skip
    return old or new or (float(_number(hf, "rope_theta", 10000.0)), None)


def _read_rope(hf: Mapping[str, Any], key: str) -> tuple[float, LinearScaling | Llama3Scaling | None] | None:
    """What one of the two keys says; None: nothing."""
    rope = hf.get(key)
    if rope is not None and not isinstance(rope, dict):
        raise _refuse(key, rope, "a dictionary is needed")
    if not rope:
        return None
    named = {f"{key}.{name}": value for name, value in rope.items()}
    theta = float(_number(named, f"{key}.rope_theta", _number(hf, "rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    options = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if not isinstance(kind, str) or kind not in options:
        raise _refuse(key, rope, f"rope scaling can be one of {', '.join(options)}")
    for name in rope.keys() - options[kind] - {"rope_theta", "rope_type", "type"}:
        if not _one_of(rope[name], _NEUTRAL_VALUES.get(name, (None,))):
            raise _refuse(f"{key}.{name}", rope[name], f"rope scaling {kind} has no such option here")
    if kind == "linear":
        return theta, LinearScaling(factor=float(_number(named, f"{key}.factor")))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=float(_number(named, f"{key}.factor")),
            low_freq_factor=float(_number(named, f"{key}.low_freq_factor")),
            high_freq_factor=float(_number(named, f"{key}.high_freq_factor")),
            original_max_position_embeddings=_size(
                named, f"{key}.original_max_position_embeddings", hf.get("max_position_embeddings")
            ),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise _refuse(f"{key}.high_freq_factor", scaling.high_freq_factor, "it must exceed low_freq_factor")
        return theta, scaling
    return theta, None


def _window(hf: Mapping[str, Any], family: _Family, layers: int) -> int | None:
    """The sliding window that all layers have; a mixture of layers is refused."""
    if "sliding_window" not in family.keys:
        return None
    if "use_sliding_window" not in family.keys:  # Mistral: the number alone decides
        return None if "sliding_window" in hf and hf["sliding_window"] is None else _size(hf, "sliding_window", 4096)
    given = hf.get("sliding_window", 4096)
    if given is not None and type(given) is not int:
        raise _refuse("sliding_window", given, "a whole number or null is needed")
    window = _size(hf, "sliding_window", 4096) if _flag(hf, "use_sliding_window") and given is not None else None
    types, from_layer = hf.get("layer_types"), hf.get("max_window_layers", 28)
    if type(from_layer) is not int or from_layer < 0:
        raise _refuse("max_window_layers", from_layer, "a whole number is needed, 0 or more")
    if types is None:
        full_layers = layers if window is None else min(from_layer, layers)
        types = ["full_attention"] * full_layers + ["sliding_attention"] * (layers - full_layers)
    elif not isinstance(types, list) or len(types) != layers:
        raise _refuse("layer_types", types, f"a list of num_hidden_layers, {layers}, names is needed")
    if all(kind == "full_attention" for kind in types):
        return None
    if all(kind == "sliding_attention" for kind in types) and window is not None:
        return window
    key = "max_window_layers" if hf.get("layer_types") is None else "layer_types"
    raise _refuse(key, hf.get(key, 28), "here all layers have the same sliding window, or none has one")


def _check_keys(hf: Mapping[str, Any], model_type: str, family: _Family) -> None:
    architectures = hf.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise _refuse("architectures", architectures, f"for {model_type} it has to be [{family.architecture!r}]")
    for key, value in hf.items():
        recognised = key in _SHARED_KEYS or key in _HARMLESS_KEYS or key in family.keys or key.startswith("_")
        if not recognised and not _one_of(value, _NEUTRAL_VALUES.get(key, _EMPTY)):
            remedy = f"the {model_type} decoder has no such option; if it changes nothing, remove it from the file"
            raise _refuse(key, value, remedy)


def decoder_config(hf: Mapping[str, Any]) -> DecoderConfig:
    """Typed options out of a parsed Hugging Face ``config.json``.

    Raises:
        UserError: unknown ``model_type``, or a key whose value asks for what the decoder does not compute.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _refuse("model_type", model_type, f"it can be one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    _check_keys(hf, model_type, family)
    hidden, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    layers = _size(hf, "num_hidden_layers", most=_MAX_LAYERS)
    derived = {"num_key_value_heads": heads, "head_dim": hidden // heads}
    sizes = {**hf, **{key: derived[key] for key in family.derived if hf.get(key, 0) is None}}
    kv_heads = _size(sizes, "num_key_value_heads", family.kv_heads or heads)
    if heads % kv_heads:
        raise _refuse("num_key_value_heads", kv_heads, f"it must divide num_attention_heads, {heads}")
    if hf.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise _refuse("num_attention_heads", heads, f"it must divide hidden_size, {hidden}, or head_dim must be given")
    head_dim = _size(sizes, "head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise _refuse("head_dim", head_dim, "rotary embeddings need an even number")
    activation = hf.get("hidden_act", "silu")
    if activation not in get_args(Activation):
        raise _refuse("hidden_act", activation, f"it can be one of {', '.join(get_args(Activation))}")
    if "max_position_embeddings" in hf:
        _size(hf, "max_position_embeddings")
    rope_theta, rope_scaling = _rope(hf)
    return DecoderConfig(
        vocab=_size(hf, "vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=_size(hf, "intermediate_size"),
        rms_eps=float(_number(hf, "rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        activation=activation,
        qkv_bias=family.qkv_bias or _flag(hf, "attention_bias"),
        out_bias=_flag(hf, "attention_bias"),
        mlp_bias=_flag(hf, "mlp_bias"),
        qk_norm=family.qk_norm,
        window=_window(hf, family, layers),
        tied=_flag(hf, "tie_word_embeddings"),
        init_std=float(_number(hf, "initializer_range", 0.02)),
    )


# Untrained models that come with the program, as config.json has them.
BUILTIN: dict[str, dict[str, Any]] = {
    "builtin:tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,  # a width of 64 learns nothing for long from the usual 0.02
    }
}


def builtin_model(name: str) -> dict[str, Any]:
    """The ``config.json`` of a built-in model, as a new dictionary."""
    if name not in BUILTIN:
        raise unusable("model.path", name, f"the built-in models are {', '.join(BUILTIN)}")
    return dict(BUILTIN[name])
