"""Facts and checks of a step, and evaluation, for methods that train on the policy's own answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import optax

from dpo_jax.batch import Adapted, Params
from dpo_jax.batching.batches import StepData
from dpo_jax.errors import UserError
from dpo_jax.inference.generate import rollout_weights
from dpo_jax.methods.rollouts import EVALUATION, Graded, Sampler, pack_answers
from dpo_jax.methods.setup import Setup, logged_row
from dpo_jax.methods.start_check import agreement
from dpo_jax.runs.manifest import new_run
from dpo_jax.runs.session import Metrics, StepFacts


@dataclass(frozen=True)
class AnswerEvaluation:
    """Evaluation that samples one answer to each evaluation prompt, always with the same keys."""

    setup: Setup
    sampler: Sampler
    reference_answers: Mapping[str, list[Graded]]  # by set and batch; empty: there is no reference

    def __call__(self, weights: Params | Adapted, reference: Params | Adapted | None) -> dict[str, float]:
        """Return the mean of each metric over the answers of each set, named ``eval_NAME_METRIC``.

        ``score``, ``length`` in tokens, and ``ended``, the share with an end token. With a reference also
        ``sampled_kl``, the sum of log(pi / ref) over an answer's tokens; and ``win_rate``, the share of answers that
        score higher than the answer which the reference at the start of the run gives to the same prompt with the same
        key; equal answers and equal scores count half.
        """
        metrics: dict[str, float] = {}
        for name, answers in eval_answers(self.setup, self.sampler, weights).items():
            log_ratios = None if reference is None else self.log_ratios(name, answers, weights, reference)
            values = self.of_answers(name, answers, log_ratios)
            metrics |= {f"eval_{name}_{key}": float(value.mean(dtype=np.float64)) for key, value in values.items()}
        return metrics

    def of_answers(
        self, name: str, answers: Sequence[Graded], log_ratios: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return each metric's values, one for each answer to the prompts of a set."""
        values = {
            "score": np.concatenate([graded.scores.ravel() for graded in answers]),
            "length": np.concatenate([graded.num_tokens.ravel() for graded in answers]),
            "ended": np.concatenate([graded.ended.ravel() for graded in answers]),
        }
        if log_ratios is not None:
            values["sampled_kl"] = log_ratios
        if self.reference_answers:
            values["win_rate"] = np.concatenate(list(map(wins, answers, self.reference_answers[name])))
        return values

    def log_ratios(
        self, name: str, answers: Sequence[Graded], weights: Params | Adapted, reference: Params | Adapted
    ) -> np.ndarray:
        """Return log(pi / ref) of each answer; one program computes both log-probs."""
        setup, batches, log_ratios = self.setup, self.setup.evals[name], []
        for step, graded in enumerate(answers):
            ids = batches.order.step_ids(step)
            batch = setup.to_devices(pack_answers(batches, step, ids, graded).batch)
            policy_logps, reference_logps = (
                np.asarray(setup.logps_step(w, batch).sum)[ids >= 0] for w in (weights, reference)
            )
            log_ratios.append((policy_logps - reference_logps).ravel())
        return np.concatenate(log_ratios)


def make_evaluation(setup: Setup, sampler: Sampler, reference: Params | Adapted | None) -> AnswerEvaluation:
    """Return a run's evaluation, after sampling the initial reference's answers, if there is a reference."""
    sampler = sampler.with_one_answer()
    if reference is None:
        return AnswerEvaluation(setup, sampler, {})
    return AnswerEvaluation(setup, sampler, eval_answers(setup, sampler, reference))


def wins(answers: Graded, reference: Graded) -> np.ndarray:
    """Return, for each answer, 1 if it scores higher than the reference's, 0 if lower, and 1/2 if equal.

    The same answer may score differently in another batch, by rounding, so equal tokens are equal, too.
    """
    pairs = zip(chain(*answers.answers), chain(*reference.answers), strict=True)
    is_equal = np.array([answer.tokens == other.tokens for answer, other in pairs])
    scores, reference_scores = answers.scores.ravel(), reference.scores.ravel()
    return np.where(is_equal | (scores == reference_scores), 0.5, scores > reference_scores)


def eval_answers(setup: Setup, sampler: Sampler, weights: Params | Adapted) -> dict[str, list[Graded]]:
    """Sample and score answers to the prompts of each evaluation set; a list with one entry per batch."""
    if not setup.evals:
        return {}
    rollout_copy = rollout_weights(setup.model, weights, setup.mesh)

    def answers(batches: Any) -> list[Graded]:
        ids = [batches.order.step_ids(step) for step in range(batches.order.num_steps)]
        return [sampler(rollout_copy, batches.store, i[i >= 0], EVALUATION - step) for step, i in enumerate(ids)]

    return {name: answers(batches) for name, batches in setup.evals.items()}


def sampled_answers(setup: Setup, sampler: Sampler, weights: Params | Adapted, step: int) -> tuple[np.ndarray, Graded]:
    """Return the example ids of ``step`` (-1: padding), and the policy's answers to their prompts."""
    ids = setup.batches.order.step_ids(step)
    rollout_copy = rollout_weights(setup.model, weights, setup.mesh)
    return ids, sampler(rollout_copy, setup.batches.store, ids[ids >= 0], step)


def sampled_facts(
    setup: Setup,
    manifest: Mapping[str, Any],
    schedule: optax.Schedule,
    data: StepData,
    graded: Graded,
    *,
    extra: Metrics,
    check: Callable[[Metrics], None],
    keeps_reference: bool,
) -> StepFacts:
    """Return the `StepFacts` of a step on the answers ``graded``, packed as ``data``; ``extra``: host metrics."""
    num_prompts, num_sampled = len(graded.prompts), int(graded.num_tokens.sum())

    def log_row(metrics: Metrics, totals: Mapping[str, int]) -> Metrics:
        counts = {**totals, setup.config.batch.counts: num_prompts}
        return logged_row(setup, schedule, data, {**metrics, **extra}, counts)

    def rates(seconds: float) -> dict[str, float]:
        return {
            "step_seconds": seconds,
            "pairs_per_second": num_prompts / seconds,
            "tokens_per_second": data.num_real_tokens / seconds,
            "sampled_tokens_per_second": num_sampled / seconds,
        }

    def progress_metrics(metrics: Metrics, seconds: float) -> dict[str, str]:
        values = {**metrics, **extra}
        fields = {name: f"{values[name]:.3f}" for name in ("score", "sampled_kl") if name in values}
        return fields | {"tokens/s": f"{num_sampled / seconds:.0f}"}

    def advice(root: str) -> str:
        options = new_run(manifest["config"], root, keeps_reference=keeps_reference)
        remedy = "start a new run with a lower optimizer.learning_rate: --run.dir NEW, or from this checkpoint"
        return f"{remedy}: {options}"

    counts = {"num_tokens": data.num_tokens, "sampled_tokens": num_sampled}
    return StepFacts(counts, log_row, rates, progress_metrics, check, advice)


def check_sampler(setup: Setup, metrics: Metrics) -> None:
    """Check that the sampler and the train step compute the same log-probs of the sampled answers.

    The mean error is bounded: rounding makes the error of a single token many times as large, and a wrong position,
    adapter or mask exceeds the bound even in the mean over thousands.

    Raises:
        UserError: they differ.
    """
    refuse_difference(setup, metrics, "mean_sampler_error", "sampler and train step compute different log-probs")


def refuse_difference(setup: Setup, metrics: Metrics, name: str, meaning: str, scale: float = 1.0) -> None:
    """Raise ``UserError`` if a metric that must be 0, up to rounding, exceeds ``scale`` times the `agreement`."""
    tolerance = scale * agreement(setup)
    if not abs(metrics[name]) <= tolerance:
        remedy = "compare with model.dtype float32 and model.attention xla"
        raise UserError(f"{name} is {metrics[name]:.3g} (tolerance: {tolerance:.2g}): {meaning}; {remedy}")
