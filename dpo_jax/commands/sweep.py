"""Train one config at several betas and compare accuracy, margin and distance from the reference."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_jax.bucket import is_remote
from dpo_jax.config import DPOConfig
from dpo_jax.errors import UserError, require
from dpo_jax.parallel.hosts import is_writer
from dpo_jax.storage import write_atomically
from dpo_jax.train import train

COLUMNS = {  # heading: metric
    "accuracy": "rewards/accuracies",
    "reward margin": "rewards/margins",
    "KL": "kl",
    "displacement": "displacement",
}
SAMPLED_COLUMNS = {"score": "score", "KL": "sampled_kl", "win rate": "win_rate", "length": "length", "ended": "ended"}


def sweep(config: DPOConfig, betas: Sequence[float]) -> list[dict]:
    """Train once for each beta, in ``run.dir``/beta-BETA, and return one row per beta and evaluation set.

    The rows are also written to sweep.json. An existing run resumes; a finished one is only read. Without evaluation
    sets, a row holds the metrics of the last training step.

    Raises:
        UserError: the config has no reference, so there is no KL to compare, or it samples answers in training and has
            no prompts to evaluate it on.
    """
    if config.reference_mode == "none":
        raise UserError("reference.mode: with none, a sweep cannot compare KLs to the reference; use live or cached")
    has_sets = bool(config.data.eval) or config.data.eval_fraction > 0
    if config.data.online is not None and not has_sets:
        reason = "it compares the answers sampled for that set's prompts"
        raise UserError(f"data.eval: a sweep of online DPO needs an evaluation set, since {reason}; set data.eval")
    if len(set(betas)) < len(betas):
        raise UserError(f"--betas: {list(betas)} has duplicates; give each beta once")
    require(not is_remote(config.run.dir), "run.dir", config.run.dir, "a sweep needs a local directory for its runs")
    rows = []
    for beta in betas:
        run_config = replace(config.run, dir=str(Path(config.run.dir) / f"beta-{beta:g}"))
        metrics = train(replace(config, loss=replace(config.loss, beta=beta), run=run_config))
        rows += rows_of(beta, metrics) if config.data.online is None else sampled_rows_of(beta, metrics)
    if is_writer():
        write_atomically(Path(config.run.dir) / "sweep.json", json.dumps(rows, indent=1) + "\n")
    return rows


def rows_of(beta: float, metrics: Mapping[str, float]) -> list[dict]:
    """Return the last metrics of the run at ``beta`` as one row per evaluation set."""
    return [
        row_of(beta, prefix, metrics, COLUMNS) | {"margin, nats": metrics[prefix + COLUMNS["reward margin"]] / beta}
        for prefix in eval_prefixes(metrics, COLUMNS["accuracy"]) or [""]
    ]


def sampled_rows_of(beta: float, metrics: Mapping[str, float]) -> list[dict]:
    """Return the last metrics of the answers sampled by the run at ``beta``, as one row per evaluation set."""
    prefixes = eval_prefixes(metrics, SAMPLED_COLUMNS["score"])
    return [row_of(beta, prefix, metrics, SAMPLED_COLUMNS) for prefix in prefixes]


def eval_prefixes(metrics: Mapping[str, float], metric: str) -> list[str]:
    """Return the key prefix of each evaluation set for which ``metric`` was logged."""
    return [key.removesuffix(metric) for key in metrics if key.startswith("eval_") and key.endswith(f"_{metric}")]


def row_of(beta: float, prefix: str, metrics: Mapping[str, float], columns: Mapping[str, str]) -> dict:
    """Return one row of the table: beta, evaluation set, and the set's metrics by column heading."""
    name = prefix.removeprefix("eval_").removesuffix("_") or "last step"
    return {"beta": beta, "set": name} | {heading: metrics[prefix + key] for heading, key in columns.items()}


def render(rows: Sequence[Mapping]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    text_of = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)  # noqa: E731
    return "\n".join([*lines, *("| " + " | ".join(map(text_of, row.values())) + " |" for row in rows)])
