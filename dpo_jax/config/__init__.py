"""Every option of a run, in one place: its name, type, default and meaning. Standard library only.

A config is a tree of frozen dataclasses. The text under a field is its ``--help``. A section checks itself when it is
made; what concerns two sections is checked by the config that holds both.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dpo_jax.config.data import DataConfig, InvalidRowsConfig, SourceConfig
from dpo_jax.config.loss import (
    COUPLED,
    LOSS_OPTIONS,
    NO_REFERENCE,
    OF_MARGIN,
    PER_TOKEN,
    SORTED,
    LossConfig,
    LossType,
)
from dpo_jax.config.model import LORA_TARGETS, LoraConfig, ModelConfig, ReferenceConfig
from dpo_jax.config.run import (
    OPTIMIZER_DEFAULTS,
    BatchConfig,
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    RowsConfig,
    RunConfig,
    SFTBatchConfig,
)
from dpo_jax.errors import require

__all__ = [
    "COUPLED",
    "LORA_TARGETS",
    "LOSS_OPTIONS",
    "NO_REFERENCE",
    "OF_MARGIN",
    "OPTIMIZER_DEFAULTS",
    "PER_TOKEN",
    "SORTED",
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
    "RowsConfig",
    "RunConfig",
    "SFTBatchConfig",
    "SFTConfig",
    "SourceConfig",
    "Stage",
    "TrainConfig",
]


Stage = Literal["dpo", "sft"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What both stages have in common."""

    model: ModelConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self):
        draws = self.data.shuffle or (self.lora.rank > 0 and self.lora.path is None)
        require(self.run.seed == 0 or draws, "run.seed", self.run.seed,
                "data.shuffle is false and no adapter is initialized, so nothing is random; leave it at 0")  # fmt: skip
        require(self.optimizer.decay_mask == "matrices" or self.lora.rank == 0, "optimizer.decay_mask",
                self.optimizer.decay_mask, "all adapters are matrices; leave it at matrices")  # fmt: skip


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
        require(mode != "none" or not loss.needs_reference, "reference.mode", self.reference.mode,
                f"loss {names} compares with a reference; use live or cached, or set loss.reference_free")  # fmt: skip
        require(mode == "none" or not loss.reference_free, "reference.mode", self.reference.mode,
                "loss.reference_free takes no reference; use none")  # fmt: skip
        require(self.reference.dtype == "auto" or mode == "live", "reference.dtype", self.reference.dtype,
                f"only a live reference is held in a type of its own, this one is {mode}; use auto")  # fmt: skip
        require(self.reference.path is None or mode != "none", "reference.path", self.reference.path,
                "reference.mode is none; leave it out, or use live or cached")  # fmt: skip
        require(self.reference.sync_every == 0 or mode == "live", "reference.sync_every", self.reference.sync_every,
                f"only a live reference can follow the policy, this one is {mode}; use 0")  # fmt: skip
        if self.lora.rank:
            self._refuse_with_adapters()

    def _refuse_with_adapters(self) -> None:
        reason = "with lora.rank the reference is the model without its adapters"
        require(self.reference.path is None, "reference.path", self.reference.path, f"{reason}; leave it out")
        require(self.reference.dtype == "auto", "reference.dtype", self.reference.dtype,
                f"{reason}, in its type; use auto")  # fmt: skip
        require(self.reference.sync_every == 0, "reference.sync_every", self.reference.sync_every,
                f"{reason}, which no adapter can be mixed into; use 0")  # fmt: skip
        require(self.reference.mode != "live" or self.loss.needs_reference, "reference.mode", "live",
                f"{reason}, and loss {', '.join(name for name, _ in self.loss.terms)} compares with none; use auto"
                )  # fmt: skip

    @property
    def objective(self) -> LossConfig:
        """What is minimised."""
        return self.loss

    @property
    def reference_mode(self) -> Literal["live", "cached", "none"]:
        """How the reference is held, with auto settled."""
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
        for cause in ("equal_answers", "prompts_differ"):
            handling = getattr(self.data.invalid_rows, cause)
            require(handling == getattr(InvalidRowsConfig, cause), f"data.invalid_rows.{cause}", handling,
                    "fine-tuning has one answer a row, so this cannot happen; leave it out")  # fmt: skip
