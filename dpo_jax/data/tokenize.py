"""Examples -> token ids: chat template, boundary of prompt and answer, special tokens, truncation."""

from dataclasses import dataclass

from dpo_jax.data.records import Problem


@dataclass(frozen=True)
class TokenizedExample:
    """One example in tokens; `prompt + answers[k]` is what the model reads.

    `targets` tells which tokens of `answers[0]` are learned (SFT on conversations; None: all). `notes` are repairs,
    truncations and the like, to be counted.
    """

    row: int
    prompt: list[int]
    answers: tuple[list[int], ...]
    targets: list[bool] | None
    weight: float
    notes: tuple[Problem, ...] = ()
