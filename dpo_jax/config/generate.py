"""Options of the command ``generate``."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.config.data import TEMPLATE_DATE, SourceConfig, is_date
from dpo_jax.config.model import ModelConfig
from dpo_jax.config.run import MeshConfig
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.config.section import Section, ranged


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(Section, name="reward"):
    """The reward model that scores the answers; without a path they have no scores."""

    path: str | None = None
    """Run directory of `dpo-jax reward`, or Hugging Face directory or hub name of a model for sequence
    classification, with the tokenizer of model.path."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Checkpoint to load if path is a run directory."""

    def __post_init__(self):
        super().__post_init__()
        for option in ("revision", "checkpoint"):
            self.refuse_idle(option, self.path is None, f"it applies to {self.section}.path, which is not set")


@dataclass(frozen=True, kw_only=True)
class TemplateConfig(Section, name="data"):
    """How prompts that hold messages are rendered; text is used as it is."""

    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's, or the name of one of the tokenizer's."""
    template_date: str = TEMPLATE_DATE
    """Date, YYYY-MM-DD, given to chat templates instead of today's; Llama 3's write it into the system turn."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse("template_date", not is_date(self.template_date), "give a date as YYYY-MM-DD")


@dataclass(frozen=True, kw_only=True)
class PromptBatchConfig(Section, name="batch"):
    """How much is generated at once."""

    size: int = ranged(32, above=0)
    """Prompts answered at once, over all devices and hosts. An answer does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class GenerateRunConfig(Section, name="run"):
    """The draw of the answers, and what is shown."""

    seed: int = ranged(0, at_least=0, below=2**32)
    """Determines the draws: each depends on the seed, the row of its prompt and the index of the answer."""
    progress: bool = True
    """Show progress, notes and what is about to run; false: only warnings and errors."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """What is generated. `--prompts FILE` stands for `--prompts.path FILE`, and `--reward` for `--reward.path`."""

    model: ModelConfig
    prompts: SourceConfig
    n: int = ranged(1, above=0)
    """Answers to each prompt."""
    pairs: Literal["best-worst", "best"] | None = None
    """Also write, next to the answers, the best and the worst answer to each prompt as pairs for `train`, or only the
    best one as rows for `sft`; by the scores of the reward model."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardModelConfig = field(default_factory=RewardModelConfig)
    data: TemplateConfig = field(default_factory=TemplateConfig)
    batch: PromptBatchConfig = field(default_factory=PromptBatchConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: GenerateRunConfig = field(default_factory=GenerateRunConfig)

    def __post_init__(self):
        super().__post_init__()
        is_greedy = self.sampling.temperature == 0
        self.refuse("n", is_greedy and self.n > 1, "at sampling.temperature 0 all answers are the same; use 1")
        self.refuse_idle("run.seed", is_greedy, "at sampling.temperature 0 nothing is random")
        unranked = self.pairs is not None and self.reward.path is None
        self.refuse("pairs", unranked, "answers are ranked by their scores; name a reward model as reward")
        is_single = self.pairs == "best-worst" and self.n == 1
        self.refuse("pairs", is_single, "a pair takes two answers to a prompt; set n to 2 or more")
        self.refuse("prompts.weight", self.prompts.weight is not None, "every prompt is answered; leave it out")
        self.refuse_idle("model.remat", True, "generation has no backward pass")
        self.refuse_idle(
            "model.attention", self.reward.path is None, "it applies to the reward model; reward is not set"
        )
