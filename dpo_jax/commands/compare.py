"""Compare the ways from preferences to a policy on a task where the optimum is known exactly.

Every method trains the same table policy of the inn, with 3 seeds; expected reward and KL are sums over all answers.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dpo_jax.commands import inn
from dpo_jax.commands.inn_policies import Policy, table_policy
from dpo_jax.commands.inn_runs import offline as run_offline
from dpo_jax.commands.inn_runs import online_dpo, policy_gradient, preferences
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig
from dpo_jax.console import say
from dpo_jax.reports.charts import draw_frontier, figure
from dpo_jax.reports.html import heading, page, paragraph, table
from dpo_jax.runs.directory import writing
from dpo_jax.storage import write_atomically

SEEDS = range(3)
BETAS = np.geomspace(0.03, 30, 60)  # of the optimum's curve
BEST_OF = (4, 16, 64)
DATA_SIZE = 8192  # preference pairs
LARGE_DATA = 131_072
DPO_STEPS, ONLINE_STEPS, GRADIENT_STEPS = 600, 300, 100
PAIRS, ANSWERS = 256, 256  # per step
REPEATS = 3.0  # nats that another policy than the reference adds to a course repeated at once
COLUMNS = (
    "Method", "beta", "reward", "KL, nats", "share", "ended", "optimum's KL", "spread", "sampled", "pairs", "seconds"
)  # fmt: skip
INTRODUCTION = """Each method starts from the same supervised policy, its reference. Rewards are the rule's own, KL is
KL(policy || reference), and both are exact. Share is a method's gain in reward as a part of the largest gain that any
policy has at its KL. Beta is the KL coefficient of PPO and RLOO."""
EXPLANATION = """Optimum's KL is that of the exact optimum for the method's beta. Spread is the range of expected
rewards over seeds. PPO, RLOO and online DPO ask the rule for the score of every answer that they sample; DPO and IPO
see only noisy labels of pairs that were drawn beforehand. The pairs of another policy are answers that repeat courses,
which the reference rarely does."""


class Method(NamedTuple):
    """A way to a policy."""

    name: str
    beta: float
    run: Callable[[], list[Any]]  # -> each seed's weights
    sampled: int = 0  # answers sampled in training
    labels: int = 0  # preference pairs


@dataclass(frozen=True)
class Outcome:
    """What a method reached, as means over seeds, and what it took."""

    method: Method
    reached: inn.Exact
    spread: float  # largest minus smallest expected reward of the seeds
    share: float  # of the best reward at this KL
    seconds: float

    @property
    def row(self) -> dict[str, Any]:
        """The outcome as a JSON object."""
        measured = {"share": self.share, "spread": self.spread, "seconds": round(self.seconds, 1)}
        return {"method": self.method.name, "beta": self.method.beta, **self.reached._asdict(), **measured}


@dataclass(frozen=True)
class Task:
    """The inn for one kind of policy, and the log-probs of all answers under the one that all runs start from."""

    policy: Policy
    tree: inn.Tree = field(default_factory=inn.Tree)

    @cached_property
    def reference(self) -> np.ndarray:
        """Log-prob of every leaf under the policy that all runs start from."""
        return self.tree.leaf_logps(self.policy.next_logps(self.policy.start))

    @cached_property
    def start(self) -> inn.Exact:
        """What the reference itself reaches."""
        return self.tree.exact(self.reference, self.reference)

    def reached(self, weights: Any) -> inn.Exact:
        """Return what the policy with these weights reaches."""
        return self.tree.exact(self.tree.leaf_logps(self.policy.next_logps(weights)), self.reference)

    def share(self, reached: inn.Exact) -> float:
        """Return a policy's gain in reward as a share of the largest gain at its KL."""
        best = self.tree.best_reward(self.reference, reached.kl)
        return (reached.reward - self.start.reward) / (best - self.start.reward)


def repeating_policy() -> Any:
    """Return the table of another policy than the reference, which repeats courses."""
    courses = np.arange(inn.NUM_COURSES)
    return jnp.asarray(inn.language()).at[:, :, courses, inn.FIRST_COURSE + courses].add(REPEATS)


def methods(policy: Policy) -> list[Method]:
    """Return all methods, in the order of the page."""

    def offline(name: str, loss: LossConfig, size: int = DATA_SIZE, sampler: Any = None) -> Method:
        def run() -> list[Any]:
            data = preferences(policy, size, SEEDS, sampler)
            return run_offline(policy, loss, data, SEEDS, num_steps=DPO_STEPS, batch_size=PAIRS).weights

        return Method(name, loss.beta, run, labels=size)

    def online(beta: float) -> Method:
        run = partial(online_dpo, policy, beta, SEEDS, num_steps=ONLINE_STEPS, num_pairs=ANSWERS // 2)
        return Method("Online DPO", beta, lambda: run().weights, sampled=ONLINE_STEPS * ANSWERS)

    def gradient(name: str, options: PolicyGradientConfig) -> Method:
        run = partial(policy_gradient, policy, options, SEEDS, num_steps=GRADIENT_STEPS, num_answers=ANSWERS)
        return Method(name, options.kl_coef, lambda: run().weights, sampled=GRADIENT_STEPS * ANSWERS)

    rloo = PolicyGradientConfig(estimator="rloo", answers=4, epochs=2)
    return [
        *(offline("DPO", LossConfig(beta=beta)) for beta in (1.0, 0.5, 0.2)),
        *(offline("DPO, 16 times the pairs", LossConfig(beta=beta), LARGE_DATA) for beta in (0.5, 0.2)),
        offline("DPO, pairs of another policy", LossConfig(beta=0.5), sampler=repeating_policy()),
        offline("IPO", LossConfig(type="ipo", beta=0.5)),
        *map(online, (0.5, 0.2)),
        *(gradient("RLOO", replace(rloo, kl_coef=beta)) for beta in (0.5, 0.2)),
        *(gradient("PPO", PolicyGradientConfig(kl_coef=beta)) for beta in (1.0, 0.5, 0.2)),
    ]


def outcome_of(method: Method, task: Task) -> Outcome:
    """Run a method, and compute what its policies reached."""
    began = time.perf_counter()
    reached = list(map(task.reached, method.run()))
    rewards = [each.reward for each in reached]
    mean = inn.Exact(*np.mean(reached, axis=0).tolist())
    return Outcome(method, mean, max(rewards) - min(rewards), task.share(mean), time.perf_counter() - began)


def compare(directory: Path) -> None:
    """Run every method, and write ``compare.json`` and the page ``compare.html`` to a directory."""
    task, outcomes = Task(table_policy()), []
    directory.mkdir(parents=True, exist_ok=True)
    for method in methods(task.policy):
        outcome = outcome_of(method, task)
        reward, kl = outcome.reached.reward, outcome.reached.kl
        say(True, f"{method.name}, beta {method.beta:g}: reward {reward:.3f} at KL {kl:.3f}, share {outcome.share:.3f}")
        outcomes.append(outcome)
    best_of = {n: task.tree.best_of(task.reference, n) for n in BEST_OF}
    path = directory / "compare.html"
    with writing(path):
        write_atomically(directory / "compare.json", json.dumps([outcome.row for outcome in outcomes], indent=1) + "\n")
        write_atomically(path, page_of(task, outcomes, best_of))
    say(True, f"page: {path}")


def page_of(task: Task, outcomes: Sequence[Outcome], best_of: Mapping[int, inn.Exact]) -> str:
    """Return the page: the frontier, and a table of what each method reached and cost."""
    points: dict[str, list[tuple[float, float]]] = {"Reference": [(0.0, task.start.reward)]}
    for outcome in outcomes:
        points.setdefault(outcome.method.name, []).append((outcome.reached.kl, outcome.reached.reward))
    points["Best of n"] = [(each.kl, each.reward) for each in best_of.values()]
    optimum = [task.tree.optimum(task.reference, beta) for beta in BETAS]
    draw = partial(draw_frontier, [(each.kl, each.reward) for each in optimum], points)
    note = "The line is the largest reward that any policy has at a KL: that of reference exp(reward / beta) / Z."
    rows = [
        (
            outcome.method.name,
            f"{outcome.method.beta:g}",
            *_reached(outcome.reached, outcome.share),
            f"{task.tree.optimum(task.reference, outcome.method.beta).kl:.3f}",
            f"{outcome.spread:.3f}",
            f"{outcome.method.sampled:,}",
            f"{outcome.method.labels:,}",
            f"{outcome.seconds:.0f}",
        )
        for outcome in outcomes
    ]
    rows += [(f"Best of {n}", "", *_reached(each, task.share(each)), "", "", "", "", "") for n, each in best_of.items()]
    size = task.reference.size
    return page(
        "From preferences to a policy",
        f"{len(SEEDS)} seeds of a table policy on the inn, a task whose {size:,} answers are all enumerated",
        [
            paragraph(INTRODUCTION),
            heading("Reward against KL", figure("Frontier", note, draw)),
            heading("What each reached, and what it took", table(COLUMNS, rows), paragraph(EXPLANATION)),
        ],
    )


def _reached(reached: inn.Exact, share: float) -> tuple[str, ...]:
    return f"{reached.reward:.3f}", f"{reached.kl:.3f}", f"{share:.3f}", f"{reached.ended:.1%}"
