"""Make rows that training reads of the scored answers to each prompt: pairs for DPO, best answers for fine-tuning."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
Pairs = Literal["best-worst", "best"]


class NoPair(Exception):
    """Raised for a prompt whose answers make no row; the text says which prompts these are."""


@dataclass
class Ranked:
    """Rows for training, and what became of the other prompts."""

    rows: list[Row] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # prompts without a row, by cause
    num_cut: int = 0  # rows whose best answer was cut at the maximum length


def rank(rows: Iterable[Row], pairs: Pairs) -> Ranked:
    """Rank the answers in the rows of an output of ``dpo-jax generate``; answers without text are left out.

    best-worst: rows of the schema `preference`; best: rows of the schema `prompt_answer`.
    """
    ranked = Ranked()
    for row in rows:
        answers = [answer for answer in row["answers"] if answer["text"].strip()]
        answers.sort(key=lambda answer: -answer["score"])  # stable: of equal scores, the first answer comes first
        try:
            ranked.rows.append(_prompt_columns(row) | _RANKINGS[pairs](row, answers))
            ranked.num_cut += answers[0]["finish_reason"] == "length"
        except NoPair as cause:
            ranked.skipped[str(cause)] += 1
    return ranked


def _best_and_worst(row: Row, answers: list[Row]) -> Row:
    if len(answers) < 2:
        raise NoPair("with fewer than two answers that have text")
    best, worst = answers[0], answers[-1]
    if best["text"] == worst["text"]:
        raise NoPair("with equal texts")
    if best["score"] == worst["score"]:
        raise NoPair("with equal scores")
    texts = {"chosen": _as_answer(row, best), "rejected": _as_answer(row, worst)}
    return texts | {"chosen_score": best["score"], "rejected_score": worst["score"]}


def _best(row: Row, answers: list[Row]) -> Row:
    if not answers:
        raise NoPair("without an answer that has text")
    return {"answer": _as_answer(row, answers[0]), "score": answers[0]["score"]}


_RANKINGS: dict[Pairs, Callable[[Row, list[Row]], Row]] = {"best-worst": _best_and_worst, "best": _best}


def _prompt_columns(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("row", "answers")}


def _as_answer(row: Row, answer: Row) -> str | list[Row]:
    """Return an answer as training reads it next to its prompt: as text, or as a message."""
    return answer["text"] if isinstance(row["prompt"], str) else [{"role": "assistant", "content": answer["text"]}]
