"""Options of the data: where it lies, how invalid rows are handled, how it is cut."""

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from dpo_jax.errors import require

TEMPLATE_DATE = "2024-07-26"  # the one that Llama 3.1's template falls back to


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
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
class InvalidRowsConfig:
    """How invalid rows are handled. Every such row is counted by its cause."""

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
    """File with a Jinja chat template that replaces the tokenizer's, or the name of one of the tokenizer's."""
    template_date: str = TEMPLATE_DATE
    """Date, YYYY-MM-DD, that chat templates get in place of today's: Llama 3's write it into the system turn."""
    append_eos: bool = True
    """End each plain-text answer with the end-of-sequence token; chat templates say it themselves."""
    invalid_rows: InvalidRowsConfig = field(default_factory=InvalidRowsConfig)
    """How invalid rows are handled."""
    store: str | None = None
    """Folder for tokenised data and cached log-probs; default: `store` in the run's parent folder."""
    workers: int | None = None
    """Processes that tokenise; default: one a core."""

    def __post_init__(self):
        require(len(self.train) > 0, "data.train", self.train, "name at least one set")
        weighted = [source.weight is not None for source in self.train]
        require(all(weighted) or not any(weighted), "data.train", [source.weight for source in self.train],
                "give every set a weight, or none")  # fmt: skip
        require(len(self.train) > 1 or not any(weighted), "data.train.0.weight", self.train[0].weight,
                "this is the only set, so all pairs are drawn from it; leave it out")  # fmt: skip
        for name, source in self.eval.items():
            require(source.weight is None, f"data.eval.{name}.weight", source.weight,
                    "each pair of an evaluation set counts once; leave it out")  # fmt: skip
        require(0 <= self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "it lies in [0, 1)")
        require(self.max_length >= 2, "data.max_length", self.max_length, "a prompt and an answer need 2 tokens")
        require("held_out" not in self.eval or self.eval_fraction == 0, "data.eval", "held_out",
                "that is the name of the rows that eval_fraction holds out; choose another")  # fmt: skip
        require(_is_date(self.template_date), "data.template_date", self.template_date,
                "give a date as YYYY-MM-DD")  # fmt: skip
        too_long = self.invalid_rows.too_long
        require(self.truncation == "keep_start" or too_long == "truncate", "data.truncation", self.truncation,
                f"data.invalid_rows.too_long is {too_long}, so nothing is cut; leave it at keep_start")  # fmt: skip
        require(self.workers is None or self.workers > 0, "data.workers", self.workers, "a positive number is needed")
