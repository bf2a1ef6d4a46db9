"""A whole run from Python: pairs in memory, training with evaluation, and the model as a Hugging Face directory."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets

from dpo_jax.commands.task import write_task
from dpo_jax.config import BatchConfig, DataConfig, DPOConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig
from dpo_jax.train import train


def main() -> None:
    """Train a tiny untrained model on the built-in task's pairs."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(folder, seed=0)  # its tokenizer; any Hugging Face tokenizer directory will do
        pairs = {
            name: datasets.load_dataset("json", data_files=str(folder / "data" / f"{name}.jsonl"), split="train")
            for name in ("train", "held_out")
        }
        config = DPOConfig(
            model=ModelConfig(path="builtin:tiny", tokenizer=str(folder / "tokenizer")),
            data=DataConfig(train=(SourceConfig(path="in memory"),), max_length=64, workers=1),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            batch=BatchConfig(pairs=16),
            run=RunConfig(dir=str(folder / "run"), steps=20, export=True, report=False, progress=False),
        )
        metrics = train(config, train_set=pairs["train"].take(64), eval_sets={"task": pairs["held_out"].take(32)})
        assert (folder / "run" / "export" / "model.safetensors").exists()
        before = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    print(f"held-out loss {before['eval_task_loss']:.3f} -> {metrics['eval_task_loss']:.3f}")


if __name__ == "__main__":
    main()
