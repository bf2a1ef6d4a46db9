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
_PYTHIA = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 50304, "hidden_act": "gelu"}
_PYTHIA |= {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "use_parallel_residual": True}
_PYTHIA |= {"rotary_pct": 0.25, "rotary_emb_base": 10000, "initializer_range": 0.02, "tie_word_embeddings": False}


def _pythia(hidden: int, layers: int, heads: int) -> HFConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    return _PYTHIA | sizes | {"num_hidden_layers": layers, "num_attention_heads": heads}


_PHI = _COMMON | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False}
_PHI4 = _PHI | _sizes(5120, 17920, 40, 40, 10) | {"vocab_size": 100352, "max_position_embeddings": 16384}
_PHI4 |= {"original_max_position_embeddings": 16384, "rope_theta": 250000, "rope_scaling": None, "sliding_window": None}
_PHI35_ROPE = {"type": "longrope", "short_factor": [  # to two decimals; the file has those that are nearest in float32
    1.0, 1.02, 1.03, 1.03, 1.05, 1.05, 1.05, 1.05, 1.05, 1.07, 1.1, 1.11, 1.16, 1.16, 1.17, 1.29, 1.34, 1.68, 1.79,
    1.82, 1.85, 1.88, 1.91, 1.94, 1.99, *[2.02] * 6, *[2.03] * 9, 2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84,
], "long_factor": [
    1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4, 7.7, 9.09, 12.2, 17.67, 24.46, 28.57, 30.42,
    30.84, 32.59, 32.93, 42.32, 44.96, 50.34, 50.45, 57.55, 57.93, 58.21, 60.14, 62.61, 62.62, 62.71, 63.14, 63.14,
    63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51, 64.53, 64.84,
]}  # fmt: skip
_PHI35_MINI = _PHI | _sizes(3072, 8192, 32, 32, 32) | {"vocab_size": 32064, "max_position_embeddings": 131072}
_PHI35_MINI |= {"original_max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": _PHI35_ROPE}
_PHI35_MINI |= {"sliding_window": 262144}
_QWEN3_30B_A3B = _QWEN3 | _sizes(2048, 6144, 48, 32, 4) | {"moe_intermediate_size": 768, "max_window_layers": 48}
_QWEN3_30B_A3B |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 128}
_QWEN3_30B_A3B |= {"num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
_QWEN3_30B_A3B |= {"router_aux_loss_coef": 0.001, "output_router_logits": False}
_GEMMA_2B = _sizes(2048, 16384, 18, 8, 1) | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
_GEMMA_2B |= {"vocab_size": 256000, "head_dim": 256, "hidden_act": "gelu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_GEMMA_2B |= {"max_position_embeddings": 8192, "attention_bias": False, "initializer_range": 0.02}
_OLMO3_7B = _OLMO2_7B | {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "vocab_size": 100278}
_OLMO3_7B |= {"max_position_embeddings": 65536, "sliding_window": 4096, "rope_scaling": {
    "rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 8192,
}}  # fmt: skip
_OLMO3_7B |= {"layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8}
_QWEN25_7B = _COMMON | _sizes(3584, 18944, 28, 28, 4) | {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
_QWEN25_7B |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064}
_QWEN25_7B |= {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 131072}
_QWEN25_7B |= {"max_window_layers": 28}
_GPT2_LARGE = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_GPT2_LARGE |= {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_ctx": 1024, "activation_function": "gelu_new"}
_GPT2_LARGE |= {"layer_norm_epsilon": 1e-5, "initializer_range": 0.02}
_PHI2 = _sizes(2560, 10240, 32, 32, 32) | {"architectures": ["PhiForCausalLM"], "model_type": "phi"}
_PHI2 |= {"vocab_size": 51200, "max_position_embeddings": 2048, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}
_PHI2 |= {"partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_theta": 10000.0, "rope_scaling": None}
_PHI2 |= {"tie_word_embeddings": False, "initializer_range": 0.02}
_STARCODER2_3B = _sizes(3072, 12288, 30, 24, 2) | {"architectures": ["Starcoder2ForCausalLM"], "vocab_size": 49152}
_STARCODER2_3B |= {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "norm_type": "layer_norm"}
_STARCODER2_3B |= {"norm_epsilon": 1e-5, "mlp_type": "default", "use_bias": True, "max_position_embeddings": 16384}
_STARCODER2_3B |= {"sliding_window": 4096, "rope_theta": 999999.4420358813, "initializer_range": 0.018042}
_COMMAND_R7B = _sizes(4096, 14336, 32, 32, 8) | {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2"}
_COMMAND_R7B |= {"vocab_size": 256000, "hidden_act": "silu", "layer_norm_eps": 1e-5, "head_dim": 128}
_COMMAND_R7B |= {"max_position_embeddings": 8192, "rope_theta": 50000, "sliding_window": 4096, "logit_scale": 0.25}
_COMMAND_R7B |= {"sliding_window_pattern": 4, "attention_bias": False, "initializer_range": 0.02}
_GLM4_9B = _COMMON | _sizes(4096, 13696, 40, 32, 2) | {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}
_GLM4_9B |= {"vocab_size": 151552, "head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": True}
_GLM4_9B |= {"max_position_embeddings": 32768, "rope_theta": 10000.0}
_STABLELM2 = _sizes(2048, 5632, 24, 32, 32) | {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}
_STABLELM2 |= {"vocab_size": 100352, "hidden_act": "silu", "layer_norm_eps": 1e-5, "max_position_embeddings": 4096}
_STABLELM2 |= {"partial_rotary_factor": 0.25, "rope_theta": 10000, "use_qkv_bias": True, "tie_word_embeddings": False}
_STABLELM2 |= {"initializer_range": 0.02}
_MIXTRAL = _COMMON | _sizes(4096, 14336, 32, 32, 8) | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
_MIXTRAL |= {"vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None}
_MIXTRAL |= {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
_MIXTRAL |= {"output_router_logits": False}
_QWEN15_MOE = _COMMON | _sizes(2048, 5632, 24, 16, 16) | {"architectures": ["Qwen2MoeForCausalLM"]}
_QWEN15_MOE |= {"model_type": "qwen2_moe", "vocab_size": 151936, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6}
_QWEN15_MOE |= {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21}
_QWEN15_MOE |= {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False}
_QWEN15_MOE |= {"shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001}
_QWEN15_MOE |= {"output_router_logits": False}
_OLMOE = _COMMON | _sizes(2048, 1024, 16, 16, 16) | {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"}
_OLMOE |= {"vocab_size": 50304, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": None}
_OLMOE |= {"attention_bias": False, "clip_qkv": None, "num_experts": 64, "num_experts_per_tok": 8}
_OLMOE |= {"norm_topk_prob": False, "router_aux_loss_coef": 0.01, "output_router_logits": False}
_GPT_OSS = _COMMON | _sizes(2880, 2880, 24, 64, 8) | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
_GPT_OSS |= {"vocab_size": 201088, "head_dim": 64, "max_position_embeddings": 131072, "attention_bias": True}
_GPT_OSS |= {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12, "swiglu_limit": 7.0}
_GPT_OSS |= {"rope_theta": 150000, "rope_scaling": {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}}  # fmt: skip
_GPT_OSS |= {"num_local_experts": 32, "num_experts_per_tok": 4, "router_aux_loss_coef": 0.9}
_GPT_OSS |= {"output_router_logits": False}

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
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "microsoft/phi-4": _PHI4,
    "microsoft/Phi-3.5-mini-instruct": _PHI35_MINI,
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B_A3B,
    "google/gemma-2b": _GEMMA_2B,
    "allenai/Olmo-3-1025-7B": _OLMO3_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN25_7B,
    "openai-community/gpt2-large": _GPT2_LARGE,
    "microsoft/phi-2": _PHI2,
    "bigcode/starcoder2-3b": _STARCODER2_3B,
    "CohereLabs/c4ai-command-r7b-12-2024": _COMMAND_R7B,
    "zai-org/GLM-4-9B-0414": _GLM4_9B,
    "stabilityai/stablelm-2-1_6b": _STABLELM2,
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL,
    "Qwen/Qwen1.5-MoE-A2.7B": _QWEN15_MOE,
    "allenai/OLMoE-1B-7B-0924": _OLMOE,
    "unsloth/gpt-oss-20b-BF16": _GPT_OSS,  # the original's weights are quantized
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


def builtin_model(name: str, option: str = "model.path") -> HFConfig:
    """Return a copy of a built-in model's ``config.json``; ``option`` gives its name."""
    if name not in BUILTIN:
        raise UserError(option, name, f"the built-in models are {', '.join(BUILTIN)}")
    return dict(BUILTIN[name])
