"""A page of coloured answers: what each token adds to its answer's reward, for the pairs at both ends."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dpo_jax.reports.html import details, heading, number, page, paragraph

NEWLINE = "\n"
SHOWN = 20  # pairs of the largest margins, and as many of the smallest
LEVELS = 8  # of intensity
FULL = 0.98  # quantile of the sizes shown that has the full colour, so that a single outlier does not pale the rest

CSS = """
.pair { padding: 14px 18px; margin-bottom: 16px; }
.pair h3 { margin-bottom: 6px; }
.pair details { margin-bottom: 10px; }
.pair summary { margin-top: 0; }
.pair pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 18px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
.text span { border-radius: 3px; }
""" + "".join(
    f".{sign}{level} {{ background: rgba({color}, {0.75 * level / LEVELS:.2f}); }}\n"
    for sign, color in (("p", "59, 110, 235"), ("n", "225, 60, 50"))
    for level in range(1, LEVELS + 1)
)


def token_page(lines: Sequence[Mapping[str, Any]], beta: float, policy: str) -> str:
    """The HTML of a page from what ``dpo-jax eval --per-token`` writes, a mapping a pair; it needs no other file.

    Shown are the pairs of the largest and of the smallest margins; all, where there are no more than both.
    """
    margin_of = lambda line: -math.inf if math.isnan(line["rewards/margin"]) else line["rewards/margin"]  # noqa: E731
    ranked = sorted(lines, key=margin_of, reverse=True)
    ends = {"All pairs, by margin": ranked}
    if len(ranked) > 2 * SHOWN:
        ends = {"The largest margins": ranked[:SHOWN], "The smallest margins": ranked[: -SHOWN - 1 : -1]}
    full = full_size([line for end in ends.values() for line in end], beta)
    blocks = [heading(title, *(_pair(line, beta, full) for line in end)) for title, end in ends.items()]
    how = (
        f"An answer's reward is beta = {beta:g} times the sum of log(policy / reference) over its tokens. Blue tokens "
        f"raise it, red ones lower it; the colour is full from {number(full)} on, and the pointer shows the number. "
        "A dot stands for a token that is only a part of a character."
    )
    return page("Rewards token by token", f"{policy} · {len(lines)} pairs", [paragraph(how), *blocks], CSS)


def full_size(lines: Iterable[Mapping[str, Any]], beta: float) -> float:
    """Size of a token's part from which its colour is full; the smallest positive number when all are 0."""
    sizes = sorted(
        abs(beta * ratio)
        for line in lines
        for answer in ("chosen", "rejected")
        for ratio in line[f"log_ratios/{answer}"]
        if math.isfinite(ratio)
    )
    return max(sizes[int(FULL * (len(sizes) - 1))] if sizes else 0.0, math.ulp(0.0))


def _pair(line: Mapping[str, Any], beta: float, full: float) -> str:
    title = f"Margin {number(line['rewards/margin'])}"
    origin = f"{line['set']} · {line['source']}, row {line['row']}"
    answers = "".join(
        f'<div><div class="soft">{answer}: reward {number(line[f"rewards/{answer}"])}, '
        f"{line[f'tokens/{answer}']} tokens</div>"
        f'<div class="text">{coloured(line[f"pieces/{answer}"], line[f"log_ratios/{answer}"], beta, full)}</div></div>'
        for answer in ("chosen", "rejected")
    )
    return (
        f'<div class="card pair"><h3>{escape(title)} <span class="soft">{escape(origin)}</span></h3>'
        f'{details("Prompt", line["prompt"])}<div class="answers">{answers}</div></div>\n'
    )


def coloured(pieces: Iterable[str], log_ratios: Iterable[float], beta: float, full: float) -> str:
    """The tokens of an answer as HTML, each with its part of the reward."""
    tokens = []
    for piece, ratio in zip(pieces, log_ratios, strict=True):
        part = beta * ratio
        level = math.ceil(LEVELS * min(1.0, abs(part) / full)) if math.isfinite(part) else LEVELS
        shade = f' class="{"p" if part > 0 else "n"}{level}"' if level else ""
        tokens.append(f'<span{shade} title="{part:+.4g}">{escape(piece or "·").replace(NEWLINE, "↵" + NEWLINE)}</span>')
    return "".join(tokens)
