"""Define every option of a run: its name, type, default and meaning. Only the standard library is imported here.

A config is a tree of frozen dataclasses. The docstring under a field is its ``--help`` text. A section validates itself
when constructed; constraints between two sections are checked by the config that holds both.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

from dpo_jax.config.data import DataConfig, InvalidRowsConfig, SourceConfig
from dpo_jax.config.generate import EvaluationConfig, GenerateConfig
from dpo_jax.config.loss import LOSS_TRAITS, LossConfig, LossType, RewardLossConfig
from dpo_jax.config.model import LoraConfig, ModelConfig, ReferenceConfig
from dpo_jax.config.online import (
    JudgeConfig,
    OnlineConfig,
    PairDataConfig,
    PolicyGradientConfig,
    RolloutBatchConfig,
)
from dpo_jax.config.run import (
    OPTIMIZER_DEFAULTS,
    BatchConfig,
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SFTBatchConfig,
)
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.config.section import Section

__all__ = [
    "LOSS_TRAITS",
    "NUM_ANSWERS",
    "OPTIMIZER_DEFAULTS",
    "AnyBatch",
    "AnyConfig",
    "BatchConfig",
    "CheckpointConfig",
    "DPOConfig",
    "DataConfig",
    "GenerateConfig",
    "InvalidRowsConfig",
    "JudgeConfig",
    "LoraConfig",
    "LossConfig",
    "LossType",
    "MeshConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PairConfig",
    "PairDataConfig",
    "PlannedAnswers",
    "PolicyGradientConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardLossConfig",
    "RunConfig",
    "SFTBatchConfig",
    "SFTConfig",
    "SamplingConfig",
    "SourceConfig",
    "Stage",
    "TrainConfig",
]


Stage = Literal["dpo", "sft", "prompts"]  # how rows are read; the answers of prompts are still to be generated
NUM_ANSWERS: dict[Stage, int] = {"dpo": 2, "sft": 1, "prompts": 0}  # per prompt


class PlannedAnswers(NamedTuple):
    """How many answers per prompt a run trains on and how many it samples, and their maximum length in tokens."""

    per_prompt: int = 0
    num_tokens: int = 0
    sampled: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Config of a training run: the sections that all methods share."""

    scores: ClassVar[int] = 0  # outputs of a head that replaces the unembedding; 0: a language model
    planned: ClassVar[PlannedAnswers] = PlannedAnswers()
    judge: ClassVar[JudgeConfig | None] = None  # what scores answers that are sampled in training

    model: ModelConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        super().__post_init__()
        draws_adapters = self.lora.rank > 0 and self.lora.path is None
        draws_answers = self.planned.per_prompt > 0 or (self.run.samples > 0 and self.sampling.temperature > 0)
        uses_seed = self.data.shuffle or draws_adapters or draws_answers
        idle_reason = "nothing is random without data.shuffle, new adapters or sampled answers"
        self.refuse_idle("run.seed", not uses_seed, idle_reason)
        self.refuse_idle("optimizer.decay_mask", self.lora.rank > 0, "adapters are matrices, so both masks decay them")

    def _refuse_idle_sampling(self) -> None:
        """Refuse options of ``sampling`` if ``run.samples`` is 0, because this run samples answers for nothing else."""
        for option in ("max_tokens", "temperature", "top_k", "top_p"):
            self.refuse_idle(f"sampling.{option}", self.run.samples == 0, "run.samples is 0, so nothing is sampled")

    def _check_rollouts(self) -> None:
        """Refuse options that training on sampled answers does not support, or that have no effect on prompts alone."""
        sampling = self.sampling
        reason = "training needs samples of the unmodified policy"
        self.refuse("sampling.temperature", sampling.temperature != 1, f"{reason}; use 1")
        self.refuse("sampling.top_p", sampling.top_p != 1, f"{reason}; use 1")
        self.refuse("sampling.top_k", sampling.top_k != 0, f"{reason}; use 0")
        max_prompt_length = self.data.max_length - sampling.max_tokens
        remedy = f"data.max_length is {self.data.max_length}, so no prompt fits; lower it, or raise data.max_length"
        self.refuse("sampling.max_tokens", max_prompt_length < 1, remedy)
        for cause in ("equal_answers", "template_not_prefix"):
            self.refuse_idle(f"data.invalid_rows.{cause}", True, "the rows are prompts, so this cannot happen")
        self.refuse_idle("data.append_eos", True, "the policy ends its answers itself")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """A run of Direct Preference Optimization."""

    data: PairDataConfig | DataConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self):
        super().__post_init__()
        mode, loss = self.reference_mode, self.loss
        loss_names = ", ".join(name for name, _ in loss.terms)
        remedy = f"loss {loss_names} needs a reference; use live or cached, or set loss.reference_free"
        self.refuse("reference.mode", loss.needs_reference and mode == "none", remedy)
        is_unused = loss.reference_free and mode != "none"
        self.refuse("reference.mode", is_unused, "with loss.reference_free there is no reference; use none")
        for option in ("dtype", "sync_every"):
            self.refuse_idle(f"reference.{option}", mode != "live", f"only reference.mode live supports it, not {mode}")
        self.refuse_idle("reference.path", mode == "none", "reference.mode is none")
        lora_reason = "with lora.rank the reference is the model without its adapters"
        has_adapters = self.lora.rank > 0
        self.refuse_idle("reference.path", has_adapters, lora_reason)
        self.refuse_idle("reference.dtype", has_adapters, f"{lora_reason}, in the same dtype")
        self.refuse_idle("reference.sync_every", has_adapters, f"{lora_reason}, which is never updated")
        is_unused = has_adapters and self.reference.mode == "live" and not loss.needs_reference
        self.refuse("reference.mode", is_unused, f"{lora_reason}, and loss {loss_names} uses no reference; use auto")
        if self.data.online is None:
            self._refuse_idle_sampling()
        else:
            self._check_online(self.data.online)

    def _check_online(self, online: OnlineConfig) -> None:
        """Refuse options and losses that training on sampled, judged pairs does not support."""
        self._check_rollouts()
        is_cached = self.reference.mode == "cached"
        self.refuse("reference.mode", is_cached, "new answers need a live reference; use live")
        self.refuse_idle("eval.reward.path", True, "with data.online the evaluation sets are prompts without answers")
        loss, option = self.loss, "loss.type" if self.loss.type else "loss.types"
        for name, _ in loss.terms:
            reason = f"{name} imitates the chosen answers, but with data.online these are samples of the policy"
            self.refuse(option, LOSS_TRAITS[name].imitates, f"{reason}; choose another loss")
            reason = f"{name} sorts the pairs of a step, but with data.online each pair has its own label"
            self.refuse(option, LOSS_TRAITS[name].sorts, f"{reason}; choose another loss")
        is_soft = online.labels == "soft"
        remedy = "soft labels are probabilities already; use 0, or data.online.labels hard"
        is_smoothed = loss.label_smoothing > 0 and all(name != "exo_pair" for name, _ in loss.terms)
        self.refuse("loss.label_smoothing", is_soft and is_smoothed, remedy)
        self.refuse_idle(
            "loss.weighting", True, "wpo weights pairs as if the policy had sampled them; with data.online it did"
        )

    def without_online(self) -> "DPOConfig":
        """Return the config without ``data.online``, for commands that score the answers in the data."""
        if self.data.online is None:
            return self
        data = replace(self.data, online=None, shuffle=True)  # or run.seed, if it is not 0, would be refused
        if data.eval and data.eval_fraction == 0:
            data = replace(data, train=tuple(data.eval.values()))  # those of the config may be prompts alone
        return replace(self, data=data, sampling=SamplingConfig())

    @property
    def stage(self) -> Stage:
        """How rows are read: as pairs, or as prompts if answers are sampled in training."""
        return "dpo" if self.data.online is None else "prompts"

    @property
    def planned(self) -> PlannedAnswers:  # type: ignore[override]
        """Number and maximum length of the answers sampled for each pair; 0 if the answers are in the data."""
        online = self.data.online
        return PlannedAnswers() if online is None else PlannedAnswers(2, self.sampling.max_tokens, online.answers)

    @property
    def judge(self) -> JudgeConfig | None:  # type: ignore[override]
        """What scores the answers, if they are sampled."""
        return None if self.data.online is None else self.data.online.reward

    @property
    def objective(self) -> LossConfig:
        """The loss that training minimizes."""
        return self.loss

    @property
    def reference_mode(self) -> Literal["live", "cached", "none"]:
        """How the reference log-probs are computed, with ``auto`` resolved."""
        if self.reference.mode != "auto":
            return self.reference.mode
        return "live" if self.loss.needs_reference else "none"


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """A run of supervised fine-tuning."""

    stage: ClassVar[Stage] = "sft"
    objective: ClassVar[LossConfig] = LossConfig(type="sft")  # mean over the answer tokens
    reference: ClassVar[ReferenceConfig] = ReferenceConfig(mode="none")
    reference_mode: ClassVar[Literal["none"]] = "none"

    batch: SFTBatchConfig = field(default_factory=SFTBatchConfig)

    def __post_init__(self):
        super().__post_init__()
        self._refuse_idle_sampling()
        reason = "fine-tuning has one answer per row, so this cannot happen"
        for cause in ("equal_answers", "prompts_differ"):
            self.refuse_idle(f"data.invalid_rows.{cause}", True, reason)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """A run that trains a reward model on preference pairs."""

    stage: ClassVar[Stage] = "dpo"  # reads the same pairs
    scores: ClassVar[int] = 1
    reference: ClassVar[ReferenceConfig] = ReferenceConfig(mode="none")
    reference_mode: ClassVar[Literal["none"]] = "none"

    loss: RewardLossConfig = field(default_factory=RewardLossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self):
        super().__post_init__()
        self._refuse_idle_sampling()
        for option in ("run.token_stats", "batch.target_chunk"):
            self.refuse_idle(option, True, "a reward model predicts no tokens")
        self.refuse_idle("model.router_aux_loss_coef", True, "a reward model is trained without a load-balancing loss")

    def without_online(self) -> "RewardConfig":
        """Return this config unchanged: a reward model is always trained on the answers in the data."""
        return self

    @property
    def objective(self) -> LossConfig:
        """The Bradley-Terry loss, -log sigmoid(chosen score - rejected score); there is no reference model."""
        smoothing, center = self.loss.label_smoothing, self.loss.center
        return LossConfig(type="sigmoid", beta=1.0, reference_free=True, label_smoothing=smoothing, center=center)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainConfig):
    """A run that trains on the policy's own answers, by policy gradients."""

    stage: ClassVar[Stage] = "prompts"
    objective: ClassVar[LossConfig] = LossConfig()  # plain log-probs of all tokens
    reference_mode: ClassVar[Literal["live"]] = "live"

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    ppo: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    reward: JudgeConfig
    batch: RolloutBatchConfig = field(default_factory=RolloutBatchConfig)

    def __post_init__(self):
        super().__post_init__()
        mode = self.reference.mode
        self.refuse("reference.mode", mode not in ("auto", "live"), "new answers need a live reference; use live")
        self.refuse("reference.sync_every", self.reference.sync_every, "PPO and RLOO keep the reference fixed; use 0")
        has_adapters = self.lora.rank > 0
        for option in ("path", "dtype"):
            reason = "with lora.rank the reference is the model without its adapters"
            self.refuse_idle(f"reference.{option}", has_adapters, reason)
        from_function = self.ppo.value_model == "reward" and self.reward.path is None
        self.refuse("ppo.value_model", from_function, "a reward function has no weights to start from; use policy")
        self._check_rollouts()
        self.refuse_idle("run.token_stats", True, "token statistics are computed only on answers in the data")
        self.refuse_idle("model.router_aux_loss_coef", True, "PPO and RLOO have no load-balancing loss")

    @property
    def planned(self) -> PlannedAnswers:  # type: ignore[override]
        """Number and maximum length of the answers sampled for each prompt."""
        return PlannedAnswers(self.ppo.answers, self.sampling.max_tokens, self.ppo.answers)

    @property
    def judge(self) -> JudgeConfig:  # type: ignore[override]
        """What scores the answers."""
        return self.reward


AnyBatch = BatchConfig | SFTBatchConfig | RolloutBatchConfig
PairConfig = DPOConfig | RewardConfig  # trains on pairs of answers
AnyConfig = PairConfig | SFTConfig | PPOConfig
