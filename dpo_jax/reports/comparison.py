"""The page of a comparison of methods, from its results: on the task with a known optimum, or on a user's own model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_jax.reports.charts import Frontier, draw_frontier, draw_proxy, figure, reliability
from dpo_jax.reports.html import heading, number, page, paragraph, table
from dpo_jax.reports.samples import answer_card, cut_note

Row = Mapping[str, Any]
Columns = Mapping[str, tuple[str, str]]  # heading -> key of a row, and how its value is formatted
BETA_COLUMN = {"beta": ("beta", "g")}
BEST_BY_RULE, BEST_BY_JUDGE = "Best of n by the rule", "Best of n by the judge"
RESULT_COLUMNS = BETA_COLUMN | {
    "reward": ("reward", ".3f"),
    "KL, nats": ("kl", ".3f"),
    "optimum's KL": ("optimum_kl", ".3f"),
    "share": ("share", ".3f"),
    "spread": ("spread", ".3f"),
}
COST_COLUMNS = BETA_COLUMN | {
    "models": ("models", ""),
    "pairs": ("pairs", ",.0f"),
    "sampled": ("sampled", ",.0f"),
    "updates": ("updates", ",.0f"),
}
EXACT_COST_COLUMNS = COST_COLUMNS | {"CPU seconds": ("cpu", ""), "MiB": ("mib", ".1f"), "options to set": ("named", "")}
DRIFT_COLUMNS = BETA_COLUMN | {
    "length": ("length", ".2f"),
    "entropy": ("entropy", ".2f"),
    "ended": ("ended", ".1%"),
    "displaced": ("displaced", ".1%"),
    "change": ("chosen_change", "+.2f"),
}
RANK_COLUMNS = {"labels right": ("labels", ".1%"), "as the rule": ("rule", ".1%"), "calibration error": ("ece", ".3f")}
JUDGED_COLUMNS = BETA_COLUMN | {
    "score": ("reward", ".4g"),
    "score ± s.e.": ("error", ".2g"),
    "KL, nats": ("kl", ".3f"),
    "KL ± s.e.": ("kl_error", ".2g"),
    "win rate": ("win_rate", ".1%"),
    "length": ("length", ".1f"),
    "ended": ("ended", ".1%"),
    "spread": ("spread", ".2g"),
}
MAX_SHOWN = 8  # prompts whose answers a page shows

FRONTIER_NOTE = "The line is the largest reward that any policy has at a KL: that of reference exp(reward / beta) / Z."
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
COST_NOTE = """Updates are those of the policy. CPU seconds are those of all seeds, and of compiling their one program.
Memory is that of the compiled program: its inputs, outputs and temporary arrays. Every method that says reward model
also needs one trained: {updates} updates, {seconds:.0f} + {compile:.0f} CPU seconds. Best of n samples n answers for
each that it gives, whenever it answers."""
DRIFT_NOTE = """Length is in courses, entropy in nats, and ended the share of answers that end with the end token; all
are exact. Displaced is the share of held-out chosen answers, which are the reference's, that became less likely; change
is that of their log-prob. A policy that concentrates on the best answers displaces others that are good."""
PAIRS_NOTE = """The last two rows of the tables train on pairs of a policy that serves no guest a course that the guest
likes, so no pair says anything of the answers that the optimum gives. From these pairs neither DPO nor a reward model
can learn what guests like; methods that ask the rule about their own answers need no such pairs."""


def comparison_page(results: Row) -> str:
    """Return the page of the comparison whose optimum is known exactly."""
    table_results, decoder = results["experiments"]
    panels = {f"policy: a {each['title']}": each for each in (table_results, decoder)}
    tables = [method_table(methods_of(each, BEST_BY_RULE), RESULT_COLUMNS) for each in (decoder, table_results)]
    return page(
        "From preferences to a policy",
        f"{results['seeds']} seeds on the inn, a task whose {results['answers']:,} answers are all enumerated",
        [
            paragraph(INTRODUCTION),
            heading("Reward against KL", frontier_figure(panels, FRONTIER_NOTE, BEST_BY_RULE)),
            heading("What each reached: the decoder", tables[0], paragraph(PAIRS_NOTE)),
            heading("What each reached: the table", tables[1]),
            heading("Learned rewards on held-out pairs", *ranking_section(results["rankings"], RANKING_NOTE)),
            heading("Learned against true reward", proxy_figure(results["proxy"])),
            heading("Costs", *cost_section(results, decoder["rows"])),
            heading("Drift", method_table(methods_of(decoder), DRIFT_COLUMNS), paragraph(DRIFT_NOTE)),
            heading("The same guests, answered by each", texts_table(results["texts"])),
        ],
    )


def frontier_figure(experiments: Mapping[str, Row], note: str, best_title: str) -> str:
    """Return HTML of the chart of rewards against KL, with a panel for each experiment, by title."""
    panels = {title: frontier_of(each, best_title) for title, each in experiments.items()}
    return figure("Frontier", note, draw_frontier(panels))


def frontier_of(experiment: Row, best_title: str) -> Frontier:
    """Return the optimum's curve and the methods' points of one experiment."""
    points: dict[str, list[tuple[float, float, str]]] = {"Reference": [(0.0, experiment["reference"]["reward"], "")]}
    best_of = [(each["kl"], each["reward"], str(each["n"])) for each in experiment["best_of"]]
    points |= {best_title: best_of} if best_of else {}
    for row in experiment["rows"]:
        beta = "" if row["beta"] is None else f"{row['beta']:g}"
        points.setdefault(row["name"], []).append((row["kl"], row["reward"], beta))
    return Frontier(experiment["optimum"], points)


def methods_of(experiment: Row, best_title: str = "") -> list[Row]:
    """Return the rows of the reference, of the best of n answers if ``best_title`` is set, and of each method."""
    best_rows = [
        {"name": best_title.replace(" n ", f" {each['n']} "), "beta": None, **each} for each in experiment["best_of"]
    ]
    reference = {"name": "Reference", "beta": None, **experiment["reference"]}
    return [reference, *(best_rows if best_title else []), *experiment["rows"]]


def method_table(rows: Sequence[Row], columns: Columns, subject: str = "Method") -> str:
    """Return a table of the rows, with their names under ``subject``, without columns that are empty in all rows."""
    columns = {title: each for title, each in columns.items() if any(row.get(each[0]) is not None for row in rows)}

    def cell(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = [[cell(row.get(key), form) for key, form in columns.values()] for row in rows]
    return table((subject, *columns), [(row["name"], *each) for row, each in zip(rows, cells, strict=True)])


def ranking_section(rankings: Mapping[str, Row], note: str) -> Iterator[str]:
    """Yield the table of how learned rewards rank held-out pairs, and their reliability diagrams, if there are any."""
    if not rankings:
        return
    rows = [{"name": name, **row, "ece": row["calibration"]["ece"]} for name, row in rankings.items()]
    yield method_table(rows, RANK_COLUMNS, "Reward")
    yield paragraph(note)
    yield reliability([{"set": name, "calibration": row["calibration"]} for name, row in rankings.items()])


def proxy_figure(proxy: Mapping[str, Any]) -> str:
    """Return HTML of the chart of learned and true rewards over the steps of training."""
    return figure("Over-optimization", PROXY_NOTE, draw_proxy(proxy))


def cost_section(results: Row, rows: list[Row]) -> Iterator[str]:
    """Yield the table of each method's costs, and its explanation."""
    seconds = [f"{row['seconds']:.0f} + {row['compile_seconds']:.0f}" for row in rows]
    table_rows = [
        {**row, "cpu": text, "mib": row["num_bytes"] / 2**20, "named": ", ".join(row["options"])}
        for row, text in zip(rows, seconds, strict=True)
    ]
    yield method_table(table_rows, EXACT_COST_COLUMNS)
    cost = results["reward_model"]
    note = COST_NOTE.format(updates=cost["updates"], seconds=cost["seconds"], compile=cost["compile_seconds"])
    rate = f" The learning rate of methods on pairs, {results['learning_rate']:g}, was chosen by DPO on another seed."
    yield paragraph(note + rate)


def texts_table(texts: Row) -> str:
    """Return the table of each method's answers to the same guests."""
    head = ("Method", *(f"{guest}, who likes {' and '.join(liked)}" for guest, liked in texts["guests"].items()))
    rows = [(name, *(f"{text} ({reward:g})" for text, reward in row)) for name, row in texts["rows"].items()]
    return table(head, rows)


# The page of a comparison on a user's own model.

MODEL_INTRODUCTION = """Every method starts from the same model, the reference, and learns from the same pairs or the
prompts of these pairs. Each trained policy then answers the same {prompts} held-out prompts once, with the same
sampling keys, and the judge, {judge}, scores the answers. KL is log(policy / reference) of these answers, so it is an
estimate; standard errors are over prompts. The number at each point is beta: loss.beta, or the KL coefficient of a
policy gradient."""
BEST_NOTE = """The KL of the best of n answers is the bound log(n) - (n - 1) / n; ties make it smaller."""
JUDGED_NOTE = """Score, KL, length in tokens, and the share of answers that end with an end token are means over prompts
and seeds; spread is the range of the seeds' scores. Win rate: answers that score higher than the reference's answer to
the same prompt; ties count half."""
MODEL_RANKING_NOTE = """Labels right: held-out pairs whose chosen answer has the higher reward, as a mean over seeds;
ties count as wrong. The calibration error compares the probability that a margin stands for with how often the label
agrees; it and the diagrams are those of the first seed. The implicit reward is beta log(policy / reference)."""
MODEL_LEARNED_NOTE = """The learned reward, which was trained on, and the judge's score, of the answers of the reference
(before) and of the policy (after). A learned score that rises more than the judge's, or a correlation over prompts that
falls, is what over-optimization looks like; scales and offsets of the two scores differ."""
MODEL_COST_NOTE = """Pairs are those of the training set, for methods that learn from their labels; sampled counts the
tokens of answers sampled in training. Seconds are those of training steps, with compilation, without evaluations.
Peak memory is that of the fullest device, or on CPUs of the process; both only grow from one method to the next, so
they are an upper bound for a method that needs less than an earlier one. Options are those of the objective and the
optimizer that are not at their defaults. With adapters, policy, reference and value share one copy of the base weights.
All figures are means over seeds."""
LEARNED_COLUMNS = BETA_COLUMN | {
    "learned, before": ("learned_before", ".4g"),
    "learned, after": ("learned_after", ".4g"),
    "judge, before": ("judge_before", ".4g"),
    "judge, after": ("judge_after", ".4g"),
    "correlation, before": ("correlation_before", ".2f"),
    "correlation, after": ("correlation_after", ".2f"),
}
MODEL_COST_COLUMNS = COST_COLUMNS | {
    "seconds": ("seconds", ",.0f"),
    "peak GiB": ("gib", ".2f"),
    "options": ("named", ""),
}


def model_comparison_page(results: Row) -> str:
    """Return the page of a comparison on a user's own model."""
    experiment, num_prompts = results["experiment"], len(results["texts"]["prompts"])
    rows = methods_of(experiment, BEST_BY_JUDGE)
    best_note = [paragraph(BEST_NOTE)] if experiment["best_of"] else []
    chart = frontier_figure({results["model"]: experiment}, "", BEST_BY_JUDGE)
    return page(
        "From preferences to a policy",
        f"{results['model']} · {results['seeds']} seed{'s' * (results['seeds'] > 1)} of each method",
        [
            paragraph(MODEL_INTRODUCTION.format(prompts=num_prompts, judge=results["judge"])),
            heading("Score against KL", chart),
            heading("What each reached", method_table(rows, JUDGED_COLUMNS), paragraph(JUDGED_NOTE), *best_note),
            heading("Rewards on held-out pairs", *ranking_section(results["rankings"], MODEL_RANKING_NOTE)),
            heading("Learned reward against judge", *learned_section(results["learned"])),
            heading("Costs", *model_cost_section(results)),
            heading("The same prompts, answered by each", *answer_cards(results["texts"])),
        ],
    )


def learned_section(learned: Sequence[Row]) -> list[str]:
    """Return the table of learned and judged scores before and after training, if a method has both."""
    rows = [
        {"name": row["name"], "beta": row["beta"]}
        | {f"{score}_{when}": row[when][score] for when in ("before", "after") for score in row[when]}
        for row in learned
    ]
    return [method_table(rows, LEARNED_COLUMNS), paragraph(MODEL_LEARNED_NOTE)] if rows else []


def model_cost_section(results: Row) -> list[str]:
    """Return the table of each method's costs; the reward model has a row of its own."""
    rows = [row | {"named": ", ".join(row["options"])} for row in results["experiment"]["rows"]]
    if results["reward_model"] is not None:
        rows = [{"name": "Reward model", "models": "reward", **results["reward_model"]}, *rows]
    return [method_table(rows, MODEL_COST_COLUMNS), paragraph(MODEL_COST_NOTE)]


def answer_cards(texts: Row) -> Iterator[str]:
    """Yield a card for each of the first prompts, with the answer of each method's first seed."""
    for i, prompt in enumerate(texts["prompts"][:MAX_SHOWN]):
        answers = [
            (f"{name}, score {number(rows[i]['score'])}{cut_note(rows[i])}", rows[i]["text"].strip())
            for name, rows in texts["answers"].items()
        ]
        yield answer_card(f"row {prompt['row']}", prompt["prompt"].strip(), answers)
