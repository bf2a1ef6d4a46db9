"""Record TRL's DPO curves of small random models of other families than Llama, which tests/test_curves.py compares.

    pip install -e '.[bench]'
    python benchmarks/trl_family_curves.py TOKENIZER PAIRS tests/golden/trl_families.json

TOKENIZER is a Hugging Face directory, PAIRS a JSON lines file of prompt, chosen and rejected. The models are written by
this script from numbers that no version of a library changes, and their hashes are stored beside the curves.
"""

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, HIDDEN, HEADS, LAYERS = 512, 64, 4, 3
_COMMON = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
           "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": _COMMON | {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 24,
        "intermediate_size": 96, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 16, "sliding_window": 32, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0, "tie_word_embeddings": True, "rope_parameters": _ROPE,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox": _COMMON | {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "intermediate_size": 192,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True,
        "tie_word_embeddings": False, "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25},
    },
    "qwen3_moe": _COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 24,
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.05,
        "output_router_logits": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": True, "rope_parameters": _ROPE,
    },
}  # fmt: skip
METRICS = ("loss", "grad_norm", "aux_loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected",
           "rewards/margins", "entropy", "logits/chosen", "logits/rejected")  # fmt: skip
Shape = tuple[int, ...]


# ------------------------------------------------------------------------------------------- checkpoints, by numpy


def save_checkpoint(family: str, tokenizer: Path, folder: Path) -> str:
    """Write a random model as a Hugging Face directory with a tokenizer; return the hash of its weights."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family], indent=1) + "\n", encoding="utf-8")
    numbers = np.random.Philox(list(CONFIGS).index(family))
    tensors = {name: _draw(numbers, family, name, shape) for name, shape in tensor_shapes(family)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


def _draw(numbers: np.random.Philox, family: str, name: str, shape: Shape) -> np.ndarray:
    """Return uniform numbers around 0, or around the neutral weight of a norm."""
    center = 1.0 if name.endswith("norm.weight") and family != "gemma2" else 0.0  # Gemma adds 1 itself
    deviation = 0.3 if name.endswith("mlp.gate.weight") else 0.2 if "embed" in name else 0.1
    unit = (numbers.random_raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (center + deviation * math.sqrt(12) * (unit - 0.5)).astype(np.float32).reshape(shape)


def tensor_shapes(family: str) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every tensor of a checkpoint."""
    config = CONFIGS[family]
    if family == "gpt_neox":
        yield from _neox_shapes(config["intermediate_size"])
        return
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    for layer in (f"model.layers.{index}." for index in range(LAYERS)):
        width, kv_width = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, HIDDEN)
        yield f"{layer}self_attn.o_proj.weight", (HIDDEN, width)
        if family == "qwen3_moe":
            yield from ((f"{layer}self_attn.{name}_norm.weight", (config["head_dim"],)) for name in ("q", "k"))
            yield f"{layer}mlp.gate.weight", (config["num_experts"], HIDDEN)
            for expert in range(config["num_experts"]):
                yield from _gated_shapes(f"{layer}mlp.experts.{expert}.", config["moe_intermediate_size"])
        else:
            yield from _gated_shapes(f"{layer}mlp.", config["intermediate_size"])
        around = ["pre_feedforward", "post_feedforward"] if family == "gemma2" else []
        for name in ("input", "post_attention", *around):
            yield f"{layer}{name}_layernorm.weight", (HIDDEN,)


def _gated_shapes(prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}gate_proj.weight", (width, HIDDEN)
    yield f"{prefix}up_proj.weight", (width, HIDDEN)
    yield f"{prefix}down_proj.weight", (HIDDEN, width)


def _neox_shapes(width: int) -> Iterator[tuple[str, Shape]]:
    yield "gpt_neox.embed_in.weight", (VOCAB, HIDDEN)
    yield "embed_out.weight", (VOCAB, HIDDEN)
    projections = {"attention.query_key_value": (3 * HIDDEN, HIDDEN), "attention.dense": (HIDDEN, HIDDEN),
                   "mlp.dense_h_to_4h": (width, HIDDEN), "mlp.dense_4h_to_h": (HIDDEN, width)}  # fmt: skip
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    for index in range(LAYERS):
        for name, shape in (projections | norms).items():
            yield f"gpt_neox.layers.{index}.{name}.weight", shape
            yield f"gpt_neox.layers.{index}.{name}.bias", shape[:1]
    yield from ((f"gpt_neox.final_layer_norm.{part}", (HIDDEN,)) for part in ("weight", "bias"))


# ------------------------------------------------------------------------------------------------- TRL's training


def curve(model: Path, pairs: list[dict[str, str]], dtype: str = "float32") -> list[dict[str, float]]:
    """Return what TRL logs at each step: pairs in file order, 8 a step, 20 steps of AdamW at a constant rate."""
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder, per_device_train_batch_size=8, max_steps=20, learning_rate=1e-4, max_grad_norm=1.0,
            lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", bf16=False,
            gradient_checkpointing=False, max_length=None, use_cpu=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        load = transformers.AutoModelForCausalLM.from_pretrained
        policy, reference = (load(model, dtype=dtype, attn_implementation="eager") for _ in range(2))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        trainer = DPOTrainer(
            model=policy, ref_model=reference, args=options, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return [{name: float(row[name]) for name in METRICS if name in row} for row in steps]


def main(tokenizer: Path, pairs: Path, output: Path) -> None:
    """Write the curves of all families, with the hashes of the checkpoints that were trained."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    recorded: dict[str, Any] = {"trl": version("trl"), "transformers": version("transformers"), "curves": {}}
    with tempfile.TemporaryDirectory() as folder:
        for family in CONFIGS:
            weights = save_checkpoint(family, tokenizer, Path(folder) / family)
            recorded["curves"][family] = {"weights": weights, "steps": curve(Path(folder) / family, rows)}
    output.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
