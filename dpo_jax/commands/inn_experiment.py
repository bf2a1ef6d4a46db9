"""An experiment on the inn: the data that its methods share, and each method's results and costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.batch import CHOSEN
from dpo_jax.commands import inn
from dpo_jax.commands.inn_policies import PolicyKind, table_policy
from dpo_jax.commands.inn_runs import (
    REWARD_LOSS,
    Trained,
    offline,
    online_dpo,
    policy_gradient,
    preferences,
)
from dpo_jax.config import LossConfig
from dpo_jax.config.online import PolicyGradientConfig

SEEDS = range(1, 4)
TUNING_SEED = 0  # on which the learning rate of offline methods is chosen
HELD_OUT_SEED = 99
DATA_SIZE, HELD_OUT = 16_384, 4096  # preference pairs
BATCH = 256  # pairs or sampled answers per step
TUNED_BETA = 0.5
OFFLINE_OPTIONS = ("beta", "learning rate")  # that a user sets, besides steps and batch size
RLOO_OPTIONS = ("KL coefficient", "learning rate", "clip", "epochs", "answers per prompt")
PPO_OPTIONS = (*RLOO_OPTIONS[:-1], "GAE lambda", "value coefficient", "value clip")


class Sizes(NamedTuple):
    """Numbers of steps, and the learning rates to choose from, of one kind of policy."""

    offline: int
    online: int
    gradient: int
    rates: tuple[float, ...]


class Method(NamedTuple):
    """A training method to compare: how to run it, and what it needs."""

    name: str
    beta: float | None
    run: Callable[[], Trained]
    models: str  # in memory while it trains
    options: Sequence[str]  # to set
    updates: int
    sampled: int = 0  # answers sampled in training
    pairs: int = 0  # preference pairs


@dataclass(frozen=True)
class Outcome:
    """A method's results, as means over seeds, and its costs."""

    method: Method
    trained: Trained
    reached: inn.Exact
    spread: float  # largest minus smallest expected reward of the seeds
    share: float  # of the best reward at this KL
    displaced: float  # share of held-out chosen answers that became less likely
    chosen_change: float  # of their log-probs, nats

    @property
    def row(self) -> dict[str, Any]:
        """The outcome as a JSON object."""
        method = self.method._asdict()
        del method["run"]
        results = {name: getattr(self, name) for name in ("share", "spread", "displaced", "chosen_change")}
        return method | self.reached._asdict() | results | self.trained.cost._asdict()


@dataclass(frozen=True)
class Task:
    """The inn for one kind of policy, with all answers' log-probs under the reference, from which all runs start."""

    policy: PolicyKind

    @cached_property
    def tree(self) -> inn.Tree:
        """The tree of all answers."""
        return inn.Tree()

    @cached_property
    def reference(self) -> np.ndarray:
        """Log-prob of every leaf under the policy that all runs start from."""
        return self.tree.leaf_logps(self.policy.next_logps(self.policy.start))

    @cached_property
    def start(self) -> inn.Exact:
        """The exact reward and other expectations of the reference."""
        return self.tree.exact(self.reference, self.reference)

    def reached(self, weights: Any) -> inn.Exact:
        """Return the exact reward, KL and other expectations of the policy with these weights."""
        return self.tree.exact(self.tree.leaf_logps(self.policy.next_logps(weights)), self.reference)

    def share(self, reached: inn.Exact) -> float:
        """Return a policy's gain in reward as a share of the largest gain at its KL."""
        best_reward = self.tree.best_reward(self.reference, reached.kl)
        return (reached.reward - self.start.reward) / (best_reward - self.start.reward)


@dataclass(frozen=True)
class Experiment:
    """The methods on one kind of policy, with the data that they share."""

    title: str
    task: Task
    sizes: Sizes

    @property
    def policy(self) -> PolicyKind:
        """The initial weights and the functions of this kind of policy."""
        return self.task.policy

    @cached_property
    def pairs(self) -> list[inn.Meals]:
        """Pairs of the reference's answers, for each seed."""
        return preferences(self.policy, DATA_SIZE, SEEDS)

    @cached_property
    def foreign_pairs(self) -> list[inn.Meals]:
        """As many pairs as `pairs` has, but of answers of another policy, which serves no guest a course they like."""
        return preferences(table_policy(), DATA_SIZE, SEEDS, jnp.asarray(inn.without_liked_courses(), jnp.float32))

    @cached_property
    def held_out(self) -> inn.Meals:
        """Pairs of the reference's answers that no method is trained on."""
        return preferences(self.policy, HELD_OUT, [HELD_OUT_SEED])[0]

    @cached_property
    def learning_rate(self) -> float:
        """The learning rate with which DPO reaches the largest E[r] - beta KL, on a seed used only for this choice."""
        rates = self.sizes.rates
        if len(rates) == 1:
            return rates[0]
        pairs, seeds = preferences(self.policy, DATA_SIZE, [TUNING_SEED]) * len(rates), [TUNING_SEED] * len(rates)
        candidates = offline(
            self.policy,
            LossConfig(beta=TUNED_BETA),
            pairs,
            seeds,
            num_steps=self.sizes.offline,
            batch_size=BATCH,
            learning_rates=rates,
        )
        results = map(self.task.reached, candidates.weights)
        return rates[int(np.argmax([each.reward - TUNED_BETA * each.kl for each in results]))]

    def offline(self, loss: LossConfig, pairs: list[inn.Meals]) -> Trained:
        """Train the policy on each seed's pairs."""
        rates = [self.learning_rate] * len(SEEDS)
        return offline(
            self.policy, loss, pairs, SEEDS, num_steps=self.sizes.offline, batch_size=BATCH, learning_rates=rates
        )

    def reward_models(self, pairs: list[inn.Meals]) -> Trained:
        """Train a reward model on each seed's pairs."""
        return offline(
            self.policy,
            REWARD_LOSS,
            pairs,
            SEEDS,
            num_steps=self.sizes.offline,
            batch_size=BATCH,
            logps_fn=self.policy.scores_fn,
            start=self.policy.start_reward,
        )

    @cached_property
    def rewards(self) -> Trained:
        """The reward models trained on `pairs`."""
        return self.reward_models(self.pairs)

    @cached_property
    def foreign_rewards(self) -> Trained:
        """The reward models trained on `foreign_pairs`."""
        return self.reward_models(self.foreign_pairs)

    def by_pairs(self, name: str, loss: LossConfig, *, foreign: bool = False) -> Method:
        """Return a method that trains on `pairs` or, if ``foreign``, on `foreign_pairs`."""
        run = lambda: self.offline(loss, self.foreign_pairs if foreign else self.pairs)  # noqa: E731
        beta, models, options = loss.beta, "policy, reference", OFFLINE_OPTIONS
        if not loss.needs_reference:
            beta, models, options = None, "policy", OFFLINE_OPTIONS[1:]
        return Method(name, beta, run, models, options, self.sizes.offline, pairs=DATA_SIZE)

    def online(self, beta: float) -> Method:
        """Return online DPO as a method; the rule labels its pairs."""
        run = partial(online_dpo, self.policy, beta, SEEDS, num_steps=self.sizes.online, num_pairs=BATCH // 2)
        num_sampled = self.sizes.online * BATCH
        return Method("Online DPO", beta, run, "policy, reference", OFFLINE_OPTIONS, self.sizes.online, num_sampled)

    def gradient(
        self, name: str, options: PolicyGradientConfig, rewards: Callable[[], Trained] | None = None
    ) -> Method:
        """Return PPO or RLOO, whose rewards come from the rule or from reward models."""

        def run() -> Trained:
            weights = None if rewards is None else rewards().weights
            sizes = {"num_steps": self.sizes.gradient, "num_answers": BATCH}
            return policy_gradient(self.policy, options, SEEDS, **sizes, rewards=weights)

        has_value = options.trained_value is not None
        models = ["policy", "reference", *["value"] * has_value, *["reward"] * (rewards is not None)]
        option_names = PPO_OPTIONS if has_value else RLOO_OPTIONS
        steps, num_pairs = self.sizes.gradient, 0 if rewards is None else DATA_SIZE
        updates = steps * options.epochs
        return Method(name, options.kl_coef, run, ", ".join(models), option_names, updates, steps * BATCH, num_pairs)

    def outcome(self, method: Method) -> Outcome:
        """Run a method, and compute the exact results of its policies."""
        runs = method.run()
        results = list(map(self.task.reached, runs.weights))
        rewards = [each.reward for each in results]
        mean = inn.Exact(*np.mean(results, axis=0).tolist())
        chosen_changes = np.stack([self.log_ratios(weights)[:, CHOSEN] for weights in runs.weights])
        displacement = float((chosen_changes < 0).mean()), float(chosen_changes.mean())
        return Outcome(method, runs, mean, max(rewards) - min(rewards), self.task.share(mean), *displacement)

    @cached_property
    def _pair_values(self) -> Callable[..., Any]:
        return jax.jit(lambda weights, meals: self.policy.pair_logps_fn(weights, self._batch(meals)).sum)

    @cached_property
    def _scores(self) -> Callable[..., Any]:
        return jax.jit(lambda weights, meals: self.policy.scores_fn(weights, self._batch(meals)).sum)

    def _batch(self, meals: inn.Meals) -> Any:
        return self.policy.inputs(meals)

    @cached_property
    def _reference_logps(self) -> np.ndarray:
        return np.asarray(self._pair_values(self.policy.start, self.held_out), np.float64)

    def log_ratios(self, weights: Any) -> np.ndarray:
        """Return log pi / ref of the answers of the held-out pairs, [pairs, 2]."""
        return np.asarray(self._pair_values(weights, self.held_out), np.float64) - self._reference_logps

    def scores(self, weights: Any) -> np.ndarray:
        """Return a reward model's scores of the answers of the held-out pairs, [pairs, 2]."""
        return np.asarray(self._scores(weights, self.held_out), np.float64)
