"""Every option of a run, in one place: its name, type, default and meaning. Standard library only.

A config is a tree of frozen dataclasses. The text under a field is its ``--help``. A section checks itself when it is
made; what concerns two sections is checked by the config that holds both.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from dpo_jax.errors import UserError


def require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    """Raise one line that names the field, its value and the remedy."""
    if not condition:
        raise UserError(f"{field_name}: {value!r} cannot be used: {remedy}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: where its weights come from and how it computes."""

    path: str
    """Hugging Face directory, run directory of this program, hub name, or builtin:tiny."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which step to take when path is a run directory."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer, when it is not beside the weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the arithmetic; auto: bfloat16 on TPU and GPU, float32 on CPU. Log-probs are float32 always."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights; small learning rates vanish in bfloat16."""
    attention: Literal["auto", "blocks", "xla", "splash", "cudnn"] = "auto"
    """splash: TPU's kernel; cudnn: CUDA's, in bfloat16; blocks: only the blocks of the row that hold a pair's own keys;
    xla: the whole row under a mask, for checks. auto: the platform's own, else blocks."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 matrix products on TPU and GPU; highest to compare figures with a CPU."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again, layer by layer: nothing, all but matrix products, or everything. The more,
    the less memory; on a CPU it costs next to no time, on an accelerator up to a third more."""
    scan: bool = True
    """Compile one layer and loop over it; False unrolls the layers."""


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the weights; the reference is then the model without them."""

    rank: int = 0
    """Rank of each adapter; 0: no adapters, all weights are trained."""
    alpha: float = 16.0
    """Adapters count alpha / rank."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Projections that get an adapter, by their names in Hugging Face models or by shell patterns of these."""
    rslora: bool = False
    """Adapters count alpha / sqrt(rank) instead, so that a higher rank learns no slower."""
    init: Literal["kaiming", "gaussian", "zero_a"] = "kaiming"
    """Start of A and B, whose product is 0: A uniform in 1/sqrt(inputs) or normal with deviation 1/rank, and B 0; or A
    0, and B uniform in 1/sqrt(rank)."""
    path: str | None = None
    """Directory of adapters in PEFT's format to start from; they must have this rank, alpha, rslora and targets."""

    def __post_init__(self):
        require(self.rank >= 0, "lora.rank", self.rank, "it cannot be negative")
        require(0 < self.alpha < float("inf"), "lora.alpha", self.alpha, "it must be positive")
        require(len(self.targets) > 0, "lora.targets", self.targets, f"choose from {', '.join(LORA_TARGETS)}")
        for pattern in self.targets:
            require(any(fnmatchcase(name, pattern) for name in LORA_TARGETS), "lora.targets", pattern,
                    f"it fits none of {', '.join(LORA_TARGETS)}")  # fmt: skip
        for option in ("alpha", "targets", "rslora", "init", "path"):
            value, default = getattr(self, option), type(self).__dataclass_fields__[option].default
            require(self.rank > 0 or value == default, f"lora.{option}", value,
                    "lora.rank is 0, so there are no adapters; set a rank, or leave this out")  # fmt: skip
        require(self.path is None or self.init == "kaiming", "lora.init", self.init,
                f"the adapters start from lora.path {self.path}; leave it out")  # fmt: skip

    @property
    def projections(self) -> tuple[str, ...]:
        """The targets with their patterns settled, in the order of the layer."""
        return tuple(name for name in LORA_TARGETS if any(fnmatchcase(name, pattern) for pattern in self.targets))

    @property
    def scale(self) -> float:
        """What the product B A counts."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that the policy is held to."""

    mode: Literal["auto", "live", "cached", "none"] = "auto"
    """live: its forward pass runs in every step; cached: its log-probs are computed once and kept on disk; none: there
    is no reference; auto: live if the loss needs one, else none."""
    path: str | None = None
    """Another model than the policy's own start, with the same vocabulary."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which a live reference is held; auto: the type of the policy's weights."""
    sync_every: int = 0
    """Steps after which the policy is mixed into a live reference, again and again; 0: never."""
    sync_mix: float = 0.6
    """Share of the policy in that mixture; 1 copies the policy."""

    def __post_init__(self):
        require(self.sync_every >= 0, "reference.sync_every", self.sync_every, "it cannot be negative")
        require(0 < self.sync_mix <= 1, "reference.sync_mix", self.sync_mix, "it lies in (0, 1]")
        require(self.sync_mix == 0.6 or self.sync_every > 0, "reference.sync_mix", self.sync_mix,
                "reference.sync_every is 0, so nothing is mixed; leave it at 0.6")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of examples."""

    path: str
    """File (.json, .jsonl, .parquet), folder of datasets.save_to_disk, hub name, or tfds:NAME."""
    split: str = "train"
    """Split of a hub, disk or TFDS set."""
    name: str | None = None
    """Configuration name of a hub set."""
    revision: str | None = None
    """Branch, tag or commit of a hub set."""
    data_dir: str | None = None
    """Directory in which a prepared TFDS set lies."""
    schema: Literal[
        "auto", "preference", "transcripts", "sharegpt", "alpaca", "openai", "prompt_answer", "messages", "text"
    ] = "auto"
    """Layout of the rows; auto tells it from the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, this program's column name to the file's: {prompt: question}."""
    weight: float | None = None
    """Share of the pairs drawn from this set; give it to every set or to none."""
    limit: int | None = None
    """Take only the first rows."""

    def __post_init__(self):
        require(
            self.weight is None or 0 < self.weight < float("inf"), "weight", self.weight, "a positive number is needed"
        )
        require(self.limit is None or self.limit > 0, "limit", self.limit, "a positive number is needed")


@dataclass(frozen=True, kw_only=True)
class FatesConfig:
    """What becomes of a row that is not right. Every such row is counted by its cause."""

    missing_field: Literal["drop", "error"] = "error"
    """A field is absent, null or not text."""
    empty_answer: Literal["drop", "error"] = "drop"
    """An answer without a token."""
    empty_prompt: Literal["drop", "error"] = "drop"
    """A prompt without a token, from a tokenizer that adds none."""
    equal_answers: Literal["drop", "keep", "error"] = "drop"
    """Both answers are the same tokens: the pair says nothing."""
    prompts_differ: Literal["drop", "error"] = "drop"
    """Chosen and rejected are whole conversations with different prompts."""
    template_not_prefix: Literal["repair", "drop", "error"] = "repair"
    """The rendered prompt is no prefix of the rendered conversation; repair: the answer starts where they part."""
    template_refused: Literal["drop", "error"] = "error"
    """The chat template raises an error, as some do at a system turn."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """Prompt and answer are longer than max_length."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from."""

    train: tuple[SourceConfig, ...]
    """Sets to train on."""
    eval: dict[str, SourceConfig] = field(default_factory=dict)
    """Sets to evaluate on, by name."""
    eval_fraction: float = 0.0
    """Share of the training rows held out as the evaluation set `held_out`."""
    max_length: int = 1024
    """Most tokens of a prompt and one of its answers."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """keep_start cuts the answer's end (a prompt that leaves no room is dropped); keep_end cuts the prompt's start."""
    shuffle: bool = True
    """Draw in an order made from run.seed; False: in file order."""
    chat_template: str | None = None
    """File with a Jinja chat template, in place of the tokenizer's own."""
    append_eos: bool = True
    """End each plain-text answer with the end-of-sequence token; chat templates say it themselves."""
    fates: FatesConfig = field(default_factory=FatesConfig)
    """What becomes of rows that are not right."""
    store: str | None = None
    """Folder for tokenised data and cached log-probs; default: `store` in the run's parent folder."""
    workers: int | None = None
    """Processes that tokenise; default: one a core."""

    def __post_init__(self):
        require(len(self.train) > 0, "data.train", self.train, "name at least one set")
        weighted = [source.weight is not None for source in self.train]
        require(all(weighted) or not any(weighted), "data.train", [source.weight for source in self.train],
                "give every set a weight, or none")  # fmt: skip
        require(0 <= self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "it lies in [0, 1)")
        require(self.max_length >= 2, "data.max_length", self.max_length, "a prompt and an answer need 2 tokens")
        require("held_out" not in self.eval or self.eval_fraction == 0, "data.eval", "held_out",
                "that is the name of the rows that eval_fraction holds out; choose another")  # fmt: skip
        require(self.workers is None or self.workers > 0, "data.workers", self.workers, "a positive number is needed")


LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "dpop", "simpo", "orpo", "cpo", "sft",
]  # fmt: skip
NO_REFERENCE = frozenset({"simpo", "orpo", "cpo", "sft"})  # losses of the policy alone
SORTED = frozenset({"aot", "aot_unpaired"})  # the pairs of a step are sorted
COUPLED = SORTED | {"sft"}  # the loss of a pair depends on the other pairs of its step
OF_MARGIN = frozenset({"sigmoid", "hinge", "exo_pair", "robust", "discopop"})  # of beta * (f(s_w) - f(s_l)) alone
PER_TOKEN = frozenset({"sigmoid_norm", "simpo", "orpo", "cpo", "sft"})  # log-probs are divided by lengths; ipo may
LOSS_OPTIONS: dict[str, frozenset[str]] = {  # losses that have an option; for all others it must keep its default
    "label_smoothing": frozenset({"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}),
    "ipo_average": frozenset({"ipo"}),
    "discopop_tau": frozenset({"discopop"}),
    "dpop_lambda": frozenset({"dpop"}),
    "simpo_gamma": frozenset({"simpo"}),
    "cpo_weight": frozenset({"cpo"}),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective; see docs/objectives.md for equations, papers and when to use which."""

    type: LossType | None = None
    """The loss; default: sigmoid, which is DPO. Several at once: types."""
    types: tuple[LossType, ...] = ()
    """Several losses of the same pairs, added; [sigmoid, sft] is RPO, [sigmoid, bco_pair, sft] is MPO."""
    weights: tuple[float, ...] = ()
    """Weight of each of types; default: 1 each."""
    beta: float = 0.1
    """Weight of the KL term; larger keeps the policy closer to the reference. Of orpo: weight of the odds ratio."""
    label_smoothing: float = 0.0
    """Chance that a label is wrong: sigmoid (cDPO), robust, aot, aot_unpaired; exo_pair needs it above 0."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """Divergence from the reference that the loss stands for; reverse_kl is DPO's own."""
    f_alpha: float = 0.5
    """Coefficient of f_divergence alpha; towards 1 it becomes reverse_kl."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens of the longer answer beyond the length of the shorter; null: 1, all count alike."""
    weighting: Literal["none", "wpo"] = "none"
    """wpo: each pair weighs as much as the policy would have written its answers."""
    wpo_gradient: bool = False
    """Let the gradient through the weights of wpo; False: they are constants, as in TRL 1.16."""
    reference_free: bool = False
    """Take the reference's log-probs as 0 in a loss that has one."""
    ipo_average: bool = True
    """Log-ratios of ipo are means over tokens; False: sums, as in the first code of its authors."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixture."""
    dpop_lambda: float = 50.0
    """Weight of dpop's penalty on a chosen answer that falls below the reference."""
    simpo_gamma: float = 0.5
    """Margin that simpo asks for, in units of its reward."""
    cpo_weight: float = 1.0
    """Weight of cpo's likelihood of the chosen answer, the mean over its tokens."""

    def __post_init__(self):
        if self.type is None and not self.types:
            object.__setattr__(self, "type", "sigmoid")
        require(self.type is None or not self.types, "loss.types", self.types,
                f"loss.type {self.type} is given too; keep one")  # fmt: skip
        require(len(set(self.types)) == len(self.types), "loss.types", self.types, "name each loss once")
        require(not self.weights or len(self.weights) == len(self.types), "loss.weights", self.weights,
                f"give one for each of loss.types, {len(self.types)}")  # fmt: skip
        require(all(0 < weight < float("inf") for weight in self.weights), "loss.weights", self.weights,
                "positive numbers are needed")  # fmt: skip
        require(0 < self.beta < float("inf"), "loss.beta", self.beta, "it must be positive")
        require(-float("inf") < self.f_alpha < float("inf"), "loss.f_alpha", self.f_alpha, "a number is needed")
        require(0 <= self.label_smoothing < 0.5, "loss.label_smoothing", self.label_smoothing, "it lies in [0, 0.5)")
        require(0 < self.discopop_tau < 1, "loss.discopop_tau", self.discopop_tau, "it lies in (0, 1)")
        require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "loss.ld_alpha", self.ld_alpha, "it lies in [0, 1]")
        for option in ("dpop_lambda", "simpo_gamma", "cpo_weight"):
            value = getattr(self, option)
            require(0 <= value < float("inf"), f"loss.{option}", value, "it cannot be negative or infinite")
        self._refuse_combinations()

    def _refuse_combinations(self) -> None:
        names = {name for name, _ in self.terms}
        listed = ", ".join(sorted(names))
        for option, owners in LOSS_OPTIONS.items():
            value, default = getattr(self, option), type(self).__dataclass_fields__[option].default
            require(value == default or bool(names & owners), f"loss.{option}", value,
                    f"{listed} has no such option; leave it at {default}")  # fmt: skip
        require("exo_pair" not in names or self.label_smoothing > 0, "loss.label_smoothing", self.label_smoothing,
                "exo_pair is infinite at 0; try 0.001")  # fmt: skip
        divergent = sorted(names - OF_MARGIN)
        require(self.f_divergence == "reverse_kl" or not divergent, "loss.f_divergence", self.f_divergence,
                f"it is defined for {', '.join(sorted(OF_MARGIN))}, not for {', '.join(divergent)}")  # fmt: skip
        require(self.f_alpha == 0.5 or self.f_divergence == "alpha", "loss.f_alpha", self.f_alpha,
                f"f_divergence {self.f_divergence} has no coefficient; leave it at 0.5")  # fmt: skip
        divided = sorted(names & (PER_TOKEN | ({"ipo"} if self.ipo_average else set())))
        require(self.ld_alpha is None or not divided, "loss.ld_alpha", self.ld_alpha,
                f"{', '.join(divided)} divides by the lengths already; use null")  # fmt: skip
        coupled = sorted(names & COUPLED)
        require(self.weighting == "none" or not coupled, "loss.weighting", self.weighting,
                f"{', '.join(coupled)} has no loss of a pair by itself; use none")  # fmt: skip
        require(not self.wpo_gradient or self.weighting == "wpo", "loss.wpo_gradient", self.wpo_gradient,
                f"weighting {self.weighting} has no weights; use false")  # fmt: skip
        require(not self.reference_free or bool(names - NO_REFERENCE), "loss.reference_free", self.reference_free,
                f"{listed} has no reference anyway; use false")  # fmt: skip
        require(not self.reference_free or "dpop" not in names, "loss.reference_free", self.reference_free,
                "dpop is a penalty on falling below the reference; use false")  # fmt: skip

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """Name and weight of each loss that is added."""
        if self.type is not None:
            return ((self.type, 1.0),)
        return tuple(zip(self.types, self.weights or (1.0,) * len(self.types), strict=True))

    @property
    def coupled(self) -> bool:
        """The loss of a pair depends on the other pairs of its step."""
        return any(name in COUPLED for name, _ in self.terms)

    @property
    def needs_reference(self) -> bool:
        """One of the losses compares with a reference."""
        return not self.reference_free and any(name not in NO_REFERENCE for name, _ in self.terms)


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
    """Parts in which the step is computed, one after another; the result does not depend on it."""
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
    """Where metrics go besides metrics.jsonl."""
    progress: bool = True
    """Show a live progress line."""
    profile_steps: tuple[int, ...] = ()
    """First and last step to trace into folder `profile`, for XProf or Perfetto, such as [10, 12]; this is slow."""
    compiler_flags: dict[str, str] = field(default_factory=dict)
    """XLA options of the train step, by name, beside or in place of those that the program sets on TPUs; an empty value
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
    """Best saves kept besides, by best_metric."""
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


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """A run of Direct Preference Optimization."""

    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self):
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
            self._refuse_beside_adapters()

    def _refuse_beside_adapters(self) -> None:
        own = "with lora.rank the reference is the model without its adapters"
        require(self.reference.path is None, "reference.path", self.reference.path, f"{own}; leave it out")
        require(self.reference.dtype == "auto", "reference.dtype", self.reference.dtype,
                f"{own}, in its type; use auto")  # fmt: skip
        require(self.reference.sync_every == 0, "reference.sync_every", self.reference.sync_every,
                f"{own}, which no adapter can be mixed into; use 0")  # fmt: skip
        require(self.reference.mode != "live" or self.loss.needs_reference, "reference.mode", "live",
                f"{own}, and loss {', '.join(name for name, _ in self.loss.terms)} compares with none; use auto"
                )  # fmt: skip

    @property
    def reference_mode(self) -> Literal["live", "cached", "none"]:
        """How the reference is held, with auto settled."""
        if self.reference.mode != "auto":
            return self.reference.mode
        return "live" if self.loss.needs_reference else "none"


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """A run of supervised fine-tuning."""

    batch: SFTBatchConfig = field(default_factory=SFTBatchConfig)
