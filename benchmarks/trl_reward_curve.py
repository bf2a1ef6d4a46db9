"""Record TRL's training curve of a reward model, which tests/methods/test_reward.py compares with this program's.

    pip install -e '.[bench]'
    python benchmarks/trl_reward_curve.py MODEL PAIRS tests/golden/trl_reward.json

MODEL is a directory with a language model, PAIRS a JSON lines file of prompt, chosen and rejected. TRL gets the tokens
of this program's store, and a head that starts at 0, as here. Where a curve has margins, row i's is `margin_of(i)`.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import RewardConfig as TRLConfig
from trl import RewardTrainer

from dpo_jax.config import RewardConfig
from dpo_jax.config.file import parse_config
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.methods.setup import sets_of

KEYS = {  # TRL's name -> name here
    "loss": "loss",
    "grad_norm": "grad_norm",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
}


CURVES = {"center 0": (0.0, False), "center 0.01": (0.01, False), "center 0.01, margins": (0.01, True)}


def margin_of(row: int) -> float:
    """Return the margin of a row of the data, as a curve with margins has them."""
    return (row % 5) / 4


def options(model: str, pairs: str, run: Path, center: float) -> dict[str, Any]:
    """Return the run's config: pairs in file order, 8 a step, 20 steps of AdamW at a constant rate."""
    return {
        "model": {"path": model},
        "data": {"train": pairs, "shuffle": False, "workers": 1, "store": str(run / "store")},
        "loss": {"center": center},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "batch": {"pairs": 8},
        "run": {"dir": str(run / "run"), "steps": 20, "progress": False, "report": False},
        "checkpoint": {"every": 20},
    }


def curve(model: str, pairs: str, center: float, margins: bool) -> list[dict[str, float]]:
    """Return what TRL logs at each step."""
    tokenizer = load_tokenizer(model, None, None)
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(options(model, pairs, Path(folder), center), {}, RewardConfig)
        store = sets_of(config, tokenizer).train
        rows = []
        for i in range(len(store)):
            prompt, (chosen, rejected), _ = store.example(i)
            margin = {"margin": margin_of(int(store.rows[i]))} if margins else {}
            rows.append({"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected]} | margin)
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32
        )
        torch.nn.init.zeros_(classifier.score.weight)
        options_of_trl = TRLConfig(
            output_dir=folder, per_device_train_batch_size=8, max_steps=20, learning_rate=1e-3, max_grad_norm=1.0,
            lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", bf16=False,
            gradient_checkpointing=False, max_length=None, use_cpu=True, center_rewards_coefficient=center or None,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = RewardTrainer(
            model=classifier, args=options_of_trl, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return [{ours: float(row[theirs]) for theirs, ours in KEYS.items()} for row in steps]


if __name__ == "__main__":
    model, pairs, output = sys.argv[1:]
    curves = {name: curve(model, pairs, *settings) for name, settings in CURVES.items()}
    Path(output).write_text(json.dumps({"trl": version("trl"), "curves": curves}, indent=1) + "\n", encoding="utf-8")
