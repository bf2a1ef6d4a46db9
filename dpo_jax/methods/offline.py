"""The training method for a fixed data set, which fine-tuning, DPO and reward modeling share."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax

from dpo_jax.batch import Adapted, PairLogps, Params, PreferenceBatch
from dpo_jax.batching.batches import StepData, prefetched
from dpo_jax.batching.to_devices import ToDevices, make_to_devices
from dpo_jax.inference.agreement import AGREEMENT, tied
from dpo_jax.inference.evaluation import evaluation_of, score_sets
from dpo_jax.inference.reference import CachedReference, LiveReference, Reference
from dpo_jax.methods.optimizer import make_optimizer, make_schedule
from dpo_jax.methods.samples import Samples, StartAnswers
from dpo_jax.methods.setup import Policy, Setup, abstract_state, describe, follow_of, logged_row, make_step
from dpo_jax.methods.start_check import check_first, mean_margin, prove_start, start_logps, starts_equal
from dpo_jax.methods.throughput import step_rates
from dpo_jax.runs.logs import Evaluation
from dpo_jax.runs.manifest import new_run
from dpo_jax.runs.session import Metrics, StepFacts
from dpo_jax.step import Frozen, TrainState, TrainStep, init_state


class Start(NamedTuple):
    """Arrays of the initial state, which a resumed run frees by dropping its only reference to this object."""

    trained: Params  # the model's weights, or the adapters
    reference: Params | None  # weights of a reference that follows the policy


class OfflineInput(NamedTuple):
    """Inputs of one train step on the devices, and the `StepFacts` to log with its metrics."""

    frozen: Frozen
    batch: PreferenceBatch
    facts: StepFacts


@dataclass(frozen=True)
class Offline:
    """A method that trains on a fixed data set: step k's batch is a pure function of (data, seed, k)."""

    setup: Setup
    num_steps: int
    evaluates: bool  # the run has an evaluation set
    manifest: dict[str, Any]
    abstract_state: TrainState
    first_state: Callable[[Any], TrainState]  # compiled, of a `Start`; donates the arrays
    step: TrainStep
    schedule: optax.Schedule
    base: Params | None  # frozen base weights if adapters are trained
    reference: Reference | None  # None: no reference, or it is part of the state
    proven: bool  # the reference equals the initial policy, so the first step's values are known
    packed: Callable[[int], StepData]
    samples: Samples | StartAnswers | None
    to_devices: ToDevices  # for train steps, whose batches have a leading microbatch axis when accumulating
    scores: Mapping[str, PairLogps] = field(default_factory=dict)  # of a reward model, by evaluation set

    def weights(self, state: TrainState) -> Any:
        """Return the weights of the policy: the trained parameters, or the adapters with their base model."""
        return state.params if self.base is None else Adapted(state.params, self.base)

    def reference_of(self, state: TrainState) -> Reference | None:
        """Return the reference, taken from ``state`` if it follows the policy."""
        return self.reference if state.reference is None else LiveReference(state.reference)

    def frozen(self) -> Frozen:
        """Return the weights that a step reads but does not train: the adapters' base, or else a fixed reference."""
        if isinstance(self.reference, LiveReference) and self.base is None:
            return Frozen(reference=self.reference.weights)
        return Frozen(self.base)

    def check_start(self, state: TrainState) -> str | None:
        """If policy and reference have equal weights, check that they agree; otherwise, measure how far apart they are.

        Return what there is to say: their mean margin, or how many answers of a mixture of experts differ.
        """
        logps = start_logps(self.setup, self.reference_of(state), self.weights(state))
        if logps is None:
            return None
        if self.proven:
            return prove_start(self.setup, *logps)
        return f"mean log-ratio margin at step 0: {mean_margin(*logps):.6g} nats"

    def resumed(self, state: TrainState) -> str | None:
        """Return a line with the restored policy's margin, or None if there is no reference."""
        logps = start_logps(self.setup, self.reference_of(state), self.weights(state))
        if logps is None:
            return None
        return f"log-ratio margin of step 1's pairs: {mean_margin(*logps):.6g} nats; times beta, their reward margin"

    def batch(self, step: int, state: TrainState) -> OfflineInput:
        """Return the batch of ``step`` on the devices, with the reference's cached log-probs or its weights."""
        fetch_start = time.perf_counter()
        data = self.packed(step)
        batch = self.to_devices(data.batch)
        frozen = self.frozen()
        if isinstance(self.reference, CachedReference):
            frozen = Frozen(self.base, self.reference.of(data, self.setup.batches.store))
        return OfflineInput(frozen, batch, self._facts(data, time.perf_counter() - fetch_start))

    def _facts(self, data: StepData, wait_seconds: float) -> StepFacts:
        setup, ids = self.setup, data.ids[data.ids >= 0]
        config, store = setup.config, setup.batches.store
        is_proven = self.proven and data.step == 0  # the first step, whose loss and margins are known

        def logged_metrics(metrics: Metrics, totals: Mapping[str, int]) -> Metrics:
            return logged_row(setup, self.schedule, data, metrics, {**totals, "pairs": len(ids)})

        def rates(seconds: float) -> dict[str, float]:
            speeds = step_rates(config, setup.model, setup.mesh, store, data, seconds)
            return speeds | {"data_wait_seconds": wait_seconds}

        def progress_fields(metrics: Metrics, seconds: float) -> dict[str, str]:
            fields = {"loss": f"{metrics['loss']:.4f}"}
            if "rewards/accuracies" in metrics:
                all_tied = is_proven or tied(metrics, AGREEMENT["float32"])  # the first update may change nothing
                fields["acc"] = "tied" if all_tied else f"{metrics['rewards/accuracies']:.2f}"
                fields["margin"] = f"{metrics['rewards/margins']:.3f}"
            unit = "pairs/s" if store.num_targets.shape[1] > 1 else "examples/s"
            return fields | {unit: f"{len(ids) / seconds:.1f}"}

        def check(metrics: Metrics) -> None:
            if is_proven:
                check_first(setup, metrics, data)

        def advice(root: str) -> str:
            rows_text = ", ".join(f"{store.report[store.sources[i]]['source']}:{store.rows[i]}" for i in ids)
            options = new_run(self.manifest["config"], root, keeps_reference=self.reference is not None)
            return (
                f"inspect rows {rows_text}, or start a new run with a lower optimizer.learning_rate: --run.dir NEW, or "
                f"from this checkpoint if the metrics before it look right: {options}"
            )

        return StepFacts({"num_tokens": data.num_tokens}, logged_metrics, rates, progress_fields, check, advice)

    def update(self, state: TrainState, data: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Run one compiled train step; return the new state and the metrics."""
        return self.step(state, data.frozen, data.batch)

    def evaluate(self, state: TrainState) -> Evaluation:
        """Return the metrics of the evaluation sets, the distributions of their margins and rewards, and samples."""
        setup = self.setup
        weights, reference = self.weights(state), self.reference_of(state)
        scored_sets = score_sets(setup.evals, setup.logps_step, setup.to_devices, weights, reference, self.scores)
        metrics, distributions = evaluation_of(scored_sets, setup.config.objective)
        if self.samples is None:
            return Evaluation(metrics, distributions)
        sample_metrics, rows = self.samples.evaluate(weights, state.reference)
        return Evaluation(metrics | sample_metrics, distributions, rows)


def make_offline(
    setup: Setup,
    policy: Policy,
    reference: Reference | None,
    flags: Mapping[str, str],
    samples: Samples | StartAnswers | None,
) -> tuple[Offline, Start]:
    """Build the method and the arrays it starts from; ``flags`` are compiler options of its step."""
    config, mesh, num_steps = setup.config, setup.mesh, setup.batches.order.num_steps
    optimizer = make_optimizer(config.optimizer, num_steps)
    abstract = abstract_state(config, setup.model, mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    reference_follows = follow_of(config) is not None and isinstance(reference, LiveReference)
    trained_weights = policy.weights if policy.adapters is None else policy.adapters
    method = Offline(
        setup=setup,
        num_steps=num_steps,
        evaluates=bool(setup.evals),
        manifest=describe(setup, policy.ids),
        abstract_state=abstract,
        first_state=jax.jit(
            lambda start: init_state(start.trained, optimizer, start.reference),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        step=make_step(config, setup.logps_fn, mesh, optimizer, abstract, flags),
        schedule=make_schedule(config.optimizer, num_steps),
        base=None if policy.adapters is None else policy.weights,
        reference=None if reference_follows else reference,
        proven=reference is not None and starts_equal(config, policy.ids),
        packed=prefetched(setup.batches, range(num_steps)),
        samples=samples,
        to_devices=make_to_devices(mesh, leading=int(config.batch.accumulation > 1)),
    )
    return method, Start(trained_weights, reference.weights if reference_follows else None)
