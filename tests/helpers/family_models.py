"""Small random models of every family, made by `transformers`, in which every feature of the family matters.

``FAMILIES`` names for each the transformers class, its config, and the features whose absence must change its logits.
``SWITCHES`` turns such a feature off in this program's own config and weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.models.options import DecoderConfig, LayerKind

VOCAB, LENGTH = 128, 40
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """A random model of transformers: its class, the config next to ``SIZES``, and the features that it has."""

    architecture: str
    options: dict[str, Any]
    seed: int = 2  # of its weights
    features: tuple[str, ...] = ()  # names of ``SWITCHES``; each changes the logits by more than 0.01


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | scaling


# In a head of 16 at base 500 frequencies are kept, blended and divided; the factor of the scores is not YaRN's own.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 2.0, "beta_slow": 0.5,
        "attention_factor": 1.2}  # fmt: skip
# Sequences are shorter than 64, so that the short factors apply.
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64, "short_factor": [1.0, 1.1, 1.3, 2.0, 3.0, 5.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
ODD_ORDER = [SLIDING, FULL, SLIDING, SLIDING]
MIXED = {"num_hidden_layers": 4, "layer_types": ODD_ORDER, "sliding_window": 6}
GEMMA_ROPES = {SLIDING: _rope(30.0), FULL: _rope(3000.0, rope_type="linear", factor=4.0)}
GEMMA3 = {
    **SIZES, **MIXED, "head_dim": 24, "query_pre_attn_scalar": 9, "rope_parameters": GEMMA_ROPES,
    "final_logit_softcapping": None, "attn_logit_softcapping": None,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip

_ROPE = ("rope", "base")
_GEMMA = (*_ROPE, "norm offset", "embed scale", "activation")
_GEMMA3 = (*_GEMMA, "window", "order", "two bases", "rope scaling", "query and key norm", "pre norm", "post norm",
           "attention scale")  # fmt: skip
_BIASES = ("qkv bias", "out bias")
_ROUTER = ("experts per token", "router normalization")
DENSE = {
    # A
    "gemma": HFModel(
        architecture="GemmaForCausalLM",
        options={"head_dim": 24, "rope_parameters": _rope(100.0)},
        features=_GEMMA,
    ),
    "gemma2": HFModel(
        architecture="Gemma2ForCausalLM",
        options={**MIXED, "head_dim": 24, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 1.5,
                 "final_logit_softcapping": 4.0, "rope_parameters": _rope(100.0)},
        features=(*_GEMMA, "window", "order", "attention soft cap", "logit soft cap", "attention scale", "pre norm",
                  "post norm"),
    ),
    "gemma3_text": HFModel(architecture="Gemma3ForCausalLM", options=GEMMA3, features=_GEMMA3),
    "gemma3": HFModel(
        architecture="Gemma3ForConditionalGeneration",
        options={"text_config": GEMMA3, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 127,
                 "boi_token_index": 125, "eoi_token_index": 126},
        features=_GEMMA3,
    ),
    "olmo2": HFModel(
        architecture="Olmo2ForCausalLM",
        options={"attention_bias": True, "rope_parameters": _rope(500.0)},
        features=(*_ROPE, *_BIASES, "query and key norm", "no pre norm", "post norm"),
    ),
    "olmo3": HFModel(
        architecture="Olmo3ForCausalLM",
        options={**MIXED, "rope_parameters": {SLIDING: _rope(500.0), FULL: YARN | {"rope_theta": 500.0}}},
        features=(*_ROPE, "window", "order", "rope scaling", "yarn factor", "query and key norm",
                  "no pre norm", "post norm"),
    ),
    "smollm3": HFModel(
        architecture="SmolLM3ForCausalLM",
        options={"num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1], "attention_bias": True, "mlp_bias": True,
                 "rope_parameters": _rope(500.0)},
        features=(*_ROPE, *_BIASES, "layers without rope", "order", "mlp bias"),
    ),
    "smollm3_window": HFModel(
        architecture="SmolLM3ForCausalLM",
        options={"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6,
                 "rope_parameters": YARN | {"rope_theta": 500.0}},
        features=(*_ROPE, "layers without rope", "window", "rope scaling", "yarn factor"),
    ),
    "granite": HFModel(
        architecture="GraniteForCausalLM",
        options={"embedding_multiplier": 3.0, "logits_scaling": 0.8, "residual_multiplier": 0.6,
                 "attention_multiplier": 0.4, "attention_bias": True, "mlp_bias": True,
                 "rope_parameters": _rope(100.0)},
        features=(*_ROPE, *_BIASES, "embed scale", "logit scale", "residual scale", "attention scale", "mlp bias"),
    ),
    "qwen2_mixed": HFModel(
        architecture="Qwen2ForCausalLM",
        options={**MIXED, "use_sliding_window": True, "rope_parameters": _rope(100.0)},
        features=(*_ROPE, "qkv bias", "window", "order"),
    ),
    "qwen3_mixed": HFModel(
        architecture="Qwen3ForCausalLM",
        options={**MIXED, "use_sliding_window": True, "head_dim": 16, "rope_parameters": YARN | {"rope_theta": 500.0}},
        features=(*_ROPE, "query and key norm", "window", "order", "rope scaling", "yarn factor"),
    ),
    "llama_dynamic": HFModel(
        architecture="LlamaForCausalLM",
        options={"rope_parameters": _rope(100.0, rope_type="dynamic", factor=4.0)},
        features=_ROPE,
    ),
    # B
    "gpt_neox": HFModel(
        architecture="GPTNeoXForCausalLM",
        options={"rope_parameters": _rope(100.0, partial_rotary_factor=0.5)},
        features=(*_ROPE, *_BIASES, "mlp bias", "parallel", "norm bias", "layer norm", "partial rotary", "activation"),
    ),
    "gpt_neox_sequential": HFModel(
        architecture="GPTNeoXForCausalLM",
        options={"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_pytorch_tanh",
                 "rope_parameters": _rope(100.0, partial_rotary_factor=0.25)},
        features=(*_ROPE, "mlp bias", "sequential", "norm bias", "layer norm", "partial rotary", "activation"),
    ),
    "gpt2": HFModel(
        architecture="GPT2LMHeadModel",
        options={"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 64},
        features=(*_BIASES, "mlp bias", "norm bias", "layer norm", "learned positions", "activation"),
    ),
    "phi3": HFModel(
        architecture="Phi3ForCausalLM",
        options={"sliding_window": 6, "original_max_position_embeddings": 256,
                 "rope_parameters": _rope(100.0, partial_rotary_factor=0.75)},
        features=(*_ROPE, "window", "partial rotary"),
    ),
    "phi3_longrope": HFModel(
        architecture="Phi3ForCausalLM",
        options={"original_max_position_embeddings": 64, "tie_word_embeddings": True,
                 "rope_parameters": LONGROPE},
        features=(*_ROPE, "rope scaling"),  # with "partial rotary" off there would be more frequencies than factors
    ),
    "phi": HFModel(
        architecture="PhiForCausalLM",
        options={"rope_parameters": _rope(100.0, partial_rotary_factor=0.5)},
        features=(*_ROPE, *_BIASES, "mlp bias", "unembed bias", "shared norm", "norm bias", "layer norm",
                  "partial rotary", "activation"),
    ),
    "starcoder2": HFModel(
        architecture="Starcoder2ForCausalLM",
        options={"sliding_window": 6, "rope_parameters": _rope(100.0)},
        features=(*_ROPE, *_BIASES, "mlp bias", "norm bias", "layer norm", "window", "activation"),
    ),
    "cohere2": HFModel(
        architecture="Cohere2ForCausalLM",
        options={**MIXED, "attention_bias": True, "logit_scale": 0.8, "rope_parameters": _rope(100.0)},
        features=(*_ROPE, *_BIASES, "shared norm", "layer norm", "window", "order", "layers without rope",
                  "interleaved rotary", "logit scale"),
    ),
    "glm4": HFModel(
        architecture="Glm4ForCausalLM",
        options={"head_dim": 24, "attention_bias": True,
                 "rope_parameters": _rope(100.0, partial_rotary_factor=0.5)},
        features=(*_ROPE, "qkv bias", "pre norm", "post norm", "partial rotary", "interleaved rotary"),
    ),
    "stablelm": HFModel(
        architecture="StableLmForCausalLM",
        options={"use_qkv_bias": True, "rope_parameters": _rope(100.0, partial_rotary_factor=0.5)},
        features=(*_ROPE, "qkv bias", "sequential", "norm bias", "layer norm", "partial rotary"),
    ),
    "stablelm_parallel": HFModel(
        architecture="StableLmForCausalLM",
        options={"use_parallel_residual": True, "tie_word_embeddings": True,
                 "rope_parameters": _rope(100.0)},
        features=(*_ROPE, "shared norm", "norm bias", "layer norm", "partial rotary"),
    ),
}  # fmt: skip
MIXTURES = {
    # C
    "mixtral": HFModel(
        architecture="MixtralForCausalLM",
        seed=3,
        options={"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 24, "sliding_window": 6,
                 "rope_parameters": _rope(100.0)},
        features=(*_ROPE, "window", *_ROUTER),
    ),
    "qwen3_moe": HFModel(
        architecture="Qwen3MoeForCausalLM",
        seed=3,
        options={"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True,
                 "head_dim": 24, "attention_bias": True, "rope_parameters": _rope(100.0)},
        features=(*_ROPE, *_BIASES, "query and key norm", *_ROUTER),
    ),
    "qwen2_moe": HFModel(
        architecture="Qwen2MoeForCausalLM",
        seed=9,
        options={**MIXED, "use_sliding_window": True, "num_experts": 8, "num_experts_per_tok": 3,
                 "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "rope_parameters": _rope(100.0)},
        features=(*_ROPE, "qkv bias", "window", "order", *_ROUTER, "shared expert"),
    ),
    "olmoe": HFModel(
        architecture="OlmoeForCausalLM",
        options={"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32, "rope_parameters": _rope(100.0)},
        features=(*_ROPE, "query and key norm", *_ROUTER),
    ),
    "gpt_oss": HFModel(
        architecture="GptOssForCausalLM",
        seed=3,
        options={**MIXED, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 16,
                 "swiglu_limit": 1.5, "rope_parameters": YARN | {"rope_theta": 500.0, "truncate": False}},
        features=(*_ROPE, *_BIASES, "window", "order", "rope scaling", "yarn factor", "yarn truncate",
                  "experts per token", "router softmax", "router bias", "mlp bias", "sinks", "gate alpha",
                  "gate offset", "gate limit"),
    ),
}  # fmt: skip
FAMILIES = DENSE | MIXTURES


# -------------------------------------------------------------------------------------- the models of transformers


def hf_model(name: str, seed: int | None = None) -> Any:
    """Return a model whose every parameter, biases and norms too, is random and matters.

    With its own seed, the ``router_gap`` of a mixture on the tokens of tests exceeds 0.001.
    """
    import torch
    import transformers

    case = FAMILIES[name]
    architecture = getattr(transformers, case.architecture)
    sizes = {} if "text_config" in case.options else SIZES
    torch.manual_seed(case.seed if seed is None else seed)
    model = architecture(architecture.config_class(**(sizes | case.options))).eval()
    norm_mean = 0.3 if name.startswith("gemma") else 1.2  # Gemma adds 1 to it
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = key.endswith(".weight") and any(part in key for part in ("norm", ".ln_"))
            is_router = "mlp.gate." in key or "router" in key  # experts that are nearly tied may be chosen differently
            spread = 0.6 if is_router else 0.3 if is_norm or parameter.ndim == 1 else 0.15
            parameter.copy_(torch.randn_like(parameter) * spread + (norm_mean if is_norm else 0.0))
    return model


def save_hf_model(name: str, folder: Path, seed: int | None = None) -> Any:
    """Save the model of ``hf_model`` as a directory of Hugging Face's, and return it."""
    model = hf_model(name, seed)
    model.save_pretrained(folder)
    return model


def some_tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    """Return random tokens, longer than every window, and none of them an image."""
    return np.random.default_rng(0).integers(1, VOCAB - 3, (rows, length), dtype=np.int32)


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of a model of transformers."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


# ------------------------------------------------------------------------------------------ features, one by one

Params = dict[str, Any]
Switch = Callable[[DecoderConfig, Params], tuple[DecoderConfig, Params]]


def _set(**fields: Any) -> Switch:
    return lambda config, params: (replace(config, **fields), params)


def _kinds(change: Callable[[LayerKind, DecoderConfig], LayerKind]) -> Switch:
    return lambda config, params: (
        replace(config, pattern=tuple(change(kind, config) for kind in config.pattern)),
        params,
    )


def _order(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    return replace(config, pattern=config.pattern[1:] + config.pattern[:1]), params


def _with_pre_norm(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """Add a norm, of weights 1, of the inputs of attention and feed-forward."""
    ones = np.ones((config.layers, config.hidden), np.float32)
    layers = params["layers"] | {"attention_norm": ones, "ffn_norm": ones}
    return replace(config, pre_norm=True), params | {"layers": layers}


def _sequential(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """Let the feed-forward read what attention has added to, by a copy of the norm that they shared."""
    copies = {name.replace("attention", "ffn"): leaf for name, leaf in params["layers"].items()
              if name.startswith("attention_norm")}  # fmt: skip
    return replace(config, residual="sequential"), params | {"layers": copies | params["layers"]}


def _rope_of(kind: LayerKind, **fields: Any) -> LayerKind:
    return kind if kind.rope is None else replace(kind, rope=replace(kind.rope, **fields))


def _experts(**fields: Any) -> Switch:
    return lambda config, params: (replace(config, experts=replace(config.experts, **fields)), params)


def _fewer_experts(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    return replace(config, experts=replace(config.experts, per_token=config.experts.per_token - 1)), params


def _other_normalization(config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    return replace(config, experts=replace(config.experts, renormalize=not config.experts.renormalize)), params


def _first_rope(config: DecoderConfig) -> Any:
    return next(kind.rope for kind in config.pattern if kind.rope is not None)


def _scaling_of(kind: LayerKind, **fields: Any) -> LayerKind:
    is_scaled = kind.rope is not None and kind.rope.scaling is not None
    return _rope_of(kind, scaling=replace(kind.rope.scaling, **fields)) if is_scaled else kind


SWITCHES: dict[str, Switch] = {
    # kinds of layers
    "window": _kinds(lambda kind, _: replace(kind, window=None)),
    "order": _order,
    "rope": _kinds(lambda kind, _: replace(kind, rope=None)),
    "base": _kinds(lambda kind, _: _rope_of(kind, theta=10_000.0)),
    "two bases": _kinds(lambda kind, config: _rope_of(kind, theta=_first_rope(config).theta)),
    "layers without rope": _kinds(lambda kind, config: replace(kind, rope=_first_rope(config))),
    "rope scaling": _kinds(lambda kind, _: _rope_of(kind, scaling=None)),
    "yarn factor": _kinds(lambda kind, _: _scaling_of(kind, attention_factor=1.0)),
    "yarn truncate": _kinds(lambda kind, _: _scaling_of(kind, truncate=True)),
    # norms and residual stream
    "norm offset": _set(norm_offset=0.0),
    "layer norm": _set(norm="rms", norm_bias=False),
    "norm bias": _set(norm_bias=False),
    "pre norm": _set(pre_norm=False),
    "no pre norm": _with_pre_norm,
    "post norm": _set(post_norm=False),
    "query and key norm": _set(qk_norm="none"),
    "parallel": _set(residual="sequential"),
    "shared norm": _sequential,
    "sequential": _set(residual="parallel"),
    # heads, scores and logits
    "partial rotary": _set(rotary_dims=None),
    "interleaved rotary": _set(rotary_interleaved=False),
    "learned positions": _set(learned_positions=0),
    "attention scale": _set(attention_scale=None),
    "attention soft cap": _set(attention_softcap=None),
    "logit soft cap": _set(logit_softcap=None),
    "embed scale": _set(embed_scale=1.0),
    "residual scale": _set(residual_scale=1.0),
    "logit scale": _set(logit_scale=1.0),
    # feed-forward and biases
    "activation": _set(activation="silu"),
    "qkv bias": _set(qkv_bias=False),
    "out bias": _set(out_bias=False),
    "mlp bias": _set(mlp_bias=False),
    "unembed bias": _set(unembed_bias=False),
    # mixtures of experts
    "experts per token": _fewer_experts,
    "router normalization": _other_normalization,
    "router softmax": _experts(softmax="all"),
    "router bias": _experts(router_bias=False),
    "shared expert": _experts(shared_ffn=0),
    "gate alpha": _experts(alpha=1.0),
    "gate offset": _experts(offset=0.0),
    "gate limit": _experts(limit=None),
    "sinks": _set(sinks=False),
}


def features() -> Iterator[tuple[str, str]]:
    """Yield each family's name with each of its features: the parameters of a test."""
    for name, case in FAMILIES.items():
        yield from ((name, feature) for feature in case.features)
