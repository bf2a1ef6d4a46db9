"""Online DPO: DPO's train step and losses on pairs of the policy's own answers, labeled by their scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax.batching.batches import StepData
from dpo_jax.config import OnlineConfig
from dpo_jax.inference.reference import LiveReference
from dpo_jax.methods.dpo import dpo_samples, make_reference, reference_ids, reference_weights, sampling_weights
from dpo_jax.methods.offline import Offline, OfflineInput, Start, make_offline
from dpo_jax.methods.on_policy import AnswerEvaluation, check_sampler, make_evaluation, sampled_answers, sampled_facts
from dpo_jax.methods.rollouts import Graded, Sampler, in_slots, make_sampler, pack_answers
from dpo_jax.methods.setup import Setup, load_policy
from dpo_jax.methods.start_check import check_first
from dpo_jax.runs.logs import Evaluation
from dpo_jax.runs.session import Metrics
from dpo_jax.step import TrainState


def labeled_pairs(
    scores: Float[Array, "B K"], labels: Literal["soft", "hard"] = "soft"
) -> tuple[Int[Array, "B 2"], Float[Array, " B"]]:
    """Return the indices of each prompt's best and worst answer on the K axis, and the labels of these pairs.

    A soft label is sigma(best score - worst score): the loss is then the mean over labels drawn from Bradley-Terry,
    whose fixed point is the optimum of the scores. A hard label is 1, or 1/2 of tied answers; under it the margin grows
    without end.
    """
    best = scores.argmax(1)
    worst = scores.shape[1] - 1 - scores[:, ::-1].argmin(1)  # the last of equal ones, so that tied answers are a pair
    pairs = jnp.stack([best, worst], axis=1)
    margin = jnp.take_along_axis(scores, best[:, None], 1) - jnp.take_along_axis(scores, worst[:, None], 1)
    label = jax.nn.sigmoid(margin) if labels == "soft" else (1 + jnp.sign(margin)) / 2
    return pairs, label[:, 0]


@dataclass(frozen=True)
class OnlineDPO:
    """The method online DPO: step k is a step of DPO on pairs that the policy after k steps samples."""

    setup: Setup
    num_steps: int
    evaluates: bool
    manifest: dict[str, Any]
    abstract_state: TrainState
    first_state: Callable[[Any], TrainState]  # compiled, of a `Start`; donates the arrays
    dpo: Offline  # the step, with its weights and its reference
    options: OnlineConfig
    sampler: Sampler
    evaluation: AnswerEvaluation

    def weights(self, state: TrainState) -> Any:
        """Return the weights of the policy: the trained parameters, or the adapters with their base model."""
        return self.dpo.weights(state)

    def check_start(self, state: TrainState) -> None:
        """Do nothing: the first step is checked when its metrics are read."""

    def resumed(self, state: TrainState) -> None:
        """Do nothing: the sampler is checked in every step, when its metrics are read."""

    def batch(self, step: int, state: TrainState) -> OfflineInput:
        """Sample answers to the prompts of ``step``, and put the pair of the best and the worst on the devices."""
        dpo, batches = self.dpo, self.setup.batches
        ids, graded = sampled_answers(self.setup, self.sampler, self.weights(state), step)
        scores = graded.scores - np.float32(self.options.missing_eos_penalty) * ~graded.ended
        indices, label = jax.device_get(labeled_pairs(jnp.asarray(scores), self.options.labels))
        pairs = graded.take(indices)
        data = pack_answers(batches, step, ids, pairs)
        shape = data.batch.weight.shape  # with a dim of microbatches first, if the step is accumulated
        batch = replace(
            data.batch,
            label=in_slots(ids, label).reshape(shape),
            sampled_sum=in_slots(ids, pairs.sampled_sums).reshape(*shape, 2),
        )
        facts = sampled_facts(
            self.setup,
            self.manifest,
            dpo.schedule,
            data,
            graded,
            extra=pair_metrics(graded, pairs, label),
            check=lambda metrics: self._check(metrics, data),
            keeps_reference=dpo.reference is not None,
        )
        return OfflineInput(dpo.frozen(), dpo.to_devices(batch), facts)

    def _check(self, metrics: Metrics, data: StepData) -> None:
        check_sampler(self.setup, metrics)
        if self.dpo.proven and data.step == 0:
            check_first(self.setup, metrics, data)

    def update(self, state: TrainState, data: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Run the compiled train step of DPO; return the new state and the metrics."""
        return self.dpo.update(state, data)

    def evaluate(self, state: TrainState) -> Evaluation:
        """Return the metrics of answers to the evaluation prompts, and samples of them."""
        weights, reference = self.weights(state), self.dpo.reference_of(state)
        samples = [] if self.dpo.samples is None else self.dpo.samples.evaluate(weights, state.reference)[1]
        metrics = self.evaluation(weights, reference.weights if isinstance(reference, LiveReference) else None)
        return Evaluation(metrics, samples=samples)


def pair_metrics(graded: Graded, pairs: Graded, label: np.ndarray) -> dict[str, float]:
    """Return means over all answers of a step, the scores of its pairs, and the share of tied pairs.

    Scores are those of the judge; an answer without end may be the best of them and, by its penalty, the worst answer.
    """
    values = {
        "score": graded.scores,
        "score/best": pairs.scores[:, 0],
        "score/worst": pairs.scores[:, 1],
        "length": graded.num_tokens,
        "ended": graded.ended,
        "tied": label == 0.5,
    }
    return {name: float(value.mean(dtype=np.float64)) for name, value in values.items()}


def online_dpo(setup: Setup, flags: Mapping[str, str]) -> tuple[OnlineDPO, Start]:
    """Build online DPO and the arrays it starts from; ``flags`` are compiler options of its step."""
    options = setup.config.data.online
    assert options is not None
    policy = load_policy(setup)
    weights = reference_weights(setup, policy.weights)
    sampler, ids = make_sampler(setup, options.answers, options.reward)
    policy = policy._replace(ids=policy.ids | ids | reference_ids(policy, weights))
    reference = make_reference(setup, weights, ())
    start_reference = None if reference is None else sampling_weights(setup, reference, weights)
    evaluation = make_evaluation(setup, sampler, start_reference)
    samples = dpo_samples(setup, policy, reference, weights, sampler.judge)
    dpo, start = make_offline(setup, policy, reference, flags, samples)
    method = OnlineDPO(
        setup=setup,
        num_steps=dpo.num_steps,
        evaluates=dpo.evaluates,
        manifest=dpo.manifest,
        abstract_state=dpo.abstract_state,
        first_state=dpo.first_state,
        dpo=dpo,
        options=options,
        sampler=sampler,
        evaluation=evaluation,
    )
    return method, start
