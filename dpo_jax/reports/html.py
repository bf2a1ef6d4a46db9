"""HTML building blocks for report pages, made from plain text, and their style sheet."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #1f2430; --soft: #616a7a; --page: #f6f7f9; --card: #ffffff; --line: #e3e6ec;
  --good: #12805c; --bad: #c2410c; --accent: #2f5fd0; --purple: #a21caf; --gold: #b7791f; --cyan: #0e7490;
  --red: #be123c; --olive: #4d7c0f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a1b2; --page: #13161b; --card: #1b1f27;
  --line: #2e343f; --good: #4ade9f; --bad: #fb923c; --accent: #7aa2ff; --purple: #e879f9; --gold: #facc5c;
  --cyan: #5fd4e8; --red: #fb7185; --olive: #a3e635; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0 0 12px; max-width: 76ch; }
.soft, figcaption { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 14px;
  margin-top: 24px; }
.card, figure, .box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 18px; }
.card .name { color: var(--soft); font-size: 13px; }
.card .value { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card .value .from { color: var(--soft); font-weight: 400; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 16px; }
.plots + .plots { margin-top: 16px; }
figure { margin: 0; padding: 14px 16px 8px; }
figcaption { font-size: 13px; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: inherit !important; }
main > figure { overflow-x: auto; }
main > figure svg { min-width: 720px; }
.box { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 16px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px; }
tbody th { font-weight: 500; }
td.right { color: var(--good); }
td.right::after { content: " ✓"; white-space: nowrap; }
.box + p { margin-top: 10px; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; }
summary { cursor: pointer; color: var(--accent); margin-top: 14px; }
details pre { margin-top: 10px; }
.pair { padding: 14px 18px; margin-bottom: 16px; }
.pair h3 { margin-bottom: 6px; }
.pair details { margin-bottom: 10px; }
.pair summary { margin-top: 0; }
.pair pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 18px; }
.answers.three { grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); margin-top: 8px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
"""


def page(title: str, subtitle: str, sections: Iterable[str], css: str = "") -> str:
    """Return an HTML document with the given sections of HTML; ``css`` extends the default style sheet."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{css}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def heading(title: str, *content: str) -> str:
    """Return a section with a heading, or an empty string if it has no content."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(content) if any(content) else ""


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def cards(values: Mapping[str, tuple[str | None, str]]) -> str:
    """Return cards of headline numbers; ``values`` maps each name to (value before or None, value after)."""
    cells_html = "".join(
        f'<div class="card"><div class="name">{escape(name)}</div><div class="value">'
        + ("" if before is None else f'<span class="from">{escape(before)} → </span>')
        + f"{escape(after)}</div></div>"
        for name, (before, after) in values.items()
    )
    return f'<div class="cards">{cells_html}</div>' if cells_html else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], checked: frozenset[tuple[int, int]] = frozenset()) -> str:
    """Return a table with row names in the first column; the cells (row, column) in ``checked`` get a check mark.

    An empty ``head`` leaves out the header row; without rows there is no table.
    """

    def cell(text: str, position: tuple[int, int]) -> str:
        return f'<td class="right">{escape(text)}</td>' if position in checked else f"<td>{escape(text)}</td>"

    body_html = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(cell(text, (number, column)) for column, text in enumerate(values, 1))
        + "</tr>"
        for number, (first, *values) in enumerate(rows)
    )
    header_html = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    header_html = f"<thead><tr>{header_html}</tr></thead>" if header_html else ""
    return f'<div class="box"><table>{header_html}<tbody>{body_html}</tbody></table></div>' if body_html else ""


def details(title: str, text: str) -> str:
    """Return collapsible preformatted text under a title."""
    return f'<details><summary>{escape(title)}</summary><pre class="box">{escape(text)}</pre></details>'


def code(text: str) -> str:
    """Return a block of preformatted text."""
    return f'<pre class="box">{escape(text)}</pre>'


def number(value: float) -> str:
    """Format a number with about four significant digits."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}" if abs(value) >= 1 else f"{value:.4f}"
    return f"{value:.3g}"
