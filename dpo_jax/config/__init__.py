"""Every option of a run, in one place: its name, type, default and meaning. Standard library only.

A config is a tree of frozen dataclasses. The text under a field is its ``--help``. A section checks itself when it is
made; what concerns two sections is checked by the config that holds both.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dpo_jax.config.data import DataConfig, InvalidRowsConfig, SourceConfig
from dpo_jax.config.loss import LOSS_TRAITS, LossConfig, LossType
from dpo_jax.config.model import LORA_TARGETS, LoraConfig, ModelConfig, ReferenceConfig
from dpo_jax.config.run import (
    OPTIMIZER_DEFAULTS,
    BatchConfig,
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SFTBatchConfig,
)
from dpo_jax.config.section import Section

__all__ = [
    "LORA_TARGETS",
    "LOSS_TRAITS",
    "OPTIMIZER_DEFAULTS",
    "BatchConfig",
    "CheckpointConfig",
    "DPOConfig",
    "DataConfig",
    "InvalidRowsConfig",
    "LoraConfig",
    "LossConfig",
    "LossType",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ReferenceConfig",
    "RunConfig",
    "SFTBatchConfig",
    "SFTConfig",
    "SourceConfig",
    "Stage",
    "TrainConfig",
]


Stage = Literal["dpo", "sft"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """What both stages have in common."""

    model: ModelConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        super().__post_init__()
        random = self.data.shuffle or (self.lora.rank > 0 and self.lora.path is None)
        self.refuse_idle("run.seed", not random, "nothing is random: data.shuffle is false, no adapter is initialized")
        self.refuse_idle("optimizer.decay_mask", self.lora.rank > 0, "all adapters are matrices")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """A run of Direct Preference Optimization."""

    stage: ClassVar[Stage] = "dpo"

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self):
        super().__post_init__()
        mode, loss = self.reference_mode, self.loss
        names = ", ".join(name for name, _ in loss.terms)
        remedy = f"loss {names} compares with a reference; use live or cached, or set loss.reference_free"
        self.refuse("reference.mode", loss.needs_reference and mode == "none", remedy)
        unread = loss.reference_free and mode != "none"
        self.refuse("reference.mode", unread, "loss.reference_free takes no reference; use none")
        for option in ("dtype", "sync_every"):
            self.refuse_idle(f"reference.{option}", mode != "live", f"only mode live has it, this is {mode}")
        self.refuse_idle("reference.path", mode == "none", "reference.mode is none")
        base = "with lora.rank the reference is the model without its adapters"
        adapted = self.lora.rank > 0
        self.refuse_idle("reference.path", adapted, base)
        self.refuse_idle("reference.dtype", adapted, f"{base}, in its dtype")
        self.refuse_idle("reference.sync_every", adapted, f"{base}, which does not move")
        unread = adapted and self.reference.mode == "live" and not loss.needs_reference
        self.refuse("reference.mode", unread, f"{base}, and loss {names} compares with none; use auto")

    @property
    def objective(self) -> LossConfig:
        """What is minimized."""
        return self.loss

    @property
    def reference_mode(self) -> Literal["live", "cached", "none"]:
        """How the reference is computed, with auto resolved."""
        if self.reference.mode != "auto":
            return self.reference.mode
        return "live" if self.loss.needs_reference else "none"


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """A run of supervised fine-tuning."""

    stage: ClassVar[Stage] = "sft"
    objective: ClassVar[LossConfig] = LossConfig(type="sft")  # the token mean over the answer
    reference: ClassVar[ReferenceConfig] = ReferenceConfig(mode="none")
    reference_mode: ClassVar[Literal["none"]] = "none"

    batch: SFTBatchConfig = field(default_factory=SFTBatchConfig)

    def __post_init__(self):
        super().__post_init__()
        why = "fine-tuning has one answer per row, so this cannot happen"
        for cause in ("equal_answers", "prompts_differ"):
            self.refuse_idle(f"data.invalid_rows.{cause}", True, why)
