"""The page of a comparison of methods with the exact optimum, from the results that ``compare.json`` holds."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from dpo_jax.reports.charts import Frontier, draw_frontier, draw_proxy, figure, reliability
from dpo_jax.reports.html import heading, page, paragraph, table

Row = Mapping[str, Any]

INTRODUCTION = """Every method starts from the same supervised policy, its reference; those that learn from preferences
have the same pairs of the reference's answers, whose labels are drawn from Bradley-Terry of the rule. Rewards are the
rule's own, KL is KL(policy || reference), and both are exact. Beta is also the KL coefficient of PPO and RLOO, and the
number at each point. Share is a method's gain in reward as a part of the largest gain that any policy has at its KL. A
table can hold the optimum, so what a method misses there is its own; the decoder is a small language model."""
RANKING_NOTE = """Labels right: of the held-out pairs' noisy labels; a ranker that knows the rule can do no better than
the first row. As the rule: pairs ranked as the rule ranks them, ties of the rule aside. The calibration error compares
the probability that a margin stands for with how often the label agrees."""
PROXY_NOTE = """Both rewards of the answers sampled in training, as means over seeds; the learned one is shifted to the
rule's mean at the first step. Where the learned reward rises and the rule's does not, the policy exploits what the
reward model does not know."""
BILL_NOTE = """Updates are those of the policy. CPU seconds are those of all seeds, and of compiling their one program.
Memory is that of the compiled program: its inputs, outputs and temporary arrays. Every method that says reward model
also needs one trained: {updates} updates, {seconds:.0f} + {compile:.0f} CPU seconds. Best of n samples n answers for
each that it gives, whenever it answers."""
DRIFT_NOTE = """Length is in courses, entropy in nats, and ended the share of answers that end with the end token; all
are exact. Displaced is the share of held-out chosen answers, which are the reference's, that became less likely; change
is that of their log-prob. A policy that concentrates on the best answers displaces others that are good."""
TWIST_NOTE = """The last two rows of the tables train on pairs of a policy that serves no guest a course that the guest
likes, so no pair says anything of the answers that the optimum gives. From these pairs neither DPO nor a reward model
can learn what guests like; methods that ask the rule about their own answers need no such pairs."""


def comparison_page(results: Row) -> str:
    """Return the page."""
    table_results, decoder = results["experiments"]
    return page(
        "From preferences to a policy",
        f"{results['seeds']} seeds on the inn, a task whose {results['answers']:,} answers are all enumerated",
        [
            paragraph(INTRODUCTION),
            heading("Reward against KL", frontier_figure(results["experiments"])),
            heading("What each reached: the decoder", reached_table(decoder), paragraph(TWIST_NOTE)),
            heading("What each reached: the table", reached_table(table_results)),
            heading("Learned rewards on held-out pairs", *ranking_section(results["rankings"])),
            heading("Learned against true reward", proxy_figure(results["proxy"])),
            heading("The bill", *bill_section(results, decoder["rows"])),
            heading("Drift", drift_table(decoder), paragraph(DRIFT_NOTE)),
            heading("The same guests, answered by each", texts_table(results["texts"])),
        ],
    )


def frontier_figure(experiments: list[Row]) -> str:
    """Return the picture: a panel for each kind of policy."""
    panels = {f"policy: a {each['title']}": frontier_of(each) for each in experiments}
    note = "The line is the largest reward that any policy has at a KL: that of reference exp(reward / beta) / Z."
    return figure("Frontier", note, partial(draw_frontier, panels))


def frontier_of(experiment: Row) -> Frontier:
    """Return the curve and the points of one kind of policy."""
    points: dict[str, list[tuple[float, float, str]]] = {"Reference": [(0.0, experiment["reference"]["reward"], "")]}
    best_of = [(each["kl"], each["reward"], str(each["n"])) for each in experiment["best_of"]]
    points["Best of n by the rule"] = best_of
    for row in experiment["rows"]:
        points.setdefault(row["name"], []).append((row["kl"], row["reward"], _beta(row)))
    return Frontier(experiment["optimum"], points)


def reached_table(experiment: Row) -> str:
    """Return the table of what each method reached."""
    rows = [
        (
            row["name"],
            _beta(row),
            f"{row['reward']:.3f}",
            f"{row['kl']:.3f}",
            "" if row["optimum_kl"] is None else f"{row['optimum_kl']:.3f}",
            f"{row['share']:.3f}",
            f"{row['spread']:.3f}",
        )
        for row in experiment["rows"]
    ]
    reference = ("Reference", "", f"{experiment['reference']['reward']:.3f}", "0.000", "", "", "")
    best = [
        (
            f"Best of {each['n']} by the rule",
            "",
            f"{each['reward']:.3f}",
            f"{each['kl']:.3f}",
            "",
            f"{each['share']:.3f}",
            "",
        )
        for each in experiment["best_of"]
    ]
    head = ("Method", "beta", "reward", "KL, nats", "optimum's KL", "share", "spread")
    return table(head, [reference, *best, *rows])


def ranking_section(rankings: Mapping[str, Row]) -> Iterator[str]:
    """Yield the table of how learned rewards rank held-out pairs, and their reliability diagrams."""
    rows = [
        (name, f"{row['labels']:.1%}", f"{row['rule']:.1%}", f"{row['calibration']['ece']:.3f}")
        for name, row in rankings.items()
    ]
    yield table(("Reward", "labels right", "as the rule", "calibration error"), rows)
    yield paragraph(RANKING_NOTE)
    yield reliability([{"set": name, "calibration": row["calibration"]} for name, row in rankings.items()])


def proxy_figure(proxy: Mapping[str, Any]) -> str:
    """Return the chart of learned and true reward along training."""
    return figure("Over-optimization", PROXY_NOTE, partial(draw_proxy, proxy))


def bill_section(results: Row, rows: list[Row]) -> Iterator[str]:
    """Yield the table of what each method took, and its explanation."""
    bill = [
        (
            row["name"],
            _beta(row),
            row["models"],
            f"{row['pairs']:,}",
            f"{row['sampled']:,}",
            f"{row['updates']:,}",
            f"{row['seconds']:.0f} + {row['compile_seconds']:.0f}",
            f"{row['num_bytes'] / 2**20:.1f}",
            ", ".join(row["options"]),
        )
        for row in rows
    ]
    head = ("Method", "beta", "models", "pairs", "sampled", "updates", "CPU seconds", "MiB", "options to set")
    yield table(head, bill)
    cost = results["reward_model"]
    note = BILL_NOTE.format(updates=cost["updates"], seconds=cost["seconds"], compile=cost["compile_seconds"])
    rate = f" The learning rate of methods on pairs, {results['learning_rate']:g}, was chosen by DPO on another seed."
    yield paragraph(note + rate)


def drift_table(experiment: Row) -> str:
    """Return the table of how far each policy moved from its reference."""
    reference = experiment["reference"]
    rows = [("Reference", "", *_drift(reference), "", "")]
    rows += [
        (row["name"], _beta(row), *_drift(row), f"{row['displaced']:.1%}", f"{row['chosen_change']:+.2f}")
        for row in experiment["rows"]
    ]
    return table(("Method", "beta", "length", "entropy", "ended", "displaced", "change"), rows)


def texts_table(texts: Row) -> str:
    """Return the table of answers to the same guests."""
    head = ("Method", *(f"{guest}, who likes {' and '.join(liked)}" for guest, liked in texts["guests"].items()))
    rows = [(name, *(f"{text} ({reward:g})" for text, reward in row)) for name, row in texts["rows"].items()]
    return table(head, rows)


def _beta(row: Row) -> str:
    return "" if row["beta"] is None else f"{row['beta']:g}"


def _drift(row: Row) -> tuple[str, ...]:
    return f"{row['length']:.2f}", f"{row['entropy']:.2f}", f"{row['ended']:.1%}"
