"""Sampled answers of a run as HTML: each prompt with the compared model's answer and the policy's first and last."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dpo_jax.reports.html import details, number, paragraph

MAX_SHOWN = 12  # prompts of each set that are shown, at most
MAX_PROMPT = 300  # characters; a longer one is folded
Row = Mapping[str, Any]  # a line of samples.jsonl


def samples(rows: Sequence[Row]) -> str:
    """Return HTML of the answers at the first and the newest evaluation; an empty string if there are none."""
    if not rows:
        return ""
    newest_step = rows[-1]["step"]
    first_of_prompt: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        first_of_prompt.setdefault(_prompt_of(row), row)
    last_rows = [row for row in rows if row["step"] == newest_step]
    shown_rows = [
        row for name in dict.fromkeys(row["set"] for row in last_rows) for row in _of_set(last_rows, name)[:MAX_SHOWN]
    ]
    note = f"The first {len(shown_rows)} of {len(last_rows)} prompts; samples.jsonl has all."
    notes = [paragraph(note)] if len(shown_rows) < len(last_rows) else []
    cards = [
        answer_card(
            f"{row['set']} · row {row['row']}", row["prompt"].strip(), columns(first_of_prompt[_prompt_of(row)], row)
        )
        for row in shown_rows
    ]
    return "\n".join([*notes, *cards])


def _prompt_of(row: Row) -> tuple[str, str, int]:
    return row["set"], row["source"], row["row"]


def _of_set(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["set"] == name]


def answer_card(label: str, prompt: str, answers: Sequence[tuple[str, str]]) -> str:
    """Return HTML of a prompt and of answers to it, each with a title, side by side; a long prompt is folded."""
    answers_html = "".join(
        f'<div><div class="soft">{escape(title)}</div><div class="text">{escape(text) or "·"}</div></div>'
        for title, text in answers
    )
    is_long = len(prompt) > MAX_PROMPT
    prompt_html = details("Prompt", prompt) if is_long else f'<div class="text"><b>{escape(prompt)}</b></div>'
    return (
        f'<div class="card pair"><div class="soft">{escape(label)}</div>'
        f'{prompt_html}<div class="answers three">{answers_html}</div></div>\n'
    )


def columns(first: Row, last: Row) -> list[tuple[str, str]]:
    """Return titles and answers to one prompt; the policy's first answer shares the compared model's title if equal."""
    baseline = next(name for name in ("reference", "start") if name in last)
    if "policy" not in last:  # a reward model, which scores answers that stay the same
        scores = ", ".join(f"{number(row[baseline]['score'])} at step {row['step']}" for row in (first, last))
        return [(f"{baseline}, score {scores}{cut_note(last[baseline])}", last[baseline]["text"].strip())]
    answers = [(baseline, last[baseline])]
    first_title, last_title = (f"policy at step {row['step']}" for row in (first, last))
    if first["policy"]["text"] == last[baseline]["text"]:
        answers = [(f"{baseline}, and {first_title}", last[baseline])]
    elif first["step"] < last["step"]:
        answers.append((first_title, first["policy"]))
    answers.append((last_title, last["policy"]))
    return [(title + _facts(answer), answer["text"].strip()) for title, answer in answers]


def _facts(answer: Row) -> str:
    score = f", score {number(answer['score'])}" if "score" in answer else ""
    return score + cut_note(answer)


def cut_note(answer: Row) -> str:
    """Return a note on an answer that reached the maximum length, else an empty string."""
    return f", cut at {answer['num_tokens']} tokens" * (answer["finish_reason"] == "length")
