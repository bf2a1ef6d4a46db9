"""Options of training on answers sampled from the policy."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dpo_jax.config.data import DataConfig
from dpo_jax.config.generate import RewardModelConfig
from dpo_jax.config.run import RowsConfig
from dpo_jax.config.section import Section, ranged


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(Section, name="ppo"):
    """How the policy is updated on the answers that it sampled."""

    estimator: Literal["gae", "rloo"] = "gae"
    """gae: PPO with a value model; rloo: no value model, an answer's baseline is the mean reward of the prompt's other
    answers."""
    answers: int = ranged(1, above=0)
    """Answers sampled per prompt."""
    kl_coef: float = ranged(0.05, at_least=0)
    """Weight of KL(policy || reference), subtracted from the reward of each token; DPO's beta."""
    epochs: int = ranged(4, above=0)
    """Updates on the answers of a step, each on all of them."""
    clip: float = ranged(0.2, above=0, below=1)
    """Probability ratios are clipped to 1 +- clip, as in PPO: those of tokens with gae, of whole answers with rloo."""
    gae_lambda: float = ranged(0.95, at_least=0, at_most=1)
    """Lambda of GAE: advantages have least bias at 1 and least variance at 0; rewards are not discounted."""
    value_model: Literal["policy", "reward", "shared"] = "policy"
    """What the value model starts from. policy: the policy's layers, with a head of zeros; reward: the layers and the
    head of the model at reward.path, with lora.rank its adapters; shared: a head of zeros on the hidden states of the
    policy, whose layers then learn from both losses."""
    value_coef: float = ranged(0.1, at_least=0)
    """Weight of the value model's loss."""
    value_clip: float = ranged(0.2, above=0)
    """A value's update is clipped to this distance from the value before the step."""
    missing_eos_penalty: float = ranged(0.0, at_least=0)
    """Subtracted from the score of an answer that reached the maximum length without an end token."""

    @property
    def trained_value(self) -> Literal["policy", "reward", "shared"] | None:
        """How the value model is made, or None if the estimator has none."""
        return None if self.estimator == "rloo" else self.value_model

    def __post_init__(self):
        super().__post_init__()
        is_rloo = self.estimator == "rloo"
        self.refuse("answers", is_rloo and self.answers < 2, "rloo compares the answers to a prompt; sample at least 2")
        for option in ("gae_lambda", "value_model", "value_coef", "value_clip"):
            self.refuse_idle(option, is_rloo, "estimator rloo has no value model")


@dataclass(frozen=True, kw_only=True)
class RolloutBatchConfig(RowsConfig):
    """The prompts of a step, and how they and their answers are packed into rows of tokens."""

    counts: ClassVar[str] = "prompts"
    layout: ClassVar[Literal["shared"]] = "shared"
    prompts: int = ranged(64, above=0)
    """Prompts per step, over all devices and hosts."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(RewardModelConfig):
    """What scores the sampled answers: a reward model or a Python function."""

    function: str | None = None
    """MODULE:FUNCTION, in a module that is installed or on PYTHONPATH; called for each rollout as
    function(prompts, answers, rows), three lists with one entry per answer, and returns a list of numbers."""

    def __post_init__(self):
        super().__post_init__()
        has_path, has_function = self.path is not None, self.function is not None
        remedy = f"give a reward model, or a Python function as {self.section}.function"
        self.refuse("path", not has_path and not has_function, remedy)
        self.refuse("function", has_path and has_function, f"{self.section}.path is set, too; remove one of the two")
        is_valid = self.function is None or self.function.count(":") == 1
        self.refuse("function", not is_valid, "give a module and a function in it, such as my_rewards:brevity")


@dataclass(frozen=True, kw_only=True)
class PairJudgeConfig(JudgeConfig, name="data.online.reward"):
    """What scores the sampled answers: a reward model or a Python function."""


@dataclass(frozen=True, kw_only=True)
class OnlinePairsConfig(Section, name="data.online"):
    """How many answers are sampled, and how the best and the worst of them are labeled."""

    answers: int = ranged(2, at_least=2)
    """Answers sampled per prompt."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: the best answer is the chosen one with probability sigmoid(score of the best - score of the worst); hard:
    always, and the margin grows without end."""
    missing_eos_penalty: float = ranged(0.0, at_least=0)
    """Subtracted from the score of an answer that reached the maximum length without an end token."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(OnlinePairsConfig):
    """Online DPO: each step samples answers to its prompts, and trains on the best and the worst answer to each.

    Rows of `data.train` are prompts then; of pairs, only the prompt is read. `sampling` says how answers are sampled.
    """

    reward: PairJudgeConfig


@dataclass(frozen=True, kw_only=True)
class PairDataConfig(DataConfig):
    """The training and evaluation data."""

    online: OnlineConfig | None = None  # type: ignore[override]
    """Sample the answers in training; null: they are in the data."""
