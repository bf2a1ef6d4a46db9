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
_QWEN3_MOE = _QWEN3 | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}
_QWEN3_MOE |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
_QWEN3_MOE |= {"mlp_only_layers": [], "router_aux_loss_coef": 0.001, "output_router_logits": False}
_SMOLLM2_135M = _LLAMA | _sizes(576, 1536, 30, 9, 3) | {"vocab_size": 49152, "head_dim": 64, "rope_theta": 100000}
_SMOLLM2_135M |= {"max_position_embeddings": 8192, "tie_word_embeddings": True, "initializer_range": 1 / 24}
_SMOLLM2_135M |= {"is_llama_config": True, "rope_interleaved": False}

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
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE | _sizes(2048, 6144, 48, 32, 4),
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, 8) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32, 8),
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
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
