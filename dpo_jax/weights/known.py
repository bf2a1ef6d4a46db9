"""Models whose ``config.json`` ships with the program: built-in models, and the configs of some hub models.

With the latter, ``plan`` needs neither a download nor access to a gated model; each has the keys of the published file
that affect the computation. A run never reads them: it uses the file next to the weights.
"""

from typing import Any

from dpo_jax.errors import UserError

HFConfig = dict[str, Any]


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> HFConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, ffn, layers, heads, kv_heads), strict=True))


_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False}
_LLAMA = _COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_LLAMA3_8B = _LLAMA3 | _sizes(4096, 14336, 32, 32, 8)
_LLAMA3_70B = _LLAMA3 | _sizes(8192, 28672, 80, 64, 8)


def _llama31(factor: float) -> HFConfig:
    """Return the config.json entries of Llama 3.1's extended context."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": factor} | bands}


_LLAMA32_1B = _LLAMA3 | _sizes(2048, 8192, 16, 32, 8) | _llama31(32.0) | {"head_dim": 64, "tie_word_embeddings": True}
_MISTRAL_7B = _COMMON | _sizes(4096, 14336, 32, 32, 8)
_MISTRAL_7B |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000}
_MISTRAL_7B |= {"max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096}
_QWEN3 = _COMMON | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}
_QWEN3 |= {"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000}
_QWEN3 |= {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}
_SMOLLM2_135M = _LLAMA | _sizes(576, 1536, 30, 9, 3) | {"vocab_size": 49152, "head_dim": 64, "rope_theta": 100000}
_SMOLLM2_135M |= {"max_position_embeddings": 8192, "tie_word_embeddings": True, "initializer_range": 1 / 24}
_SMOLLM2_135M |= {"is_llama_config": True, "rope_interleaved": False}

_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "head_dim": 256}
_GEMMA |= {"attention_bias": False, "query_pre_attn_scalar": 256}
_GEMMA2_9B = _GEMMA | _sizes(3584, 14336, 42, 16, 8) | {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0}
_GEMMA2_9B |= {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000}
_GEMMA2_9B |= {"max_position_embeddings": 8192, "sliding_window": 4096, "sliding_window_size": 4096}
_GEMMA2_9B |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3_1B = _GEMMA | _sizes(1152, 6912, 26, 4, 1) | {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
_GEMMA3_1B |= {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144}
_GEMMA3_1B |= {"max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6}
_GEMMA3_1B |= {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_scaling": None}
_OLMO2_7B = _COMMON | _sizes(4096, 11008, 32, 32, 32) | {"rms_norm_eps": 1e-6, "rope_theta": 500000}
_OLMO2_7B |= {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "vocab_size": 100352}
_OLMO2_7B |= {"max_position_embeddings": 4096, "attention_bias": False, "rope_scaling": None}
_SMOLLM3_3B = _COMMON | _sizes(2048, 11008, 36, 16, 4) | {"rms_norm_eps": 1e-6, "rope_theta": 5000000.0}
_SMOLLM3_3B |= {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "vocab_size": 128256}
_SMOLLM3_3B |= {"max_position_embeddings": 65536, "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
_SMOLLM3_3B |= {"no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "tie_word_embeddings": True}
_SMOLLM3_3B |= {"use_sliding_window": False, "sliding_window": None}
_GRANITE_2B = _COMMON | _sizes(2048, 8192, 40, 32, 8) | {"rope_theta": 10000000.0, "rope_scaling": None}
_GRANITE_2B |= {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "vocab_size": 49159}
_GRANITE_2B |= {"max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False}
_GRANITE_2B |= {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22}
_GRANITE_2B |= {"logits_scaling": 8.0, "tie_word_embeddings": True}

KNOWN: dict[str, HFConfig] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA3_8B | _llama31(8.0),
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3_8B | _llama31(8.0),
    "meta-llama/Llama-3.2-1B": _LLAMA32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA32_1B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA3_70B,
    "meta-llama/Llama-3.1-70B": _LLAMA3_70B | _llama31(8.0),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA3_70B | _llama31(8.0),
    "allenai/Llama-3.1-Tulu-3-8B-SFT": _LLAMA3_8B
    | _llama31(8.0)
    | {"vocab_size": 128264},  # one extra token, padded to 8
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B,
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, 8) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32, 8),
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "google/gemma-2-9b": _GEMMA2_9B,
    "google/gemma-2-9b-it": _GEMMA2_9B,
    "google/gemma-3-1b-it": _GEMMA3_1B,
    "allenai/OLMo-2-1124-7B": _OLMO2_7B,
    "allenai/OLMo-2-1124-7B-SFT": _OLMO2_7B,
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3_3B,
    "ibm-granite/granite-3.3-2b-instruct": _GRANITE_2B,
}

# Untrained. At a width of 64 the usual initializer_range of 0.02 would delay learning for long.
BUILTIN: dict[str, HFConfig] = {"builtin:tiny": {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "initializer_range": 0.08,
}}  # fmt: skip


def known_config(name: str) -> HFConfig | None:
    """Return a copy of a hub model's ``config.json``; None for a model not in ``KNOWN``."""
    return dict(KNOWN[name]) if name in KNOWN else None


def builtin_model(name: str) -> HFConfig:
    """Return a copy of a built-in model's ``config.json``."""
    if name not in BUILTIN:
        raise UserError("model.path", name, f"the built-in models are {', '.join(BUILTIN)}")
    return dict(BUILTIN[name])
