"""Options of the model, its adapters and the reference."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.section import Section, ranged


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, name="model"):
    """The policy: where its weights come from and how it is computed."""

    path: str
    """Hugging Face directory or run directory of this program, local or gs://..., hub name, or builtin:tiny."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Checkpoint to load if path is a run directory."""
    tokenizer: str | None = None
    """Directory, local or gs://..., or hub name of the tokenizer, if it is not next to the weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto: bfloat16 on TPU and GPU, float32 on CPU. Log-probs are always float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trained weights; small learning rates vanish in bfloat16."""
    attention: Literal["auto", "blocks", "xla", "splash", "cudnn"] = "auto"
    """splash: TPU kernel; cudnn: CUDA kernel, in bfloat16; blocks: only the blocks of a row that hold a pair's own
    keys; xla: the whole row under a mask, for checks; auto: the platform's kernel, else blocks."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 matrix products on TPU and GPU; use highest to compare with a CPU."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes, layer by layer: nothing, all but matrix products, or everything; the result of
    attention over blocks is kept in any case. Recomputing saves memory; it makes a step up to a third slower on an
    accelerator, and hardly slower on a CPU."""
    scan: bool = True
    """Compile one layer and loop over it; false unrolls the layers."""
    router_aux_loss_coef: float | None = ranged(None, at_least=0)
    """Coefficient of the load-balancing loss of a mixture of experts, which training adds to the loss; null: that of
    the model's config.json; 0: none."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section, name="lora"):
    """Low-rank adapters, trained instead of the weights; the reference is then the model without them."""

    rank: int = ranged(0, at_least=0)
    """Rank of each adapter; 0: no adapters, all weights are trained."""
    alpha: float = ranged(16.0, above=0)
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("*",)
    """Projections that get an adapter: the names of their modules in Hugging Face models, such as q_proj, or shell
    patterns of these; * matches all modules. Matrices of experts are mlp.experts.gate_up_proj and
    mlp.experts.down_proj, which mlp.experts.* matches; a wildcard matches no dot."""
    rslora: bool = False
    """Scale adapters by alpha / sqrt(rank) instead, so that a higher rank learns no slower."""
    init: Literal["kaiming", "gaussian", "zero_a"] = "kaiming"
    """kaiming: A uniform within 1/sqrt(inputs), B zero; gaussian: A normal with standard deviation 1/rank, B zero;
    zero_a: A zero, B uniform within 1/sqrt(rank)."""
    path: str | None = None
    """Directory of PEFT adapters to start from, local or gs://..., with the same rank, alpha, rslora and targets."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse("targets", not self.targets, "name the modules that get an adapter; * matches all modules")
        for option in ("alpha", "targets", "rslora", "init", "path"):
            self.refuse_idle(option, self.rank == 0, "lora.rank is 0, so there are no adapters")
        self.refuse_idle("init", self.path is not None, f"the adapters start from lora.path {self.path}")

    @property
    def scale(self) -> float:
        """Factor that scales the product of an adapter's two matrices."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(Section, name="reference"):
    """The model that the policy is compared with; it is frozen unless sync_every is set."""

    mode: Literal["auto", "live", "cached", "none"] = "auto"
    """live: a forward pass in every step; cached: log-probs computed once and kept on disk; none: no reference; auto:
    live if the loss needs one, else none."""
    path: str | None = None
    """Model, named as in model.path, to use instead of the policy's initial weights, with the same vocabulary."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of a live reference; auto: that of the policy's weights."""
    sync_every: int = ranged(0, at_least=0)
    """Steps between updates of a live reference toward the policy; 0: never."""
    sync_mix: float = ranged(0.6, above=0, at_most=1)
    """Weight of the policy in each update of the reference; 1 copies the policy."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse_idle("sync_mix", self.sync_every == 0, "reference.sync_every is 0, so nothing is mixed")
