"""Options of the optimizer, the batch, the mesh, the run and its checkpoints."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from dpo_jax.config.section import Section, ranged
from dpo_jax.errors import UserError

OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {  # an optimizer has only the options listed for it
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "lion": {"b1": 0.9, "b2": 0.99},
    "adafactor": {},
    "rmsprop": {"b2": 0.99, "eps": 1e-8},
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section, name="optimizer"):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "lion", "adafactor", "rmsprop"] = "adamw"
    """The update rule; rmsprop is that of the DPO paper."""
    learning_rate: float = ranged(5e-7, above=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """Shape after the warmup; wsd stays at the peak, then decays over decay_steps."""
    warmup_steps: int = ranged(0, at_least=0)
    """Steps over which the learning rate rises from 0 to its peak."""
    decay_steps: int | None = ranged(None, above=0)
    """Steps of wsd's decay; default: a tenth of the run."""
    final_fraction: float = ranged(0.0, at_least=0, at_most=1)
    """Final learning rate as a share of the peak, for linear, cosine and wsd."""
    b1: float | None = ranged(None, at_least=0, below=1)
    """Decay rate of the first moment; default: 0.9 (adamw, lion)."""
    b2: float | None = ranged(None, at_least=0, below=1)
    """Decay rate of the second moment; default: 0.999 (adamw), 0.99 (lion, rmsprop)."""
    eps: float | None = ranged(None, at_least=0, below=1)
    """Added to the root of the second moment; default: 1e-8 (adamw, rmsprop)."""
    weight_decay: float = ranged(0.0, at_least=0)
    """Decoupled weight decay."""
    decay_mask: Literal["matrices", "all"] = "matrices"
    """Which weights decay; matrices leaves out norms and biases."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment."""
    max_grad_norm: float | None = ranged(1.0, above=0)
    """Gradients are clipped to this global norm; null: no clipping."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse_idle("decay_steps", self.schedule != "wsd", "only optimizer.schedule wsd supports it")
        self.refuse_idle("final_fraction", self.schedule == "constant", "a constant schedule does not decay")
        for option in ("b1", "b2", "eps"):
            self.refuse_idle(option, option not in OPTIMIZER_DEFAULTS[self.name], f"{self.name} has no {option}")
        self.refuse_idle("moment_dtype", self.name not in ("adamw", "lion"), f"{self.name} has no first moment")
        self.refuse_idle("decay_mask", self.weight_decay == 0, "optimizer.weight_decay is 0, so nothing decays")


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Section, name="batch"):
    """How the examples of a step are packed into rows of tokens."""

    row_length: Literal["auto"] | int = ranged("auto", at_least=64, multiple_of=64)
    """Tokens per row; auto: one row per data-parallel device, in a few lengths that fit the data."""
    max_shapes: int = ranged(4, above=0)
    """Maximum number of row shapes to compile; each is used only where it saves token slots."""
    accumulation: int = ranged(1, above=0)
    """Gradient accumulation steps: microbatches computed one after another; the result does not depend on it."""
    target_chunk: int = ranged(1024, above=0)
    """Answer tokens per device whose logits are in memory at once, for 8192 tokens of the vocabulary at a time."""

    counts: ClassVar[str]  # the option that says how many examples a step has

    def __post_init__(self):
        super().__post_init__()
        self.refuse("accumulation", self.size % self.accumulation, f"it must divide batch.{self.counts} ({self.size})")

    @property
    def size(self) -> int:
        """Number of examples in a step."""
        return getattr(self, self.counts)


@dataclass(frozen=True, kw_only=True)
class BatchConfig(RowsConfig):
    """The pairs of a step, and how they are packed into rows of tokens."""

    counts: ClassVar[str] = "pairs"
    pairs: int = ranged(64, above=0)
    """Pairs per step, over all devices and hosts."""
    layout: Literal["shared", "repeated", "padded"] = "shared"
    """shared: a prompt is stored and computed once for its two answers; repeated: twice; padded: one sequence per
    row."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse_idle("row_length", self.layout == "padded", "layout padded takes the row length from the data")


@dataclass(frozen=True, kw_only=True)
class SFTBatchConfig(RowsConfig):
    """The examples of a step, and how they are packed into rows of tokens."""

    counts: ClassVar[str] = "examples"
    layout: ClassVar[Literal["shared"]] = "shared"  # each prompt has a single answer
    examples: int = ranged(64, above=0)
    """Examples per step, over all devices and hosts."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section, name="mesh"):
    """Devices along each axis of the mesh; one axis may be -1: all remaining devices."""

    data: int = ranged(1, above=0, special=-1)
    """Copies of the model, each with its own rows."""
    fsdp: int = ranged(-1, above=0, special=-1)
    """Devices that shard weights, optimizer state and rows."""
    expert: int = ranged(1, above=0, special=-1)
    """Devices that shard the experts of a mixture; other weights, optimizer state and rows are sharded over fsdp and
    expert."""
    tensor: int = ranged(1, above=0, special=-1)
    """Devices that shard each layer's heads and features."""

    def __post_init__(self):
        super().__post_init__()
        flexible_axes = [f"mesh.{axis}" for axis in (field.name for field in fields(self)) if getattr(self, axis) == -1]
        if len(flexible_axes) > 1:
            raise UserError(f"{' and '.join(flexible_axes)} cannot all be -1; give the size of all but one")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section, name="run"):
    """The run: directory, length, logs and output."""

    dir: str
    """Run directory, local or gs://...; starting again with the same one resumes the run."""
    steps: int | None = ranged(None, above=0)
    """Length in steps; or give epochs."""
    epochs: float | None = ranged(None, above=0)
    """Length in passes over the training data; or give steps. Default: 1 epoch."""
    seed: int = ranged(0, at_least=0)
    """Determines the order of the data, the initial adapters and the sampled answers."""
    log_every: int = ranged(1, above=0)
    """Steps between lines of metrics.jsonl."""
    eval_every: int = ranged(0, at_least=0)
    """Steps between evaluations; 0: only before the first and after the last step."""
    samples: int = ranged(0, at_least=0)
    """Answer the first different prompts, up to this many of each evaluation set, at every evaluation; answers go to
    samples.jsonl and the report. Next to the policy's stand the reference's, sampled once before training unless it
    moves, so also those of a cached one; without a reference, the start's. A reward model scores the answers of the
    language model that it starts from."""
    token_stats: bool = True
    """Also log entropy, mean logits and token accuracy."""
    export: bool = False
    """Export the model in Hugging Face format to folder `export` at the end."""
    report: bool = True
    """Write report.html at the end."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that receive metrics in addition to metrics.jsonl."""
    progress: bool = True
    """Show progress, notes and what is about to run; false: only warnings and errors."""
    profile_steps: tuple[int, ...] = ranged((), above=0)
    """First and last step to trace into folder `profile`, for XProf or Perfetto, such as [10, 12]; tracing is slow."""
    compiler_flags: dict[str, str] = field(default_factory=dict)
    """XLA options of the train step, by name; they add to or replace the defaults set on TPUs; an empty value removes a
    default."""

    def __post_init__(self):
        super().__post_init__()
        both_given = self.steps is not None and self.epochs is not None
        self.refuse("steps", both_given, f"run.epochs {self.epochs} is given too; keep one of the two")
        is_ordered = len(self.profile_steps) == 2 and self.profile_steps[0] <= self.profile_steps[1]
        remedy = "give the first and the last step, counted from 1, such as [10, 12]"
        self.refuse("profile_steps", self.profile_steps != () and not is_ordered, remedy)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section, name="checkpoint"):
    """When checkpoints are saved, and which are kept."""

    every: int = ranged(0, at_least=0)
    """Steps between checkpoints; 0: a tenth of the run. The last step is always saved."""
    keep: int = ranged(2, above=0)
    """Number of latest checkpoints kept."""
    keep_best: int = ranged(0, at_least=0)
    """Number of best checkpoints kept as well, by best_metric."""
    best_metric: str | None = None
    """Evaluation metric that ranks checkpoints, such as eval_held_out_rewards/accuracies."""
    best_mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower best_metric is better."""

    def __post_init__(self):
        super().__post_init__()
        one_missing = (self.keep_best > 0) != (self.best_metric is not None)
        self.refuse("best_metric", one_missing, f"checkpoint.keep_best is {self.keep_best}; give both or neither")
        self.refuse_idle("best_mode", self.best_metric is None, "checkpoint.best_metric is not set")
