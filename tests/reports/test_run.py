"""A run's report: what it says is what the logs say, and the page stands alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batch import PairLogps, TokenStats
from dpo_jax.config import DataConfig, DPOConfig, ModelConfig, ReferenceConfig, RunConfig, SFTConfig, SourceConfig
from dpo_jax.config.file import config_to_yaml
from dpo_jax.losses import preference_metrics
from dpo_jax.reports import charts
from dpo_jax.reports.charts import (
    Plot,
    binned,
    draw,
    draw_histograms,
    envelope,
    eval_sets,
    running_mean,
    series,
)
from dpo_jax.reports.html import number, table
from dpo_jax.reports.run import PLOTS, report_done, write_report
from dpo_jax.runs.directory import append_json

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what matters."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1] += data


@pytest.fixture
def drawn():
    """For tests of pictures, which take a page longer than all else."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """For the others every picture is empty."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(charts, "_svg", lambda fig: "<svg ></svg>")


def make_run(tmp_path: Path, config: Any, metrics: Sequence[Mapping], timings: Sequence[Mapping] = ()) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config_to_yaml(config))
    for name, rows in (("metrics", metrics), ("timings", timings)):
        for row in rows:
            append_json(run / f"{name}.jsonl", row)
    return run


def dpo_config(**data: Any) -> DPOConfig:
    return DPOConfig(
        model=ModelConfig(path="models/<start> & more"),
        data=DataConfig(train=(SourceConfig(path="pairs.jsonl"),), **data),
        run=RunConfig(dir="unused", steps=80),
    )


def step_row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 0.69 - step / 200,
        "rewards/chosen": step / 100,
        "rewards/rejected": -step / 50,
        "rewards/accuracies": min(1, step / 80),
        "rewards/margins": step * 0.03,
        "grad_norm": 1 + 1 / step,
        "learning_rate": 1e-4,
        "epoch": step / 40,
        "num_tokens": 100 * step,
        "fill": 0.9,
    }


def dpo_metrics(evaluated: str = "held_out") -> list[dict[str, float]]:
    first = {f"eval_{evaluated}_loss": 0.6931, f"eval_{evaluated}_rewards/accuracies": 0.0}
    last = {f"eval_{evaluated}_loss": 0.25, f"eval_{evaluated}_rewards/accuracies": 0.9375}
    return [{"step": 0, **first}, *(step_row(step) for step in range(1, 81)), {"step": 80, **last}]


def timing_row(step: int) -> dict[str, float]:
    return {"step": step, "step_seconds": 9.0 if step == 1 else 0.5, "pairs_per_second": 16.0,
            "tokens_per_second": 800.0, "data_wait_seconds": 0.02, "host_memory_gib": 0.5 + step / 100}  # fmt: skip


def test_the_use_of_a_known_chip_is_told(tmp_path):
    timings = [timing_row(step) | {"mfu": 0.001 if step == 1 else 0.4375} for step in range(1, 5)]
    text = write_report(make_run(tmp_path, dpo_config(), dpo_metrics(), timings)).read_text()
    cells = Page(text).cells
    assert cells[cells.index("Of the chips' peak") + 1] == "43.8% (MFU on real tokens, median)"
    assert "<h3>Model FLOPs utilization</h3>" in text


def test_a_dpo_run_is_told_whole(tmp_path):
    run = make_run(tmp_path, dpo_config(), dpo_metrics(), [timing_row(step) for step in range(1, 81)])
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert '<span class="from">0.0000 → </span>0.9375' in text
    rows = dict(zip(page.cells, page.cells[1:], strict=False))
    assert page.cells[page.cells.index("held_out: loss") :][1:4] == ["0.6931", "0.2500", "0.2500 at step 80"]
    assert rows["Length"] == "80 steps, 2.000 epochs, 8,000 tokens"
    assert rows["First step"] == "9.0 s, including compilation"
    assert rows["Later steps"] == "0.5 s, 16 pairs per second (medians)"
    assert rows["Peak memory"] == "host 1.30 GiB"
    assert rows["Waiting for data"] == "4.0% of the time"
    assert "FLOPs utilization" not in text  # of no known chip
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == ["Loss", "Reward accuracy", "Margin", "Rewards", "Gradient norm", "Learning rate",
                      "Row utilization", "Tokens per second", "Seconds per step"]  # fmt: skip


def spread_row(step: int, counts: list[int], evaluated: str = "held_out") -> dict[str, Any]:
    group = {"pairs": 8, "share": 1.0, "accuracy": step / 160, "margin": step / 32}
    return {
        "step": step, "set": evaluated, "pairs": 8, "not_finite": 0,
        "margins": {"edges": [-1.0, 0.0, 1.0], "counts": counts},
        "rewards": {"edges": [-1.0, 0.0, 1.0], "chosen": counts, "rejected": counts[::-1]},
        "by_length": [{"from": 3, "to": 9} | group], "by_longer": [{"longer": "rejected"} | group],
        "calibration": {
            "ece": 0.25, "bins": [{"from": 0.5, "to": 0.55, "pairs": 8, "confidence": 0.5, "accuracy": 0.25}],
        },
    }  # fmt: skip


def watched_rows() -> list[dict[str, Any]]:
    """As ``dpo_metrics``, with what tells how the policy moves."""
    rows: list[dict[str, Any]] = [
        row | {"displacement": 0.5, "kl": 2.0, "gradient_weight": 0.4, "clipped": int(row["step"] % 5 == 0)}
        if "grad_norm" in row
        else row | {f"eval_held_out_logps/{own}": -50.0 - row["step"] for own in ("chosen", "rejected")}
        for row in dpo_metrics()
    ]
    return rows


def test_every_evaluation_metric_is_explained_where_it_stands(tmp_path):
    pairs = PairLogps(jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2)), jnp.ones(1), jnp.ones(1, bool))
    stats = TokenStats(*(jnp.ones((1, 2)) for _ in TokenStats.__dataclass_fields__))
    logged = preference_metrics(replace(pairs, stats=stats), pairs, dpo_config().loss)
    run = make_run(tmp_path, dpo_config(), [{"step": 0} | {f"eval_a_{key}": float(logged[key]) for key in logged}])
    cells = Page(write_report(run).read_text()).cells
    unexplained = [key for key in logged if not cells[cells.index(f"a: {key}") + 4]]
    assert (unexplained, len(logged)) == ([], 15)
    kl = cells[cells.index("a: kl") + 4]
    assert kl == next(plot.note for plot in PLOTS if plot.title == "KL")


def test_clipping_of_most_steps_has_advice(tmp_path):
    rows = [step_row(step) | {"clipped": int(step > 1)} for step in range(1, 5)]
    cells = Page(write_report(make_run(tmp_path, dpo_config(), rows)).read_text()).cells
    text = cells[cells.index("Clipped") + 1]
    assert text.startswith("3 of 4 logged steps had a gradient norm above 1. Clipping is meant for spikes")
    assert "the usual norm here is 1.417 (median): set optimizer.max_grad_norm above it" in text


@pytest.mark.usefixtures("drawn")
def test_any_name_of_a_set_stands_in_its_plots(monkeypatch):
    drawn = []
    kept = charts._svg
    monkeypatch.setattr(charts, "_svg", lambda whole: drawn.append(whole) or kept(whole))
    names = ["a$b$c", "$\\frac$", r"\$a", "_hidden", "<&\"'", "100%", "{x}"]
    for name in names:
        svg = draw(Plot("", ("loss",), ""), [("loss", "", [1, 2], [1.0, 2.0]), ("loss", name, [1, 2], [1.0, 2.0])])
        assert f">{escape(name, quote=False)}</text>" in svg
    actual = [[text.get_text() for text in whole.axes[0].get_legend().get_texts()] for whole in drawn]
    assert actual == [["training", name] for name in names]


def test_a_report_that_fails_costs_the_run_a_line(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path, dpo_config(), dpo_metrics())
    (run / "report.html").mkdir()  # what is wrong outside is one line
    report_done(run, {}, progress=False)
    line = "the run is complete: run its command again to write the report\n"
    said = capsys.readouterr().err
    assert (said.count("\n"), said.startswith("report: not written ("), said.endswith(line)) == (1, True, True)
    monkeypatch.setattr(
        "dpo_jax.reports.run.headlines", lambda metrics: 1 / 0
    )  # a fault of this program shows itself whole
    report_done(run, {}, progress=False)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith(f"report: not written (ZeroDivisionError: division by zero); {line}")


def test_a_report_tells_how_the_reward_is_spread(tmp_path):
    run = make_run(tmp_path, dpo_config(), watched_rows())
    for row in (spread_row(0, [0, 8]), spread_row(40, [4, 4]), spread_row(80, [6, 2])):
        append_json(run / "distributions.jsonl", row)
    text = write_report(run).read_text()
    cells = Page(text).cells
    start = cells.index("held_out: longer answer of 3 to 9 tokens")
    assert cells[start + 1 : start + 7] == ["8", "100.0%", "0.0000", "0.5000", "0.0000", "2.500"]
    assert cells[start + 7 : start + 9] == ["held_out: rejected is longer", "8"]
    assert cells[cells.index("Clipped") + 1] == "16 of 80 logged steps had a gradient norm above 1"
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles[:6] == ["Loss", "Reward accuracy", "Margin", "Rewards", "held_out: margins", "held_out: rewards"]
    assert {"Likelihood since the start", "Displacement", "KL", "Gradient weight"} < set(titles)
    assert f"dpo-jax eval {run}/config.yaml --output {run}/pairs.jsonl --per-token</pre>" in text


def test_the_command_names_a_live_reference_where_the_run_has_none(tmp_path):
    config = replace(dpo_config(), reference=ReferenceConfig(mode="cached"))
    run = make_run(tmp_path, config, watched_rows())
    append_json(run / "distributions.jsonl", spread_row(0, [0, 8]))
    assert "--per-token --reference.mode live</pre>" in write_report(run).read_text()
    (run / "metrics.jsonl").write_text("")  # as of a loss that has no reference
    assert "--per-token" not in write_report(run).read_text()


def test_likelihood_is_shown_since_the_start_and_of_evaluations_only(monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "draw", lambda plot, curves: drawn.setdefault(plot.title, curves) and "")
    rows = [row | {"logps/chosen": -9.0} if "grad_norm" in row else row for row in watched_rows()]
    charts.plots(PLOTS, rows)
    assert drawn["Likelihood since the start"] == [
        (f"logps/{own}", "held_out", [0, 80], [0.0, -80.0]) for own in ("chosen", "rejected")
    ]
    assert len(drawn["Log-probability of the answers"]) == 3


def paths_of(svg: str, color: str) -> list[np.ndarray]:
    """The points [n, 2] of each path with a stroke of that color."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(--{color}\)', svg)
    return [np.array(re.findall(r"-?[\d.]+", d), float).reshape(-1, 2) for d in found]


@pytest.mark.usefixtures("drawn")
def test_histograms_stand_beside_each_other():
    panels = [(0, [-1.0, 0.0, 1.0], {"chosen": [0, 8]}), (80, [-1.0, 0.0, 1.0], {"chosen": [8, 0]})]
    first, second = paths_of(draw_histograms(panels), "good")
    whole, top = 446.4, min(first[:, 1])
    highest = [x[x[:, 1] == top, 0].mean() / whole for x in (first, second)]
    assert 0.25 < highest[0] < 0.5 < highest[1] < 0.75  # right of 0, then left of it


@pytest.mark.usefixtures("drawn")
def test_the_page_stands_alone_and_escapes(tmp_path):
    run = make_run(tmp_path, dpo_config(), dpo_metrics('<b>"x"'))
    append_json(run / "distributions.jsonl", spread_row(0, [0, 8], '<b>"x"'))
    text = write_report(run, {"<i>": [one_source()]}).read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "b", "i", "start"}
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "srcset", "href")]
    assert links == []
    used = {value[1:] for _, attrs in page.tags for name, value in attrs.items() if name == "xlink:href"}
    used |= set(re.findall(r"url\(#(\w+)\)", text))
    assert used
    assert used == {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert text.count("url(") == text.count("url(#")
    assert "@import" not in text
    assert "models/<start> & more" in page.cells
    assert escape('<b>"x": loss') in text


def one_source() -> dict[str, Any]:
    return {"source": "a.jsonl", "rows": 12, "kept": 9, "dropped": {"empty_answer": {"count": 3}},
            "notes": {"too_long": {"count": 2}}}  # fmt: skip


def test_data_counts_are_shown_by_cause(tmp_path):
    run = make_run(tmp_path, dpo_config(), dpo_metrics())
    cells = Page(write_report(run, {"train": [one_source()]}).read_text()).cells
    start = cells.index("train: a.jsonl")
    assert cells[start + 1 : start + 5] == ["12", "9", "empty answer: 3", "too long: 2"]


def test_a_fine_tuning_run_speaks_of_no_rewards(tmp_path):
    config = SFTConfig(model=ModelConfig(path="m"), data=DataConfig(train=(SourceConfig(path="a.jsonl"),)),
                       run=RunConfig(dir="unused"))  # fmt: skip
    metrics = [{"step": 0, "eval_dev_loss": 5.0, "eval_dev_mean_token_accuracy": 0.1}]
    metrics += [{"step": step, "loss": 5.0 / step, "mean_token_accuracy": 0.2, "grad_norm": 1.0, "epoch": 1,
                 "num_tokens": 7} for step in range(1, 4)]  # fmt: skip
    metrics += [{"step": 3, "eval_dev_loss": 1.25, "eval_dev_mean_token_accuracy": 0.5}]
    text = write_report(make_run(tmp_path, config, metrics)).read_text()
    Page(text)
    assert "Supervised fine-tuning" in text
    assert "eward" not in text
    assert '<span class="from">5.000 → </span>1.250' in text
    assert '<span class="from">0.1000 → </span>0.5000' in text


@pytest.mark.parametrize(("kl", "before"), [(0.0, "tied"), (5e-9, "tied"), (5e-5, "0.0312")], ids=str)
def test_an_accuracy_of_ties_is_called_so(tmp_path, kl, before):
    """At log-probs of 40 nats: nothing, rounding (1e-4 nats) or more than that (1e-2) between policy and reference."""
    at_start = {"rewards/accuracies": 0.03125, "kl": kl, "logps/chosen": -40.0, "logps/rejected": -30.0, "loss": 0.6931}
    metrics = [{"step": 0} | {f"eval_held_out_{key}": value for key, value in at_start.items()}, *dpo_metrics()[1:]]
    text = write_report(make_run(tmp_path, dpo_config(), metrics)).read_text()
    assert f'<span class="from">{before} → </span>0.9375' in text
    cells = Page(text).cells
    assert cells[cells.index("held_out: rewards/accuracies") :][1:3] == [before, "0.9375"]


def test_without_evaluation_the_training_itself_is_the_headline(tmp_path):
    text = write_report(make_run(tmp_path, dpo_config(), [step_row(step) for step in (1, 2)])).read_text()
    assert "training: margin" in text
    assert '<span class="from">0.0300 → </span>0.0600' in text


def test_a_run_that_logged_nothing_yet_has_a_page(tmp_path):
    Page(write_report(make_run(tmp_path, dpo_config(), [])).read_text())


@pytest.mark.usefixtures("drawn")
def test_values_without_meaning_leave_a_gap(tmp_path):
    rows = [step_row(1), step_row(2) | {"rewards/margins": float("inf"), "grad_norm": 0.0}, step_row(3)]
    run = make_run(tmp_path, dpo_config(), rows)
    Page(write_report(run).read_text())
    steps, values = series(
        [{"step": 1, "x": "Infinity"}, {"step": 2}, {"step": 3, "x": "NaN"}, {"step": 4, "x": 2}], "x"
    )
    assert steps == [1, 3, 4]
    assert np.isnan(values[:2]).all()
    assert values[2] == 2


@pytest.mark.usefixtures("drawn")
def test_curves_are_drawn_in_their_colors():
    plot = Plot("Rewards", ("rewards/chosen", "rewards/rejected"), "")
    curves = [("rewards/chosen", "", [1, 2, 3], [0.0, 1.0, 2.0]), ("rewards/rejected", "", [1, 2, 3], [0.0, -1, -2])]
    svg = draw(plot, curves)
    chosen, rejected = (paths_of(svg, color)[0] for color in ("good", "bad"))
    assert len(chosen) == len(rejected) == 3
    assert (np.diff(chosen[:, 1]) < 0).all()  # upwards: y of a picture grows downwards
    assert (np.diff(rejected[:, 1]) > 0).all()
    assert not re.findall("#[0-9a-f]{6}", svg)  # all colors are the page's


@pytest.mark.usefixtures("drawn")
def test_pictures_are_small_and_have_names(tmp_path):
    run = make_run(tmp_path, dpo_config(), dpo_metrics())
    append_json(run / "distributions.jsonl", spread_row(0, [0, 8]))
    text = write_report(run).read_text()
    assert {"Loss", "held_out: margins", "held_out: calibration"} < set(re.findall(r"<h3>(.*?)</h3>", text))
    pictures = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) == len(re.findall("<figure>", text))
    assert all('role="img" aria-label="' in picture and len(picture) < 20_000 for picture in pictures)
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))


def test_names_of_evaluation_sets_may_hold_underscores():
    rows = [{"step": 0, "eval_my_loss_set_loss": 1, "eval_my_loss_set_rewards/chosen": 0, "eval_b_loss": 1, "loss": 2}]
    assert eval_sets(rows) == ["my_loss_set", "b"]


def test_long_curves_are_drawn_as_bins(monkeypatch):
    monkeypatch.setattr(charts, "MAX_BINS", 3)
    steps, nan = [1, 2, 3, 4, 5, 6, 7], float("nan")
    values = [4.0, 9.0, 2.0, nan, 5.0, nan, nan]
    assert binned(steps, values) == ([2, 5, 7], [5.0, 5.0, pytest.approx(nan, nan_ok=True)])
    assert envelope(steps, [*values[:6], 3.0]) == ([2, 3, 5, 7], [9.0, 2.0, 5.0, 3.0])
    assert envelope([1, 2], [3.0, 1.0]) == ([1, 2], [3.0, 1.0])  # a short one is left as it is


def test_running_mean():
    assert running_mean([1.0, 2.0, 6.0, float("nan"), 4.0], 2) == [1.5, 3.0, 4.0, 5.0, 4.0]
    assert running_mean([3.0, 5.0], 0) == [3.0, 5.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0000"), (0.69314718, "0.6931"), (1.4, "1.400"), (-12.3456, "-12.35"), (5e-7, "5e-07"), (1234.5, "1234"),
     (2.5e9, "2.5e+09"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_in_four_digits(value, text):
    assert number(value) == text


def test_a_table_without_rows_is_nothing():
    assert table(("a",), []) == ""


def test_cells_are_escaped_and_the_right_ones_set_off():
    page = Page(table(("a", "b", "c"), [("<x>", "<b>", "&"), ("1", "<i>", "3")], frozenset({(1, 1)})))
    assert page.cells == ["a", "b", "c", "<x>", "<b>", "&", "1", "<i>", "3"]
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "td"] == [None, None, "right", None]


def test_sampled_answers_stand_side_by_side(tmp_path):
    run = make_run(tmp_path, dpo_config(), dpo_metrics())
    answer = lambda text, finish="stop": {"text": text, "num_tokens": 3, "finish_reason": finish}  # noqa: E731
    for step, texts in ((0, ("same", "first")), (40, ("middle", "middle")), (80, ("<b>", "last"))):
        for row, text in enumerate(texts):
            question = {"step": step, "set": "dev", "source": "pairs.jsonl", "row": row, "prompt": f"Q{row} & more"}
            append_json(
                run / "samples.jsonl", {**question, "policy": answer(text), "reference": answer("same", "length")}
            )
    text = write_report(run).read_text()
    Page(text)
    section = text[text.index("Sampled answers</h2>") : text.index("<h2>The run")]
    cells = re.findall(r'<div class="(?:soft|text)">(.*?)</div>', section)
    assert cells == [
        "dev · row 0", "<b>Q0 &amp; more</b>",
        "reference, and policy at step 0, cut at 3 tokens", "same", "policy at step 80", "&lt;b&gt;",
        "dev · row 1", "<b>Q1 &amp; more</b>",
        "reference, cut at 3 tokens", "same", "policy at step 0", "first", "policy at step 80", "last",
    ]  # fmt: skip
