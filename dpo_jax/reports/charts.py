"""Plots of logged values, as curves and histograms: SVG in HTML, in the colors of the page."""

import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

Row = Mapping[str, Any]  # a line of a log


@dataclass(frozen=True)
class Plot:
    """A plot of logged values by step."""

    title: str
    keys: tuple[str, ...]
    note: str
    log: bool = False
    share: bool = False  # values lie between 0 and 1
    change: bool = False  # evaluations minus the first one; no training curve, since its pairs differ by step


# CSS variable of html.py -> placeholder color, which `_svg` replaces by the variable
LINES = ("accent", "purple", "gold", "cyan", "red", "olive")
COLORS = {name: f"#0000{number:02x}" for number, name in enumerate(("ink", "line", "good", "bad", *LINES), 1)}
NAMES = {color: name for name, color in COLORS.items()}
INK = COLORS["ink"]
ANSWERS = {"chosen": COLORS["good"], "rejected": COLORS["bad"]}  # other curves take the next color of LINES
MAX_BINS = 1000  # of a longer curve
MAX_RAW_POINTS = 60  # longer training curves are drawn as a running mean over pale raw values


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one logged key; infinite values, which cannot be drawn, become NaN."""
    points = [(row["step"], float(row[key])) for row in rows if key in row]
    return [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]


def eval_sets(rows: Sequence[Row]) -> list[str]:
    """Return the evaluation sets' names: NAME in ``eval_NAME_loss`` or, for sampled answers, ``eval_NAME_score``."""
    keys = dict.fromkeys(key for row in rows for key in row)
    names = (re.fullmatch(r"eval_(.+)_(loss|score)", key) for key in keys)
    return [name[1] for name in names if name is not None]


def plots(chosen_plots: Iterable[Plot], rows: Sequence[Row]) -> str:
    """Return HTML of a grid of plots with training and evaluation curves; plots without logged values are omitted."""
    figures = []
    names = eval_sets(rows)
    for plot in chosen_plots:
        curves = [] if plot.change else [(key, "", *series(rows, key)) for key in plot.keys]
        curves += [(key, name, *series(rows, f"eval_{name}_{key}")) for name in names for key in plot.keys]
        curves = [curve for curve in curves if curve[2]]
        if plot.change:
            curves = [(key, name, steps, [y - values[0] for y in values]) for key, name, steps, values in curves]
        if curves:
            figures.append(figure(plot.title, plot.note, draw(plot, curves)))
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


Curve = tuple[str, str, list[int], list[float]]  # key, evaluation set or "" for training, steps, values


def figure(title: str, note: str, svg: str) -> str:
    """Return HTML of a drawing with title and note."""
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return f"<figure><h3>{escape(title)}</h3><figcaption>{escape(note)}</figcaption>{named}</figure>\n"


def draw(plot: Plot, curves: Sequence[Curve]) -> str:
    """Return a plot as SVG; evaluation curves are dashed and have dots."""
    from matplotlib.ticker import LogFormatter

    palette = iter(LINES)
    fig, (axes,) = _canvas(1)
    for key, name, steps, values in curves:
        branch = key.rpartition("/")[2]
        color = ANSWERS[branch] if branch in ANSWERS else COLORS[next(palette, "ink")]
        words = filter(None, (name or "training", branch if len(plot.keys) > 1 else ""))
        label = "." + " ".join(words)  # leading dot, removed below: matplotlib hides labels that start with _
        if name:
            marker_style = {"linestyle": "--", "marker": "o", "markersize": 5, "markeredgecolor": "none"}
            axes.plot(steps, values, color=color, label=label, linewidth=1.2, zorder=3, **marker_style)
        elif len(steps) > MAX_RAW_POINTS:
            axes.plot(*envelope(steps, values), color=color, alpha=0.25, linewidth=0.8)
            middles, means = binned(steps, values)
            axes.plot(middles, running_mean(means, len(means) // 20), color=color, label=label, linewidth=1.8)
        else:
            axes.plot(steps, values, color=color, label=label, linewidth=1.6)
    if plot.log and all(value > 0 for *_, values in curves for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    if plot.share:
        axes.set_ylim(-0.03, 1.03)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _style(axes, "step")
    if len(curves) > 1:
        legend = axes.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=min(len(curves), 2))
        for text in legend.get_texts():
            text.set(text=text.get_text().removeprefix("."), parse_math=False)
    return _svg(fig)


def _canvas(panels: int, size: tuple[float, float] = (6.2, 3.1)) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    fig = FigureCanvasSVG(Figure(figsize=size, layout="constrained")).figure
    return fig, fig.subplots(1, panels, sharex=True, squeeze=False)[0]


def _style(axes: Any, x_label: str) -> None:
    axes.set_xlabel(x_label, color=INK)
    axes.tick_params(which="both", colors=INK, length=0)
    axes.grid(color=COLORS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _svg(fig: Any) -> str:
    """Return a figure as SVG that takes fonts and colors from the page, without what the page does not need."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpo_jax"}):
        fig.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<style.*?</style>|<!--.*?-->|\n\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used_ids = set(re.findall(r"#(\w+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used_ids else "", svg)
    svg = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg
    )  # two decimals of a point suffice
    return re.sub("|".join(NAMES), lambda match: f"var(--{NAMES[match[0]]})", svg)


def _bins(size: int) -> list[slice]:
    """Split ``size`` points into at most ``MAX_BINS`` runs of neighbors, of equal size except for the last."""
    width = -(-size // MAX_BINS)
    return [slice(start, start + width) for start in range(0, size, width)]


def binned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return mean step and mean value of each bin of a curve, ignoring NaN."""
    bins = _bins(len(values))
    return [statistics.fmean(steps[part]) for part in bins], [_mean(values[part]) for part in bins]


def envelope(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return the steps and values of each bin's smallest and largest value, in the order of the steps.

    Drawn, they look like all points: a bin is narrower than a pixel or two.
    """
    kept = []
    for part in _bins(len(values)):
        points = [(value, index) for index, value in enumerate(values[part], part.start) if not math.isnan(value)]
        kept += sorted({min(points)[1], max(points)[1]}) if points else [part.start]
    return [steps[index] for index in kept], [values[index] for index in kept]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return, for each value, the mean over a window centered on it, ignoring NaN."""
    reach = window // 2
    return [_mean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    """Return the mean, ignoring NaN, or NaN if there are no other values."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def histograms(rows: Sequence[Row]) -> str:
    """Return HTML of each set's margin and reward histograms at its first and last evaluation."""
    figures = []
    for name in dict.fromkeys(row["set"] for row in rows):
        set_rows = [row for row in rows if row["set"] == name]
        shown_rows = set_rows if len(set_rows) == 1 else [set_rows[0], set_rows[-1]]
        margins = [(row["step"], row["margins"]["edges"], {"margin": row["margins"]["counts"]}) for row in shown_rows]
        counts = [{answer: row["rewards"][answer] for answer in ("chosen", "rejected")} for row in shown_rows]
        rewards = [(row["step"], row["rewards"]["edges"], both) for row, both in zip(shown_rows, counts, strict=True)]
        note = "Pairs by margin. Left of 0 the rejected answer is preferred."
        figures.append(figure(f"{name}: margins", note, draw_histograms(margins)))
        figures.append(figure(f"{name}: rewards", "Answers by reward.", draw_histograms(rewards)))
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def reliability(rows: Sequence[Row]) -> str:
    """Return HTML of reliability diagrams: accuracy against confidence, at each set's last evaluation."""
    explanation = "On the dotted line accuracy equals confidence; below it the rewards are overconfident."
    figures = []
    for name, row in {row["set"]: row for row in rows}.items():
        calibrations = {"implicit reward": row["calibration"]}
        note = f"Expected calibration error {row['calibration']['ece']:.3f}"
        if "reward_model" in row:
            calibrations["reward model"] = row["reward_model"]["calibration"]
            note += f" (implicit reward) and {calibrations['reward model']['ece']:.3f} (reward model)"
        bins = {label: values["bins"] for label, values in calibrations.items()}
        figures.append(figure(f"{name}: calibration", f"{note}. {explanation}", draw_reliability(bins)))
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def draw_reliability(bins_of: Mapping[str, Sequence[Row]]) -> str:
    """Draw a reliability diagram as SVG: one dot for each bin of confidence, its area by the number of pairs.

    ``bins_of``: the bins of each reward, by name.
    """
    fig, (axes,) = _canvas(1)
    axes.plot((0.5, 1), (0.5, 1), color=INK, linewidth=0.8, linestyle=":")
    for (name, bins), color in zip(bins_of.items(), LINES, strict=False):
        areas = [20 + 300 * row["pairs"] / sum(other["pairs"] for other in bins) for row in bins]
        confidence, accuracy = ([row[key] for row in bins] for key in ("confidence", "accuracy"))
        axes.scatter(confidence, accuracy, s=areas, color=COLORS[color], alpha=0.8, linewidths=0, label=name)
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("accuracy", color=INK)
    _style(axes, "confidence")
    if len(bins_of) > 1:
        for handle in axes.legend(frameon=False, labelcolor=INK, fontsize=9).legend_handles:
            handle.set_sizes([60])
    return _svg(fig)


class Frontier(NamedTuple):
    """KL and expected reward of each method's policies, and the curve of the optimal policies."""

    optimum: Sequence[tuple[float, float]]  # a curve; empty if it is not known
    points: Mapping[str, Sequence[tuple[float, float, str]]]  # of each method, with a label


def draw_frontier(panels: Mapping[str, Frontier]) -> str:
    """Draw rewards against KLs as SVG, one panel for each title; a method has the same marker and color in all."""
    fig, panel_axes = _canvas(len(panels), (11.0, 5.8))
    palette = [COLORS[name] for name in ("ink", "good", "bad", *LINES)]
    names = list(dict.fromkeys(name for frontier in panels.values() for name in frontier.points))
    for number, (axes, (title, frontier)) in enumerate(zip(panel_axes, panels.items(), strict=True)):
        if frontier.optimum:
            axes.plot(*zip(*frontier.optimum, strict=True), color=INK, linewidth=1.2)
        for name, points in frontier.points.items():
            index = names.index(name)
            color = palette[index % len(palette)]
            style = {"marker": "osD^vPX*h<>p"[index % 12], "facecolor": (color, 0.3), "edgecolor": color}
            label = name if all(name not in drawn.points for drawn in list(panels.values())[:number]) else None
            coordinates = zip(*((kl, reward) for kl, reward, _ in points), strict=True)
            axes.scatter(*coordinates, s=48, linewidths=1.2, zorder=3, label=label, **style)
            for kl, reward, text in points:
                offset = {"xytext": (5, -9), "textcoords": "offset points", "fontsize": 7, "color": INK}
                axes.annotate(text, (kl, reward), **offset)
        axes.set_title(title, color=INK, fontsize=10)
        axes.set_ylabel("expected reward", color=INK)
        _style(axes, "KL(policy || reference), nats")
    fig.legend(frameon=False, labelcolor=INK, fontsize=8.5, loc="outside lower center", ncols=4)
    return _svg(fig)


def draw_proxy(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Draw rewards over the steps of training as SVG: a panel for each method, a line for each reward."""
    fig, panel_axes = _canvas(len(curves), (11.0, 3.6))
    for axes, (title, lines) in zip(panel_axes, curves.items(), strict=True):
        for (name, values), color in zip(lines.items(), LINES, strict=False):
            axes.plot(values, color=COLORS[color], label=name, linewidth=1.6)
        axes.set_title(title.replace(", ", ",\n"), color=INK, fontsize=10)
        _style(axes, "step")
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return _svg(fig)


def draw_histograms(panels: Sequence[tuple[int, Sequence[float], Mapping[str, Sequence[int]]]]) -> str:
    """Return SVG of histograms with a shared x-axis, one panel for each (step, edges, counts by name)."""
    fig, panel_axes = _canvas(len(panels))
    for axes, (step, edges, counts) in zip(panel_axes, panels, strict=True):
        for branch, heights in counts.items():
            color = ANSWERS.get(branch, COLORS[LINES[0]])
            # the outline keeps narrow bins visible when the other panel's range is wide
            style = {"facecolor": (color, 0.45), "edgecolor": color, "linewidth": 1.2}
            axes.stairs(heights, edges, fill=True, label=branch, **style)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.locator_params(axis="x", nbins=5)
        _style(axes, f"step {step}")
        if len(counts) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return _svg(fig)
