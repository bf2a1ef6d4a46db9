"""Report of a run: one self-contained HTML file with its curves and results.

The page has no scripts and loads nothing; each plot is an SVG in the colors of the page, light or dark.
"""

import statistics
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.config.file import load_yaml
from dpo_jax.console import say, warn
from dpo_jax.errors import reason
from dpo_jax.inference.agreement import AGREEMENT, tied
from dpo_jax.reports.charts import Plot, Row, eval_sets, histograms, plots, reliability, series
from dpo_jax.reports.html import cards, code, details, heading, number, page, paragraph, table
from dpo_jax.reports.samples import samples
from dpo_jax.runs.directory import RunDir, read_json
from dpo_jax.storage import write_atomically

PLOTS = (
    Plot("Loss", ("loss",), "The training objective."),
    Plot(
        "Reward accuracy",
        ("rewards/accuracies",),
        "Pairs whose chosen answer has the higher reward. Equal rewards count as wrong; at the start all are tied.",
        share=True,
    ),
    Plot("Margin", ("rewards/margins",), "Reward of the chosen answer minus that of the rejected one."),
    Plot("Rewards", ("rewards/chosen", "rewards/rejected"), "beta x log(policy / reference). Only their gap matters."),
    Plot(
        "Log-probability of the answers",
        ("logps/chosen", "logps/rejected"),
        "Per answer, in nats. If that of chosen answers falls far, the policy may be forgetting how to answer.",
    ),
    Plot(
        "Likelihood since the start",
        ("logps/chosen", "logps/rejected"),
        "Log-probability of the evaluation answers minus that at step 0, in nats. Below 0 they became less likely.",
        change=True,
    ),
    Plot("Displacement", ("displacement",), "Pairs whose chosen answer the reference finds likelier.", share=True),
    Plot("KL", ("kl",), "Mean of half the squared log-ratio: how far the policy has moved on these answers, in nats."),
    Plot(
        "Agreement with the reward model",
        ("reward_model/agreement",),
        "Pairs whose answers the implicit reward and the reward model rank alike; a tie counts as half.",
        share=True,
    ),
    Plot("Gradient weight", ("gradient_weight",), "Per pair: 0.5 at the start, near 0 once learned.", share=True),
    Plot(
        "Scores of sampled answers",
        ("samples/score_mean", "samples/score_std"),
        "Mean and standard deviation over answers of the model that the run starts from: where PPO would begin.",
    ),
    Plot(
        "Score",
        ("score", "score/best", "score/worst"),
        "Mean score of the sampled answers, before the KL penalty; and of the best and the worst to a prompt.",
    ),
    Plot("Win rate", ("win_rate",), "Answers that score higher than the reference's own; ties count half.", share=True),
    Plot(
        "KL of the sampled answers",
        ("sampled_kl", "sampled_kl_k3"),
        "log(policy / reference), in nats; k3 is another estimate of it, which is never negative.",
    ),
    Plot("Answer length", ("length",), "Tokens, with the end token."),
    Plot("Ended", ("ended",), "Answers that end before the maximum length.", share=True),
    Plot("Tied", ("tied",), "Prompts whose best and worst answer have the same score.", share=True),
    Plot("Explained variance", ("explained_variance",), "Of the returns, by the value model.", share=True),
    Plot("Clipped ratios", ("clip_fraction",), "Share of probability ratios outside the clip range.", share=True),
    Plot(
        "Expert load",
        ("router/max_share", "router/min_share"),
        "Largest and smallest share of a layer's routed tokens that any expert has; 1 / experts if balanced.",
        share=True,
    ),
    Plot("Load balance", ("router/entropy",), "Entropy of the experts' shares: 1 if all have the same.", share=True),
    Plot("Load-balancing loss", ("aux_loss",), "Without its coefficient; experts per token if they are balanced."),
    Plot("Token accuracy", ("mean_token_accuracy",), "Share of answer tokens that were the model's most likely token."),
    Plot("Entropy", ("entropy",), "Nats per token; near 0 the model is certain of every token."),
    Plot("Gradient norm", ("grad_norm",), "Before clipping. Rare spikes are harmless; steady growth is not.", log=True),
    Plot("Learning rate", ("learning_rate",), "As set by the schedule."),
    Plot("Row utilization", ("fill",), "Share of computed token slots that hold real tokens.", share=True),
)
MAIN_KEYS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")  # shown first
NOT_PLOTTED = {
    "max_grad_norm": "Largest gradient norm of a step's updates, before clipping.",
    "rlhf_reward": "Score of an answer minus the KL penalty of its tokens: what training maximizes.",
    "policy_loss": "Clipped surrogate, averaged over the updates of a step.",
    "value_loss": "Clipped squared error of the value model.",
    "sampler_error": "Largest relative difference of a log-prob between the sampler and the train step.",
    "mean_sampler_error": "Mean relative difference of a log-prob between the sampler and the train step.",
    "ratio_error": "Largest |log ratio| at a step's first update, relative to the log-prob: 0 but for rounding.",
    "mean_ratio_error": "Mean |log ratio| at a step's first update, relative to the log-prob: 0 but for rounding.",
    "logps/accuracies": "Pairs whose chosen answer has the higher log-probability, whatever the reference says.",
    "reward_model/accuracies": "Pairs whose chosen answer has the higher score of the reward model, which is fixed.",
    "logits/chosen": "Mean logit over the vocabulary, at the tokens of chosen answers.",
    "logits/rejected": "Mean logit over the vocabulary, at the tokens of rejected answers.",
}


VALUE_MODELS = {
    "policy": "",
    "reward": ", value model from the reward model",
    "shared": ", value head on the policy's layers",
}


def objective(config: Row) -> str:
    """Return the objective in words; empty for fine-tuning, and without beta for a reward model."""
    if "ppo" in config:
        options = config["ppo"]
        text = f"{options['estimator']}, KL coefficient {options['kl_coef']:g}, {options['epochs']} updates a step"
        return text + VALUE_MODELS[options["value_model"]]
    loss, online = config.get("loss"), config["data"].get("online")
    if loss is None:
        return ""
    if "beta" not in loss:
        return f"Bradley-Terry, centered with weight {loss['center']:g}"
    text = f"{loss['type'] or ' + '.join(loss['types'])}, beta {loss['beta']}"
    if online is not None:
        text += f", {online['labels']} labels of the best and the worst of {online['answers']} answers"
    return text


def kind(config: Row) -> str:
    """Return what was trained, in words."""
    if "ppo" in config:
        return "Policy gradient"
    if "loss" not in config:
        return "Supervised fine-tuning"
    if "beta" not in config["loss"]:
        return "Reward model"
    return "Direct Preference Optimization" if config["data"].get("online") is None else "Online DPO"


MEANINGS = {key: plot.note for plot in reversed(PLOTS) for key in plot.keys} | NOT_PLOTTED
SPEED_PLOTS = (
    Plot("Tokens per second", ("tokens_per_second",), "The first step includes compilation."),
    Plot("Seconds per step", ("step_seconds",), "From the end of one step to the end of the next.", log=True),
    Plot("Model FLOPs utilization", ("mfu",), "FLOPs on real tokens over the chips' bfloat16 peak.", share=True),
)


def write_report(run_dir: Path, data: Mapping[str, Sequence[Row]] | None = None) -> Path:
    """Write a run's ``report.html`` from its logs and return its path.

    Args:
        run_dir: directory of a run, finished or not.
        data: set name -> one row per source, as the token store reports it: ``source``, ``rows``, ``kept``, and
            ``dropped`` and ``notes`` by cause. None: the report has no data section.
    """
    run = RunDir(run_dir)
    config, metrics, timings = load_yaml(run.config), read_json(run.metrics), read_json(run.timings)
    distributions = read_json(run.distributions)
    first_title = "Loss, accuracy, margin and rewards" if "loss" in config else "Loss"
    headline_plots = [plot for plot in PLOTS if plot.keys[0] in MAIN_KEYS]
    sections = [
        cards(headlines(metrics)),
        heading(first_title, plots(headline_plots, metrics)),
        heading("Before and after", comparison_table(metrics)),
        heading("Margins and rewards", histograms(distributions), reliability(distributions)),
        heading("Implicit reward and reward model", *reward_model_table(config, metrics, distributions)),
        heading("Accuracy by length", lengths_table(distributions, metrics)),
        heading("What earns the reward", *tokens_hint(run, config, metrics)) if distributions else "",
        heading("Sampled answers", samples(read_json(run.samples))),
        heading("The run", table((), run_facts(config, metrics, timings).items())),
        heading("Data", data_table(data)) if data else "",
        heading("Other curves", plots((plot for plot in PLOTS if plot not in headline_plots), metrics)),
        heading("Speed", plots(SPEED_PLOTS, timings)),
        details("Every option of the run (config.yaml)", run.config.read_text(encoding="utf-8")),
    ]
    write_atomically(run.report, page(run.root.name, f"{kind(config)} · {run.root}", sections))
    return run.report


def report_done(run_dir: Path, data: Mapping[str, Sequence[Row]], progress: bool) -> None:
    """Write the report of a finished run; an error is only printed, with its traceback unless it is an ``OSError``."""
    try:
        path = write_report(run_dir, data)
    except Exception as error:  # noqa: BLE001
        if not isinstance(error, OSError):
            warn(traceback.format_exc())
        warn(f"report: not written ({reason(error)}); the run is complete: run its command again to write the report")
    else:
        say(progress, f"report: {path}")


def headlines(metrics: Sequence[Row]) -> dict[str, tuple[str | None, str]]:
    """Return first and last values of the main metrics for each evaluation set, or for training if there is none."""
    titles = {"rewards/accuracies": "reward accuracy", "rewards/margins": "margin", "loss": "loss"}
    titles |= {"mean_token_accuracy": "token accuracy", "score": "score", "win_rate": "win rate", "sampled_kl": "KL"}
    prefixes = {f"eval_{name}_": f"{name}: " for name in eval_sets(metrics)} or {"": "training: "}
    summary: dict[str, tuple[str | None, str]] = {}
    for prefix, label in prefixes.items():
        curves = {name: series(metrics, prefix + key)[1] for key, name in titles.items()}
        titles_shown = [name for name, values in curves.items() if values][:3]
        summary |= {label + name: (number(curves[name][0]), number(curves[name][-1])) for name in titles_shown}
        if starts_tied(metrics, prefix):
            title = label + titles["rewards/accuracies"]
            summary[title] = ("tied", summary[title][1])
    return summary


def starts_tied(metrics: Sequence[Row], prefix: str) -> bool:
    """Return whether all margins were 0 within rounding at the first logged accuracy, which is then meaningless.

    The float32 bound applies to every dtype: evaluation scores policy and reference with one function. Only a mixture
    of experts with a cached reference may exceed it, and is then not called tied.
    """
    first = next((row for row in metrics if f"{prefix}rewards/accuracies" in row), {})
    first_metrics = {key.removeprefix(prefix): value for key, value in first.items() if key.startswith(prefix)}
    return tied(first_metrics, AGREEMENT["float32"])


def comparison_table(metrics: Sequence[Row]) -> str:
    """Return a table of the first, last and best values of every evaluation metric, with its meaning."""
    rows = []
    for name in eval_sets(metrics):
        prefix = f"eval_{name}_"
        keys = dict.fromkeys(key for row in metrics for key in row if key.startswith(prefix))
        for metric in sorted((key.removeprefix(prefix) for key in keys), key=lambda name: name not in MAIN_KEYS):
            steps, values = series(metrics, prefix + metric)
            best = max(values) if "accurac" in metric else min(values) if metric.endswith("loss") else None
            best_at = "" if best is None else f"{number(best)} at step {steps[values.index(best)]}"
            all_tied = metric == "rewards/accuracies" and starts_tied(metrics, prefix)
            before = "tied" if all_tied else number(values[0])
            rows.append((f"{name}: {metric}", before, number(values[-1]), best_at, MEANINGS.get(metric, "")))
    return table(("Evaluation", "before", "after", "best", "meaning"), rows)


def reward_model_table(config: Row, metrics: Sequence[Row], distributions: Sequence[Row]) -> list[str]:
    """Return a table of accuracy and calibration of the implicit reward and the reward model on the same pairs."""
    rows = []
    for name, last in {row["set"]: row for row in distributions if "reward_model" in row}.items():
        latest = lambda key, name=name: number(series(metrics, f"eval_{name}_{key}")[1][-1])  # noqa: E731
        errors = [number(values["calibration"]["ece"]) for values in (last, last["reward_model"])]
        agreement = latest("reward_model/agreement")
        rows.append((f"{name}: implicit reward", latest("rewards/accuracies"), errors[0], agreement))
        rows.append((f"{name}: reward model", latest("reward_model/accuracies"), errors[1], ""))
    if not rows:
        return []
    head = ("At the last evaluation", "accuracy", "expected calibration error", "ranked as by the reward model")
    return [table(head, rows), paragraph(f"The reward model is {config['eval']['reward']['path']}.")]


def lengths_table(distributions: Sequence[Row], metrics: Sequence[Row]) -> str:
    """Return a table of reward accuracy by answer length, at each set's first and last evaluation."""
    rows = []
    for name in dict.fromkeys(row["set"] for row in distributions):
        first, *_, last = [row for row in distributions if row["set"] == name] * 2
        all_tied = starts_tied(metrics, f"eval_{name}_")
        for kind in ("by_length", "by_longer"):
            for old, new in zip(first[kind], last[kind], strict=True):
                start = (f"{name}: {_length_label(new)}", str(new["pairs"]), f"{new['share']:.1%}")
                accuracies = ("tied" if all_tied else number(old["accuracy"]), number(new["accuracy"]))
                rows.append((*start, *accuracies, number(old["margin"]), number(new["margin"])))
    head = ("Pairs by length", "pairs", "share", "accuracy before", "after", "margin before", "after")
    return table(head, rows)


def _length_label(bucket: Row) -> str:
    if "from" in bucket:
        return f"longer answer of {bucket['from']} to {bucket['to']} tokens"
    return "equally long" if bucket["longer"] == "equal" else f"{bucket['longer']} is longer"


def tokens_hint(run: RunDir, config: Row, metrics: Sequence[Row]) -> tuple[str, ...]:
    """Return HTML of the command that shows rewards per token, or nothing if there is no reference."""
    if not any(key.endswith("displacement") for row in metrics for key in row):
        return ()
    mode_option = " --reference.mode live" if config["reference"]["mode"] == "cached" else ""
    command = f"dpo-jax eval {run.config} --output {run.root / 'pairs.jsonl'} --per-token{mode_option}"
    hint = "The reward is a sum over tokens. This command writes each token's contribution and a page, pairs.html, with"
    return paragraph(f"{hint} colored answers for the largest and smallest margins:"), code(command)


def run_facts(config: Row, metrics: Sequence[Row], timings: Sequence[Row]) -> dict[str, str]:
    """Return the run's main settings and totals as label -> text."""
    batch, optimizer = config["batch"], config["optimizer"]
    trained_rows = [row for row in metrics if "grad_norm" in row]
    unit = next(name for name in ("pairs", "examples", "prompts") if name in batch)
    schedule_text = f"{optimizer['schedule']}, {optimizer['warmup_steps']} warm-up steps"
    facts = {
        "Model": config["model"]["path"],
        "Trained on": ", ".join(source["path"] for source in config["data"]["train"]),
        "Evaluated on": ", ".join(f"{name}: {source['path']}" for name, source in config["data"]["eval"].items()),
        "Objective": objective(config),
        "Optimizer": f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}, {schedule_text}",
        "Batch": f"{batch[unit]} {unit} per step",
        "Seed": str(config["run"]["seed"]),
    }
    if trained_rows:
        last = trained_rows[-1]
        facts["Length"] = f"{last['step']} steps, {number(last['epoch'])} epochs, {last['num_tokens']:,} tokens"
    if any("clipped" in row for row in trained_rows):
        count = sum(row.get("clipped", 0) for row in trained_rows)
        max_norm = optimizer["max_grad_norm"]
        facts["Clipped"] = f"{count} of {len(trained_rows)} logged steps had a gradient norm above {max_norm:g}"
        if 2 * count > len(trained_rows):
            median_text = f"{number(statistics.median(row['grad_norm'] for row in trained_rows))} (median)"
            remedy = "set optimizer.max_grad_norm above it"
            facts["Clipped"] += f". Clipping is meant for spikes, but the usual norm here is {median_text}: {remedy}"
    if timings:
        facts |= speed_facts(timings, unit)
        peaks = {name: max(series(timings, f"{name}_memory_gib")[1], default=0.0) for name in ("host", "device")}
        facts["Peak memory"] = ", ".join(f"{name} {peak:.2f} GiB" for name, peak in peaks.items() if peak)
    return {name: text for name, text in facts.items() if text}


def speed_facts(timings: Sequence[Row], unit: str) -> dict[str, str]:
    """Return the run's speed as label -> text, with the first step kept separate because it compiles."""
    steady = timings[1:] or timings
    median = lambda key: statistics.median(row[key] for row in steady)  # noqa: E731
    facts = {
        "First step": f"{timings[0]['step_seconds']:.1f} s, including compilation",
        "Later steps": f"{median('step_seconds'):.3g} s, {median('pairs_per_second'):.4g} {unit} per second (medians)",
    }
    if all("mfu" in row for row in steady):
        facts["Of the chips' peak"] = f"{median('mfu'):.1%} (MFU on real tokens, median)"
    if all("data_wait_seconds" in row for row in steady):
        wait_share = sum(row["data_wait_seconds"] for row in steady) / sum(row["step_seconds"] for row in steady)
        facts["Waiting for data"] = f"{wait_share:.1%} of the time"
    return facts


def data_table(data: Mapping[str, Sequence[Row]]) -> str:
    """Return a table with the number of rows kept, dropped, changed or noted in each source."""

    def causes(by_cause: Mapping[str, Any]) -> str:
        return ", ".join(f"{cause.replace('_', ' ')}: {entry['count']}" for cause, entry in by_cause.items()) or "none"

    rows = []
    for name, sources in data.items():
        for source in sources:
            counts = (str(source["rows"]), str(source["kept"]), causes(source["dropped"]), causes(source["notes"]))
            rows.append((f"{name}: {source['source']}", *counts))
    return table(("Set", "rows", "kept", "dropped", "changed or noted"), rows)
