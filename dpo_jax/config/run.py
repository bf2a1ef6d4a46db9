"""Options of the update, of a step's rows, of the mesh, of the run and of its saves."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.errors import require

OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {  # also says which of these an optimizer has
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "lion": {"b1": 0.9, "b2": 0.99},
    "adafactor": {},
    "rmsprop": {"b2": 0.99, "eps": 1e-8},
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update."""

    name: Literal["adamw", "lion", "adafactor", "rmsprop"] = "adamw"
    """rmsprop is the DPO paper's own."""
    learning_rate: float = 5e-7
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """Shape after the warm-up; wsd stays at the peak, then falls over decay_steps."""
    warmup_steps: int = 0
    """Steps over which the rate rises from 0 to its peak."""
    decay_steps: int | None = None
    """Steps of wsd's fall; default: a tenth of the run."""
    final_fraction: float = 0.0
    """Rate at the end as a share of the peak, for linear, cosine and wsd."""
    b1: float | None = None
    """Decay of the first moment; default: 0.9 (adamw, lion)."""
    b2: float | None = None
    """Decay of the second moment; default: 0.999 (adamw), 0.99 (lion, rmsprop)."""
    eps: float | None = None
    """Added to the root of the second moment; default: 1e-8 (adamw, rmsprop)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    decay_mask: Literal["matrices", "all"] = "matrices"
    """What weight decay acts on: matrices leaves out norms and biases."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""

    def __post_init__(self):
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "it must be positive")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "it cannot be negative")
        require(self.decay_steps is None or self.schedule == "wsd", "optimizer.decay_steps", self.decay_steps,
                f"only schedule wsd has it, this is {self.schedule}")  # fmt: skip
        require(self.decay_steps is None or self.decay_steps > 0, "optimizer.decay_steps", self.decay_steps,
                "a positive number is needed")  # fmt: skip
        require(self.final_fraction == 0 or self.schedule != "constant", "optimizer.final_fraction",
                self.final_fraction, "schedule constant does not fall; set it to 0")  # fmt: skip
        require(0 <= self.final_fraction <= 1, "optimizer.final_fraction", self.final_fraction, "it lies in [0, 1]")
        for option in ("b1", "b2", "eps"):
            value = getattr(self, option)
            require(value is None or option in OPTIMIZER_DEFAULTS[self.name], f"optimizer.{option}", value,
                    f"{self.name} has no {option}; leave it out")  # fmt: skip
            require(value is None or 0 <= value < 1, f"optimizer.{option}", value, "it lies in [0, 1)")
        require(self.moment_dtype == "float32" or self.name in ("adamw", "lion"), "optimizer.moment_dtype",
                self.moment_dtype, f"{self.name} has no first moment; use float32")  # fmt: skip
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "it cannot be negative")
        require(self.decay_mask == "matrices" or self.weight_decay > 0, "optimizer.decay_mask", self.decay_mask,
                "optimizer.weight_decay is 0, so nothing decays; set it, or leave this at matrices")  # fmt: skip
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm,
                "it must be positive, or null for no clipping")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How a step's examples are laid in rows of tokens."""

    row_length: Literal["auto"] | int = "auto"
    """Tokens in a row; auto: one row for each data-parallel device, in the few lengths that the data asks for."""
    max_shapes: int = 4
    """Most row shapes that the run compiles; each is taken only where it saves token slots."""
    accumulation: int = 1
    """Gradient accumulation steps: microbatches computed one after another; the result does not depend on it."""
    target_chunk: int = 1024
    """Answer tokens of a device whose scores exist at one time, over 8192 tokens of the vocabulary."""

    def __post_init__(self):
        require(self.row_length == "auto" or self.row_length >= 64, "batch.row_length", self.row_length,
                "at least 64, or auto")  # fmt: skip
        require(self.row_length == "auto" or self.row_length % 64 == 0, "batch.row_length", self.row_length,
                "it must be a multiple of 64")  # fmt: skip
        require(self.max_shapes > 0, "batch.max_shapes", self.max_shapes, "a positive number is needed")
        require(self.accumulation > 0, "batch.accumulation", self.accumulation, "a positive number is needed")
        require(self.target_chunk > 0, "batch.target_chunk", self.target_chunk, "a positive number is needed")


@dataclass(frozen=True, kw_only=True)
class BatchConfig(RowsConfig):
    """How a step's pairs are laid in rows of tokens."""

    pairs: int = 64
    """Pairs in a step, over all devices and hosts."""
    layout: Literal["shared", "repeated", "padded"] = "shared"
    """shared: a prompt stored and computed once for its two answers; repeated: twice; padded: one sequence a row."""

    def __post_init__(self):
        super().__post_init__()
        require(self.pairs > 0, "batch.pairs", self.pairs, "a positive number is needed")
        require(self.pairs % self.accumulation == 0, "batch.accumulation", self.accumulation,
                f"it must divide batch.pairs, {self.pairs}")  # fmt: skip
        require(self.layout != "padded" or self.row_length == "auto", "batch.row_length", self.row_length,
                "layout padded takes its length from the data; use auto")  # fmt: skip

    @property
    def size(self) -> int:
        """Examples in a step."""
        return self.pairs


@dataclass(frozen=True, kw_only=True)
class SFTBatchConfig(RowsConfig):
    """How a step's examples are laid in rows of tokens."""

    examples: int = 64
    """Examples in a step, over all devices and hosts."""

    def __post_init__(self):
        super().__post_init__()
        require(self.examples > 0, "batch.examples", self.examples, "a positive number is needed")
        require(self.examples % self.accumulation == 0, "batch.accumulation", self.accumulation,
                f"it must divide batch.examples, {self.examples}")  # fmt: skip

    @property
    def size(self) -> int:
        """Examples in a step."""
        return self.examples

    @property
    def layout(self) -> Literal["shared"]:
        """One answer follows its prompt, so that there is nothing to choose."""
        return "shared"


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1: the rest."""

    data: int = 1
    """Copies of the model, each with its own rows."""
    fsdp: int = -1
    """Devices over which weights, optimizer state and rows are spread."""
    tensor: int = 1
    """Devices over which each layer's heads and features are spread."""

    def __post_init__(self):
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"mesh.{name}", size, "a positive number, or -1 for the rest")
        require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one axis can be -1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself."""

    dir: str
    """Run directory; starting again with the same one continues the run."""
    steps: int | None = None
    """Length in steps; or give epochs."""
    epochs: float | None = None
    """Length in passes over the training data; or give steps. Neither: 1 epoch."""
    seed: int = 0
    """Decides the order of the data, and what adapters start from."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    token_stats: bool = True
    """Also log entropy, mean logits and token accuracy."""
    export: bool = False
    """Write the Hugging Face directory `export` at the end."""
    report: bool = True
    """Write report.html at the end."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go in addition to metrics.jsonl."""
    progress: bool = True
    """Show a live progress line, notes and what is about to run; False: only warnings and errors."""
    profile_steps: tuple[int, ...] = ()
    """First and last step to trace into folder `profile`, for XProf or Perfetto, such as [10, 12]; this is slow."""
    compiler_flags: dict[str, str] = field(default_factory=dict)
    """XLA options of the train step, by name, added to or replacing those that the program sets on TPUs; an empty value
    leaves one of these out."""

    def __post_init__(self):
        require(self.steps is None or self.epochs is None, "run.steps", self.steps,
                f"run.epochs {self.epochs} is given too; keep one")  # fmt: skip
        require(self.steps is None or self.steps > 0, "run.steps", self.steps, "a positive number is needed")
        require(self.epochs is None or self.epochs > 0, "run.epochs", self.epochs, "a positive number is needed")
        require(self.log_every > 0, "run.log_every", self.log_every, "a positive number is needed")
        require(self.eval_every >= 0, "run.eval_every", self.eval_every, "it cannot be negative")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "it lies in [0, 2**63)")
        window = self.profile_steps
        require(window == () or (len(window) == 2 and 1 <= window[0] <= window[1]), "run.profile_steps", window,
                "give the first and the last step, counted from 1, such as [10, 12]")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept, and when."""

    every: int = 0
    """Steps between saves; 0: a tenth of the run. The last step is saved always."""
    keep: int = 2
    """Newest saves kept."""
    keep_best: int = 0
    """Best saves kept as well, by best_metric."""
    best_metric: str | None = None
    """Evaluation metric that tells the best, such as eval_held_out_rewards/accuracies."""
    best_mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""

    def __post_init__(self):
        require(self.every >= 0, "checkpoint.every", self.every, "it cannot be negative")
        require(self.keep > 0, "checkpoint.keep", self.keep, "at least one save is needed to go on from")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "it cannot be negative")
        require((self.keep_best > 0) == (self.best_metric is not None), "checkpoint.best_metric", self.best_metric,
                f"keep_best is {self.keep_best}; give both or neither")  # fmt: skip
        require(self.best_mode == "max" or self.best_metric is not None, "checkpoint.best_mode", self.best_mode,
                "there is no checkpoint.best_metric to judge by; give it and keep_best, or leave this at max"
                )  # fmt: skip
