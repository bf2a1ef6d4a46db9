"""Options of the data: its sources, how invalid rows are handled, and how examples are truncated."""

from dataclasses import dataclass, field
from datetime import date
from typing import ClassVar, Literal

from dpo_jax.config.section import Section, ranged
from dpo_jax.errors import require

TEMPLATE_DATE = "2024-07-26"  # the fallback date of Llama 3.1's template


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """A data set and how its rows are read."""

    path: str
    """File (.json, .jsonl, .csv, also as .gz, .bz2 or .zst; .parquet) or folder, local or gs://..., hub name, or
    tfds:NAME."""
    split: str = "train"
    """Split of a hub, disk or TFDS data set."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    data_dir: str | None = None
    """Directory of a prepared TFDS data set."""
    schema: Literal[
        "auto", "preference", "transcripts", "implicit_prompt", "sharegpt", "alpaca", "openai", "prompt_answer",
        "messages", "text", "prompt",
    ] = "auto"  # fmt: skip
    """Layout of the rows; auto: inferred from the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renamed columns, from this program's name to the file's: {prompt: question}."""
    weight: float | None = ranged(None, above=0)
    """Relative weight of this data set in the training mixture; give one to every data set or to none."""
    limit: int | None = ranged(None, above=0)
    """Maximum number of rows, from the start."""


@dataclass(frozen=True, kw_only=True)
class InvalidRowsConfig(Section, name="data.invalid_rows"):
    """How invalid rows are handled, by cause; the rows of each cause are counted."""

    missing_field: Literal["drop", "error"] = "error"
    """A field is missing, null or not a string."""
    empty_answer: Literal["drop", "error"] = "drop"
    """An answer has no tokens."""
    empty_prompt: Literal["drop", "error"] = "drop"
    """A prompt has no tokens, not even a BOS token."""
    equal_answers: Literal["drop", "keep", "error"] = "drop"
    """Both answers have the same tokens, so the pair teaches nothing."""
    prompts_differ: Literal["drop", "error"] = "drop"
    """Chosen and rejected are whole conversations with different prompts."""
    template_not_prefix: Literal["repair", "drop", "error"] = "repair"
    """The rendered prompt is not a prefix of the rendered conversation; repair: the answer starts where they
    diverge."""
    template_refused: Literal["drop", "error"] = "error"
    """The chat template fails, as some do on a system turn, or does not terminate."""
    message_not_rendered: Literal["drop", "error"] = "error"
    """The chat template omits a message, such as a tool call or one with a role that it does not know."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """Prompt and answer exceed max_length."""


def is_date(text: str) -> bool:
    """Return whether a text is a valid date in the form YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, name="data"):
    """The training and evaluation data."""

    online: ClassVar[None] = None  # answers are in the data

    train: tuple[SourceConfig, ...]
    """Data sets to train on."""
    eval: dict[str, SourceConfig] = field(default_factory=dict)
    """Data sets to evaluate on, by name."""
    eval_fraction: float = ranged(0.0, at_least=0, below=1)
    """Share of the training rows held out as the evaluation set `held_out`."""
    max_length: int = ranged(1024, at_least=2)
    """Maximum number of tokens in a prompt plus one of its answers."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """keep_start cuts the end of the answer (a prompt that leaves no room is dropped); keep_end, the start of the
    prompt."""
    shuffle: bool = True
    """Draw in an order derived from run.seed; false: in file order."""
    chat_template: str | None = None
    """Jinja chat template to use instead of the tokenizer's default: a file, local or gs://..., or the name of one of
    its templates."""
    template_date: str = TEMPLATE_DATE
    """Date, YYYY-MM-DD, given to chat templates instead of today's; Llama 3's write it into the system turn."""
    append_eos: bool = True
    """End each plain-text answer with the end-of-sequence token; chat templates write their own."""
    invalid_rows: InvalidRowsConfig = field(default_factory=InvalidRowsConfig)
    """How invalid rows are handled."""
    store: str | None = None
    """Local folder for tokenized data and cached log-probs; default: `store` next to the run, or in the machine's cache
    for a run in a bucket."""
    workers: int | None = ranged(None, above=0)
    """Processes that tokenize; default: one per core."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse("train", not self.train, "give at least one data set")
        weights = [source.weight for source in self.train]
        has_weight = [weight is not None for weight in weights]
        require(all(has_weight) or not any(has_weight), "data.train", weights, "give every data set a weight, or none")
        remedy = "with a single data set a weight has no effect; remove it"
        require(len(weights) > 1 or not any(has_weight), "data.train.0.weight", weights[0], remedy)
        for name, source in self.eval.items():
            remedy = "each pair of an evaluation set counts once; remove the weight"
            require(source.weight is None, f"data.eval.{name}.weight", source.weight, remedy)
        is_taken = "held_out" in self.eval and self.eval_fraction > 0
        require(not is_taken, "data.eval", "held_out", "eval_fraction's held-out rows have this name; choose another")
        self.refuse("template_date", not is_date(self.template_date), "give a date as YYYY-MM-DD")
        action = self.invalid_rows.too_long
        self.refuse_idle("truncation", action != "truncate", f"data.invalid_rows.too_long is {action}")
