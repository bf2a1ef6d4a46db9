"""Options of the data: where it lies, how invalid rows are handled, how it is cut."""

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from dpo_jax.config.section import Section, ranged
from dpo_jax.errors import require

TEMPLATE_DATE = "2024-07-26"  # the one that Llama 3.1's template falls back to


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One set of examples."""

    path: str
    """File (.json, .jsonl, .csv, also compressed as .gz, .bz2 or .zst; .parquet), folder, hub name, or tfds:NAME."""
    split: str = "train"
    """Split of a hub, disk or TFDS set."""
    name: str | None = None
    """Configuration name of a hub set."""
    revision: str | None = None
    """Branch, tag or commit of a hub set."""
    data_dir: str | None = None
    """Directory in which a prepared TFDS set lies."""
    schema: Literal[
        "auto", "preference", "transcripts", "implicit_prompt", "sharegpt", "alpaca", "openai", "prompt_answer",
        "messages", "text",
    ] = "auto"  # fmt: skip
    """Layout of the rows; auto infers it from the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, this program's column name to the file's: {prompt: question}."""
    weight: float | None = ranged(None, above=0)
    """Share of the pairs drawn from this set; give it to every set or to none."""
    limit: int | None = ranged(None, above=0)
    """Take only the first rows."""


@dataclass(frozen=True, kw_only=True)
class InvalidRowsConfig(Section):
    """How invalid rows are handled. Every such row is counted by its cause."""

    section = "data.invalid_rows"

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
    """The chat template fails, as some do at a system turn, or does not end."""
    message_not_rendered: Literal["drop", "error"] = "error"
    """The chat template leaves out a message, such as one of a role that it does not know, or a tool call."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """Prompt and answer are longer than max_length."""


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What is learned from."""

    section = "data"

    train: tuple[SourceConfig, ...]
    """Sets to train on."""
    eval: dict[str, SourceConfig] = field(default_factory=dict)
    """Sets to evaluate on, by name."""
    eval_fraction: float = ranged(0.0, at_least=0, below=1)
    """Share of the training rows held out as the evaluation set `held_out`."""
    max_length: int = ranged(1024, at_least=2)
    """Most tokens of a prompt and one of its answers."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """keep_start cuts the answer's end (a prompt that leaves no room is dropped); keep_end cuts the prompt's start."""
    shuffle: bool = True
    """Draw in an order made from run.seed; False: in file order."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's, or the name of one of the tokenizer's."""
    template_date: str = TEMPLATE_DATE
    """Date, YYYY-MM-DD, that chat templates get in place of today's: Llama 3's write it into the system turn."""
    append_eos: bool = True
    """End each plain-text answer with the end-of-sequence token; chat templates say it themselves."""
    invalid_rows: InvalidRowsConfig = field(default_factory=InvalidRowsConfig)
    """How invalid rows are handled."""
    store: str | None = None
    """Folder for tokenised data and cached log-probs; default: `store` in the run's parent folder."""
    workers: int | None = ranged(None, above=0)
    """Processes that tokenise; default: one a core."""

    def __post_init__(self):
        super().__post_init__()
        self.refuse("train", not self.train, "name at least one set")
        weights = [source.weight for source in self.train]
        weighted = [weight is not None for weight in weights]
        require(all(weighted) or not any(weighted), "data.train", weights, "give every set a weight, or none")
        only = "this is the only set, so all pairs are drawn from it; leave it out"
        require(len(weights) > 1 or not any(weighted), "data.train.0.weight", weights[0], only)
        for name, source in self.eval.items():
            remedy = "each pair of an evaluation set counts once; leave it out"
            require(source.weight is None, f"data.eval.{name}.weight", source.weight, remedy)
        taken = "held_out" in self.eval and self.eval_fraction > 0
        require(not taken, "data.eval", "held_out", "eval_fraction holds out rows under this name; choose another")
        self.refuse("template_date", not _is_date(self.template_date), "give a date as YYYY-MM-DD")
        too_long = self.invalid_rows.too_long
        why = f"data.invalid_rows.too_long is {too_long}, so nothing is cut"
        self.refuse_idle("truncation", too_long != "truncate", why)
