"""The published shapes of some models, by hub name: what a plan needs before weights are there or access is granted.

Each is what the model's own ``config.json`` says of its computation. A run never reads this: it takes the file that
lies next to the weights.
"""

from typing import Any

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                          "rms_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False}  # fmt: skip
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
_LONG_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}  # fmt: skip

_LLAMA3_8B = _LLAMA3 | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA3_70B = _LLAMA3 | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "max_position_embeddings": 8192,
}  # fmt: skip
_LONG_CONTEXT = {"max_position_embeddings": 131072, "rope_scaling": _LONG_ROPE | {"factor": 8.0}}
_LLAMA32_1B = _LLAMA3 | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
    "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_scaling": _LONG_ROPE | {"factor": 32.0},
}  # fmt: skip
_MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
    "initializer_range": 0.02,
}  # fmt: skip
_SMOLLM2_135M = _LLAMA | {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "rope_theta": 100000, "tie_word_embeddings": True, "initializer_range": 0.041666666666666664,
    "is_llama_config": True, "rope_interleaved": False,
}  # fmt: skip

KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA3_8B | _LONG_CONTEXT,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3_8B | _LONG_CONTEXT,
    "meta-llama/Llama-3.2-1B": _LLAMA32_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA32_1B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA3_70B,
    "meta-llama/Meta-Llama-3-70B-Instruct": _LLAMA3_70B,
    "meta-llama/Llama-3.1-70B": _LLAMA3_70B | _LONG_CONTEXT,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA3_70B | _LONG_CONTEXT,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": _LLAMA3_8B | _LONG_CONTEXT | {"vocab_size": 128264},  # one token more, up to 8s
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B,
    "Qwen/Qwen3-1.7B": _QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
}  # fmt: skip


def known_config(name: str) -> dict[str, Any] | None:
    """The ``config.json`` of a hub model, as a new dictionary; None for one that is not known."""
    return dict(KNOWN[name]) if name in KNOWN else None
