"""HTML page that colors answer tokens by their contribution to the reward, for pairs with extreme margins."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dpo_jax.reports.html import details, heading, number, page, paragraph

NEWLINE = "\n"
MAX_SHOWN = 20  # pairs with the largest margins, and as many with the smallest
LEVELS = 8  # of color intensity
FULL_QUANTILE = 0.98  # quantile of sizes that gets the full color, so that one outlier does not pale the others

CSS = """
.text span { border-radius: 3px; }
""" + "".join(
    f".{sign}{level} {{ background: rgba({color}, {0.75 * level / LEVELS:.2f}); }}\n"
    for sign, color in (("p", "59, 110, 235"), ("n", "225, 60, 50"))
    for level in range(1, LEVELS + 1)
)


def token_page(lines: Sequence[Mapping[str, Any]], beta: float, policy: str) -> str:
    """Return a self-contained HTML page of token rewards; ``lines`` are those of ``dpo-jax eval --per-token``.

    The page shows the pairs with the largest and the smallest margins, or all pairs if there are no more than that.
    """
    margin_of = lambda line: -math.inf if math.isnan(line["rewards/margin"]) else line["rewards/margin"]  # noqa: E731
    by_margin = sorted(lines, key=margin_of, reverse=True)
    groups = {"All pairs, by margin": by_margin}
    if len(by_margin) > 2 * MAX_SHOWN:
        groups = {
            "The largest margins": by_margin[:MAX_SHOWN],
            "The smallest margins": by_margin[: -MAX_SHOWN - 1 : -1],
        }
    full_gain = saturation([line for group in groups.values() for line in group], beta)
    blocks = [heading(title, *(_pair(line, beta, full_gain) for line in group)) for title, group in groups.items()]
    legend = (
        f"An answer's reward is beta = {beta:g} times the sum of log(policy / reference) over its tokens. Blue tokens "
        f"raise it and red tokens lower it, in full color from {number(full_gain)}; hover over a token for its value. "
        "A dot stands for a token that is only part of a character."
    )
    return page("Rewards token by token", f"{policy} · {len(lines)} pairs", [paragraph(legend), *blocks], CSS)


def saturation(lines: Iterable[Mapping[str, Any]], beta: float) -> float:
    """Return the contribution at which a token gets the full color, or the smallest positive number if all are 0."""
    sizes = sorted(
        abs(beta * ratio)
        for line in lines
        for answer in ("chosen", "rejected")
        for ratio in line[f"log_ratios/{answer}"]
        if math.isfinite(ratio)
    )
    return max(sizes[int(FULL_QUANTILE * (len(sizes) - 1))] if sizes else 0.0, math.ulp(0.0))


def _pair(line: Mapping[str, Any], beta: float, full: float) -> str:
    title = f"Margin {number(line['rewards/margin'])}"
    origin = f"{line['set']} · {line['source']}, row {line['row']}"
    answers_html = "".join(
        f'<div><div class="soft">{answer}: reward {number(line[f"rewards/{answer}"])}, '
        f"{line[f'tokens/{answer}']} tokens</div>"
        f'<div class="text">{colored(line[f"pieces/{answer}"], line[f"log_ratios/{answer}"], beta, full)}</div></div>'
        for answer in ("chosen", "rejected")
    )
    return (
        f'<div class="card pair"><h3>{escape(title)} <span class="soft">{escape(origin)}</span></h3>'
        f'{details("Prompt", line["prompt"])}<div class="answers">{answers_html}</div></div>\n'
    )


def colored(pieces: Iterable[str], log_ratios: Iterable[float], beta: float, full: float) -> str:
    """Return an answer's tokens as HTML, each colored by its contribution to the reward."""
    spans = []
    for piece, ratio in zip(pieces, log_ratios, strict=True):
        gain = beta * ratio
        level = math.ceil(LEVELS * min(1.0, abs(gain) / full)) if math.isfinite(gain) else LEVELS
        shade = f' class="{"p" if gain > 0 else "n"}{level}"' if level else ""
        spans.append(f'<span{shade} title="{gain:+.4g}">{escape(piece or "·").replace(NEWLINE, "↵" + NEWLINE)}</span>')
    return "".join(spans)
