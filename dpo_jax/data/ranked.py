"""Make training rows from the scored answers to each prompt: pairs for DPO, or best answers for fine-tuning."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
Ranking = Literal["best-worst", "best"]


class NoPair(Exception):
    """Raised for a prompt without a training row; the text completes "prompts skipped: 3 with ..."."""


@dataclass
class Ranked:
    """Training rows, and the number of prompts that gave none, by cause."""

    rows: list[Row] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # prompts without a row, by cause
    num_cut: int = 0  # rows whose best answer was cut at the maximum length

    @property
    def summary(self) -> str:
        """The number of rows, and of prompts that gave none, by cause."""
        causes = ", ".join(f"{count} with {cause}" for cause, count in sorted(self.skipped.items()))
        return f"{len(self.rows)} rows" + (f"; prompts skipped: {causes}" if causes else "")


def rank(rows: Iterable[Row], pairs: Ranking) -> Ranked:
    """Make training rows from the rows that ``dpo-jax generate`` writes; answers without text are left out.

    best-worst: rows of the schema `preference`; best: rows of the schema `prompt_answer`.
    """
    result = Ranked()
    for row in rows:
        answers = [answer for answer in row["answers"] if answer["text"].strip()]
        answers.sort(key=lambda answer: -answer["score"])  # stable: of equal scores, the first answer comes first
        try:
            result.rows.append(_prompt_columns(row) | _RANKINGS[pairs](row, answers))
            result.num_cut += answers[0]["finish_reason"] == "length"
        except NoPair as cause:
            result.skipped[str(cause)] += 1
    return result


def _best_and_worst(row: Row, answers: list[Row]) -> Row:
    if len(answers) < 2:
        raise NoPair("fewer than two non-blank answers")
    best, worst = answers[0], answers[-1]
    if best["text"] == worst["text"]:
        raise NoPair("equal best and worst answers")
    if best["score"] == worst["score"]:
        raise NoPair("equal scores for all answers")
    texts = {"chosen": _as_answer(row, best), "rejected": _as_answer(row, worst)}
    return texts | {"chosen_score": best["score"], "rejected_score": worst["score"]}


def _best(row: Row, answers: list[Row]) -> Row:
    if not answers:
        raise NoPair("no non-blank answer")
    return {"answer": _as_answer(row, answers[0]), "score": answers[0]["score"]}


_RANKINGS: dict[Ranking, Callable[[Row, list[Row]], Row]] = {"best-worst": _best_and_worst, "best": _best}


def _prompt_columns(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("row", "answers")}


def _as_answer(row: Row, answer: Row) -> str | list[Row]:
    """Return an answer in the form of its prompt: text, or a list of one message."""
    return answer["text"] if isinstance(row["prompt"], str) else [{"role": "assistant", "content": answer["text"]}]
