"""The three stages of RLHF from Python: a supervised model, a reward model from pairs, and PPO on its scores."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from dpo_jax.commands.task import write_task
from dpo_jax.config import (
    BatchConfig,
    DataConfig,
    JudgeConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    PPOConfig,
    RewardConfig,
    RolloutBatchConfig,
    RunConfig,
    SamplingConfig,
    SFTBatchConfig,
    SFTConfig,
    SourceConfig,
)
from dpo_jax.train import train


def main() -> None:
    """Train each stage on the built-in task; a stage reads the run directory of the one before."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(folder, seed=0)

        def data(train_file: str, num_held_out: int | None = None) -> DataConfig:
            held_out = SourceConfig(path=str(folder / "data" / "held_out.jsonl"), limit=num_held_out)
            sets = {} if num_held_out is None else {"held_out": held_out}
            source = SourceConfig(path=str(folder / "data" / train_file))
            return DataConfig(train=(source,), eval=sets, max_length=64, workers=1)

        def run(name: str, steps: int) -> RunConfig:
            return RunConfig(dir=str(folder / name), steps=steps, report=False, progress=False)

        optimizer = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=5)
        policy = ModelConfig(path=str(folder / "sft"))
        train(
            SFTConfig(
                model=ModelConfig(path="builtin:tiny", tokenizer=str(folder / "tokenizer")),
                data=data("sft.jsonl"),
                optimizer=optimizer,
                batch=SFTBatchConfig(examples=64),
                run=run("sft", 50),
            )
        )
        ranked = train(
            RewardConfig(
                model=policy,
                data=data("train.jsonl", 32),
                optimizer=optimizer,
                batch=BatchConfig(pairs=32),
                run=run("reward", 30),
            )
        )
        trained = train(
            PPOConfig(
                model=policy,
                data=data("train.jsonl", 32),  # of pairs only the prompts are read
                reward=JudgeConfig(path=str(folder / "reward")),
                sampling=SamplingConfig(max_tokens=20),
                ppo=PolicyGradientConfig(kl_coef=0.1, value_model="reward"),
                optimizer=OptimizerConfig(learning_rate=1e-3),
                batch=RolloutBatchConfig(prompts=32),
                run=run("ppo", 10),
            )
        )
        before = json.loads((folder / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    print(f"held-out pairs that the reward model ranks right: {ranked['eval_held_out_rewards/accuracies']:.0%}")
    print(f"held-out score {before['eval_held_out_score']:.3f} -> {trained['eval_held_out_score']:.3f}")
    print(f"KL to the supervised model: {trained['eval_held_out_sampled_kl']:.2f} nats")


if __name__ == "__main__":
    main()
