"""Compare methods that train a policy on preferences, on a task whose optimum is known exactly.

Every method starts from the same supervised policy and, if it is offline, from the same pairs, with 3 seeds; expected
reward and KL are sums over all answers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import CHOSEN, REJECTED
from dpo_jax.commands import inn
from dpo_jax.commands.inn_experiment import (
    DATA_SIZE,
    SEEDS,
    TUNED_BETA,
    Experiment,
    Method,
    Outcome,
    Sizes,
    Task,
)
from dpo_jax.commands.inn_policies import table_policy
from dpo_jax.commands.inn_runs import SFT_LOSS, supervised_decoder
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig
from dpo_jax.console import say
from dpo_jax.inference.distributions import calibration
from dpo_jax.reports.comparison import comparison_page
from dpo_jax.runs.directory import writing
from dpo_jax.storage import write_atomically

BETAS = np.geomspace(0.03, 30, 60)  # of the optimum's curve
BEST_OF = (4, 16, 64)
TABLE_SIZES = Sizes(offline=600, online=300, gradient=100, rates=(0.05,))
DECODER_SIZES = Sizes(offline=200, online=150, gradient=60, rates=(1e-3, 1.5e-3))
RLOO = PolicyGradientConfig(estimator="rloo", answers=4, epochs=2, kl_coef=0.2)
PPO = PolicyGradientConfig(kl_coef=0.2)
DPO, LEARNED_PPO = "DPO", "Reward model + PPO"  # names of rows that other parts of the page refer to
SHOWN_GUESTS = (1, 2, 5)  # indices of the guests whose answers the page shows


def table_methods(experiment: Experiment) -> list[Method]:
    """Return the methods to run on the table policy, which shows their theory without a network's errors."""
    return [
        *(experiment.by_pairs(DPO, LossConfig(beta=beta)) for beta in (0.5, 0.2)),
        experiment.online(0.2),
        *(experiment.gradient("PPO on the rule", replace(PPO, kl_coef=beta)) for beta in (1.0, 0.5, 0.2)),
    ]


def decoder_methods(experiment: Experiment) -> list[Method]:
    """Return the methods to run on the decoder, in the order of the page."""
    learned_rewards, foreign_rewards = lambda: experiment.rewards, lambda: experiment.foreign_rewards
    return [
        experiment.by_pairs("Preferred fine-tuning", SFT_LOSS),
        *(experiment.by_pairs(DPO, LossConfig(beta=beta)) for beta in (TUNED_BETA, 0.2)),
        experiment.by_pairs("IPO", LossConfig(type="ipo", beta=TUNED_BETA)),
        experiment.gradient(LEARNED_PPO, PPO, learned_rewards),
        experiment.gradient("Reward model + RLOO", RLOO, learned_rewards),
        experiment.online(0.2),
        experiment.gradient("PPO on the rule", PPO),
        experiment.by_pairs("DPO, pairs without liked courses", LossConfig(beta=TUNED_BETA), foreign=True),
        experiment.gradient("Reward model + PPO, pairs without liked courses", PPO, foreign_rewards),
    ]


def outcomes_of(experiment: Experiment, methods: Sequence[Method]) -> Iterator[Outcome]:
    """Run the methods one after another, and yield the outcome of each."""
    for method in methods:
        outcome = experiment.outcome(method)
        exact, beta_text = outcome.reached, "" if method.beta is None else f", beta {method.beta:g}"
        result = f"reward {exact.reward:.3f} at KL {exact.kl:.3f}, share {outcome.share:.3f}"
        say(True, f"{experiment.title}: {method.name}{beta_text}: {result}")
        yield outcome


def compare(directory: Path) -> None:
    """Run every method, and write ``compare.json`` and the page ``compare.html`` to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    table = Experiment("table", Task(table_policy()), TABLE_SIZES)
    table_outcomes = list(outcomes_of(table, table_methods(table)))
    decoder = Experiment("decoder", Task(supervised_decoder()), DECODER_SIZES)
    outcomes = list(outcomes_of(decoder, decoder_methods(decoder)))
    results = {
        "seeds": len(SEEDS),
        "pairs": DATA_SIZE,
        "answers": decoder.task.reference.size,
        "learning_rate": decoder.learning_rate,
        "experiments": [experiment_results(table, table_outcomes), experiment_results(decoder, outcomes)],
        "rankings": rankings(decoder, outcomes),
        "reward_model": decoder.rewards.cost._asdict() | {"updates": DECODER_SIZES.offline},
        "proxy": {
            each.method.name: proxy_curves(each) for each in outcomes if each.method.name.startswith("Reward model")
        },
        "texts": texts(decoder, outcomes),
    }
    path = directory / "compare.html"
    with writing(path):
        write_atomically(directory / "compare.json", json.dumps(results, indent=1) + "\n")
        write_atomically(path, comparison_page(results))
    say(True, f"page: {path}")


def experiment_results(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the results of the methods and of the exact policies, for one kind of policy, as a JSON object."""
    task = experiment.task
    optimum = partial(task.tree.optimum, task.reference)
    best_of = {n: task.tree.best_of(task.reference, n) for n in BEST_OF}
    rows = [outcome.row | {"optimum_kl": _optimum_kl(task, outcome.method)} for outcome in outcomes]
    return {
        "title": experiment.title,
        "reference": task.start._asdict(),
        "optimum": [(each.kl, each.reward) for each in map(optimum, BETAS)],
        "best_of": [each._asdict() | {"n": n, "share": task.share(each)} for n, each in best_of.items()],
        "rows": rows,
    }


def _optimum_kl(task: Task, method: Method) -> float | None:
    return None if method.beta is None else task.tree.optimum(task.reference, method.beta).kl


def rankings(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Compare how the reward models, DPO's implicit rewards and the rule rank held-out pairs with noisy labels."""
    rewards = np.asarray(experiment.held_out.rewards, np.float64)
    differences = np.round(rewards[:, CHOSEN] - rewards[:, REJECTED], 6)
    margins = {"The rule": [differences]}
    margins["Reward model"] = [-np.diff(experiment.scores(each))[:, 0] for each in experiment.rewards.weights]
    for outcome in outcomes:
        beta = outcome.method.beta
        if outcome.method.name == DPO and beta is not None:
            ratios = map(experiment.log_ratios, outcome.trained.weights)
            margins[f"Implicit reward of DPO, beta {beta:g}"] = [-beta * np.diff(each)[:, 0] for each in ratios]
    return {name: _ranking(np.stack(values), differences) for name, values in margins.items()}


def _ranking(margins: np.ndarray, differences: np.ndarray) -> dict[str, Any]:
    """Return how often margins [seeds, pairs] agree with the labels and with the rule, and their calibration."""
    accuracy = lambda x: float(((np.sign(x) + 1) / 2).mean())  # noqa: E731  a tie counts as half right
    is_untied = differences != 0
    rule_accuracy = accuracy(margins[:, is_untied] * np.sign(differences[is_untied]))
    return {"labels": accuracy(margins), "rule": rule_accuracy, "calibration": calibration(margins.ravel())}


def proxy_curves(outcome: Outcome) -> dict[str, list[float]]:
    """Return the learned and the true reward of each step's answers, as means over seeds.

    A learned reward has an arbitrary offset; it is shifted to the rule's mean on the answers of the first step, which
    are the reference's.
    """
    score, rule = (np.mean([metrics[key] for metrics in outcome.trained.metrics], axis=0) for key in ("score", "rule"))
    return {"learned reward": (score - score[0] + rule[0]).tolist(), "the rule": rule.tolist()}


def texts(experiment: Experiment, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return answers of each method's first-seed policy to the same guests, sampled with one key, and their rewards."""
    guests, policy = jnp.array(SHOWN_GUESTS), experiment.policy
    answers = jax.jit(lambda weights: policy.answers(weights, guests, jax.random.key(0))[0])

    def shown(weights: Any) -> list[tuple[str, float]]:
        meals = answers(weights)
        return list(zip(meals.texts, np.asarray(meals.rewards).tolist(), strict=True))

    rows = {"Reference": shown(policy.start)}
    for outcome in outcomes:
        beta = "" if outcome.method.beta is None else f", {outcome.method.beta:g}"
        rows[outcome.method.name + beta] = shown(outcome.trained.weights[0])
    liked_courses = lambda i: [inn.COURSES[c] for c in np.argsort(-inn.GUEST_REWARDS[i])[:2]]  # noqa: E731
    return {"guests": {inn.GUESTS[i]: liked_courses(i) for i in SHOWN_GUESTS}, "rows": rows}
