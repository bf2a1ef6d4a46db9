"""Options of the command ``generate``, and of reward models."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.config.data import TEMPLATE_DATE, SourceConfig, is_date
from dpo_jax.config.model import ModelConfig
from dpo_jax.config.run import MeshConfig
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.config.section import Section, ranged


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(Section, name="reward"):
    """The reward model that scores the answers; if reward.path is not set, answers are not scored."""

    path: str | None = None
    """Run directory of `dpo-jax reward` or Hugging Face directory, local or gs://..., or hub name of a
    sequence-classification model. If its tokenizer or chat template is not the policy's, it reads the text of the
    answers."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Checkpoint to load if path is a run directory."""

    def __post_init__(self):
        super().__post_init__()
        for option in ("revision", "checkpoint"):
            self.refuse_idle(option, self.path is None, f"{self.section}.path is not set, so no reward model is loaded")


@dataclass(frozen=True, kw_only=True)
class ComparedRewardConfig(RewardModelConfig, name="eval.reward"):
    """A reward model that scores the evaluation pairs once, before training, as a measure of the implicit reward.

    The report puts its accuracy and calibration next to those of the implicit reward.
    """

    path: str | None = None
    """Run directory of `dpo-jax reward` or Hugging Face directory, local or gs://..., or hub name of a model for
    sequence classification, with the policy's tokenizer and chat template."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section, name="eval"):
    """Models, other than the reference, with which evaluations compare the policy."""

    reward: ComparedRewardConfig = field(default_factory=ComparedRewardConfig)


@dataclass(frozen=True, kw_only=True)
class TemplateConfig(Section, name="data"):
    """How prompts given as messages are rendered; prompts given as text are used unchanged."""

    chat_template: str | None = None
    """Jinja chat template to use instead of the tokenizer's default: a file, local or gs://..., or the name of one of
    its templates."""
    template_date: str = TEMPLATE_DATE
    """Date, YYYY-MM-DD, given to chat templates instead of today's; Llama 3's write it into the system turn."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse("template_date", not is_date(self.template_date), "give a date as YYYY-MM-DD")


@dataclass(frozen=True, kw_only=True)
class PromptBatchConfig(Section, name="batch"):
    """How many prompts are answered at once."""

    size: int = ranged(32, above=0)
    """Prompts answered at once, over all devices and hosts. An answer does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class GenerateRunConfig(Section, name="run"):
    """The sampling seed, and what is printed."""

    seed: int = ranged(0, at_least=0, below=2**32)
    """Sampling seed; an answer's random draws depend on it, the prompt's row and the answer's index."""
    progress: bool = True
    """Show progress, notes and what is about to run; false: only warnings and errors."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """Answer generation. `--prompts FILE` stands for `--prompts.path FILE`, and `--reward` for `--reward.path`."""

    model: ModelConfig
    prompts: SourceConfig
    n: int = ranged(1, above=0)
    """Answers to each prompt."""
    pairs: Literal["best-worst", "best"] | None = None
    """Rank the answers to each prompt by reward-model score and write, next to the output, the best and the worst as
    pairs for `train`, or only the best as rows for `sft`."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardModelConfig = field(default_factory=RewardModelConfig)
    data: TemplateConfig = field(default_factory=TemplateConfig)
    batch: PromptBatchConfig = field(default_factory=PromptBatchConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: GenerateRunConfig = field(default_factory=GenerateRunConfig)

    def __post_init__(self):
        super().__post_init__()
        is_greedy = self.sampling.temperature == 0
        self.refuse("n", is_greedy and self.n > 1, "at sampling.temperature 0 all answers are the same; set n to 1")
        self.refuse_idle("run.seed", is_greedy, "at sampling.temperature 0 nothing is random")
        is_unranked = self.pairs is not None and self.reward.path is None
        self.refuse("pairs", is_unranked, "answers are ranked by their scores; set reward.path to a reward model")
        is_single = self.pairs == "best-worst" and self.n == 1
        self.refuse("pairs", is_single, "a pair needs two answers to the same prompt; set n to 2 or more")
        self.refuse(
            "prompts.weight", self.prompts.weight is not None, "prompts are not drawn by weight; remove the option"
        )
        self.refuse_idle("model.remat", True, "generation has no backward pass")
        self.refuse_idle("model.router_aux_loss_coef", True, "generation has no loss")
        is_unscored = self.reward.path is None
        self.refuse_idle("model.attention", is_unscored, "only a reward model uses it, and reward.path is not set")
