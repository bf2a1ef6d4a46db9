"""A run, from its config to an aligned model: the only place that wires one, for both stages.

Read it top to bottom: ``train`` is the story, what it calls follows in the order of the calls.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from dpo_jax.batching.batches import StepData
from dpo_jax.config import DPOConfig, SFTConfig
from dpo_jax.config.file import config_to_yaml
from dpo_jax.console import lossy_streams, progress_line, say
from dpo_jax.errors import Preempted, RunStopped, UserError
from dpo_jax.inference.agreement import AGREEMENT, tied
from dpo_jax.inference.reference import LiveReference, Reference
from dpo_jax.logprobs import Params
from dpo_jax.methods.optimizer import make_optimizer, make_schedule
from dpo_jax.methods.setup import (
    Parts,
    assemble,
    describe,
    evaluate_sets,
    initial_state,
    make_step,
    notes_of,
    starting_weights,
    step_reference,
)
from dpo_jax.methods.start_check import check_first, mean_margin, prove_start, start_logps, starts_equal
from dpo_jax.methods.throughput import step_rates
from dpo_jax.models.adapters import Adapted
from dpo_jax.models.decoder import count_adapters, count_params
from dpo_jax.parallel import hosts
from dpo_jax.parallel.compiler import compiler_options
from dpo_jax.parallel.rendezvous import start_hosts
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.reports.run import report_done
from dpo_jax.runs.checkpoint import Checkpoints
from dpo_jax.runs.directory import (
    RunDir,
    cut_back,
    hold_run,
    last_metrics,
    log_event,
    log_offsets,
    lost_saves,
    replace_text,
)
from dpo_jax.runs.logs import MetricsLog, all_finite, clipped, memory, plain
from dpo_jax.runs.manifest import new_run, refuse_changed, rounding_changes
from dpo_jax.runs.profile import refuse_window, trace_edges, traced
from dpo_jax.step import TrainState, TrainStep
from dpo_jax.weights.open import export_run, keep_model_files

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Job:
    """A run's parts and what it writes to. Only the reference may change, where it follows the policy."""

    run: RunDir
    parts: Parts
    base: Params | None  # the frozen weights, where adapters are trained
    reference: Reference | None
    proven: bool  # the reference is the policy's own start, so the first step's values are known
    step: TrainStep
    schedule: optax.Schedule
    saves: Checkpoints
    log: MetricsLog
    manifest: dict[str, Any]

    def policy(self, state: TrainState) -> Any:
        """The weights that score."""
        return state.params if self.base is None else Adapted(state.params, self.base)

    @property
    def syncs(self) -> bool:
        """The reference follows the policy, so it is a part of what is saved."""
        return isinstance(self.parts.config, DPOConfig) and self.parts.config.reference.sync_every > 0


@dataclass
class Progress:
    """How far the run is."""

    done: int  # steps
    num_tokens: int


def train(
    config: DPOConfig | SFTConfig,
    *,
    train_set: "Dataset | None" = None,
    eval_sets: "Mapping[str, Dataset] | None" = None,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Run DPO, or supervised fine-tuning, as the config says; an interrupted run resumes where it was saved.

    ``train_set`` and ``eval_sets`` stand in for those that the config names, ``devices`` for all there are. Returns
    the last step's metrics and the last evaluation.

    Raises:
        UserError: something in config, data, model or run directory is wrong.
        Preempted: SIGTERM or Ctrl-C came; the state is saved.
        RunStopped: loss or gradient became NaN or infinite; the state before that step is saved.
    """
    start_hosts()
    hosts.keep_compilations()
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh), lossy_streams(), held(config.run.dir) as run:
        # Data and model
        parts = assemble(config, mesh, train_set, eval_sets)
        refuse_window(config.run.profile_steps, parts.batches.order.num_steps)
        flags = compiler_options(mesh, config.run.compiler_flags)
        announce(parts, run)

        # Weights
        start, base, reference, ids = starting_weights(parts)

        # State and step
        num_steps = parts.batches.order.num_steps
        optimizer = make_optimizer(config.optimizer, num_steps)
        fresh, abstract = initial_state(parts, optimizer)
        step = make_step(config, parts.logps_fn, mesh, optimizer, abstract, flags)

        with (
            Checkpoints(run.checkpoints, config.checkpoint) as saves,
            MetricsLog(run, config.run, hosts.is_writer()) as log,
            hosts.stop_signals() as stop_requested,
        ):
            job = Job(
                run=run,
                parts=parts,
                base=base,
                reference=reference,
                proven=reference is not None and starts_equal(config, ids),
                step=step,
                schedule=make_schedule(config.optimizer, num_steps),
                saves=saves,
                log=log,
                manifest=describe(parts, ids),
            )
            state, progress = resume(job, abstract) or begin(job, fresh(start))
            if hosts.is_writer():
                replace_text(run.config, config_to_yaml(config))  # what runs now: free options may change on resume
            del start
            state = run_steps(job, state, progress, stop_requested)
        finish(job, state)
    return last_metrics(run)


@contextmanager
def held(directory: str) -> Iterator[RunDir]:
    """The run directory, locked by the process that writes to it."""
    with ExitStack() as stack:
        run, error = RunDir(Path(directory).expanduser().absolute()), None
        if hosts.is_writer():
            try:
                run = stack.enter_context(hold_run(directory))
                log_event(run, "start", devices=jax.device_count(), processes=jax.process_count())
            except UserError as refused:
                error = refused
        hosts.agree(error, "run directory")
        yield run


def announce(parts: Parts, run: RunDir) -> None:
    """Log model, mesh and data sizes; record dropped rows and notes in events.jsonl."""
    config, batches = parts.config, parts.batches
    order, shapes = batches.order, batches.packer.shapes
    eval_sizes = {name: len(eval_batches.order.groups[0]) for name, eval_batches in parts.evals.items()}
    notes = notes_of(parts)
    causes: Counter[str] = Counter()
    for source in batches.store.report:
        causes.update({cause: entry["count"] for cause, entry in source["dropped"].items()})
    if hosts.is_writer():
        num_rows = sum(source["rows"] for source in batches.store.report)
        log_event(
            run, "data", rows=num_rows, train=order.epoch_draws, evals=eval_sizes, dropped=dict(causes), notes=notes
        )
    evals = "".join(f", {count} in {name}" for name, count in eval_sizes.items())
    dropped = ", ".join(f"{count} rows dropped: {cause}" for cause, count in causes.items()) or "no row dropped"
    rows = " or ".join(f"{shape.rows} x {shape.length}" for shape in shapes)
    mesh = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    adapted = f", {count_adapters(parts.model):,} more in adapters" if parts.model.lora is not None else ""
    size = f"{count_params(parts.model):,} parameters{adapted}, {parts.model.dtype}"
    say(config.run.progress, f"model: {size}; mesh: {mesh}")
    say(config.run.progress, f"data: {order.epoch_draws} to train on{evals}; {dropped}")
    say(config.run.progress, f"steps: {order.num_steps} of {order.batch} each, in rows of {rows} tokens")
    for line in notes:
        say(config.run.progress, f"note: {line}")


def resume(job: Job, abstract: TrainState) -> tuple[TrainState, Progress] | None:
    """The newest good save, with the logs cut back to it; None: nothing was saved yet."""
    show = job.parts.config.run.progress
    old = job.saves.manifest()
    if old is not None:
        refuse_changed(old, job.manifest, str(job.run.root))
    restored = job.saves.restore(to_save(job, abstract))
    if restored is None:
        hosts.agree(lost_saves(job.run) if hosts.is_writer() else None, "saved steps")
        return None
    state, manifest = restored
    if job.syncs:
        job.reference = LiveReference(state.pop("reference"))
        state = TrainState(**state)
    if hosts.is_writer():
        cut_back(job.run, manifest["offsets"])
        log_event(job.run, "restore", step=manifest["step"])
    say(show, f"resuming from step {manifest['step']} of {job.parts.batches.order.num_steps}")
    for line in rounding_changes(manifest, job.manifest):
        say(show, f"not bit for bit the same from here on: {line}")
    if job.reference is not None:
        margin = mean_margin(*start_logps(job.parts, job.reference, job.policy(state)))
        say(show, f"log-ratio margin of step 1's pairs: {margin:.6g} nats, by beta their reward margin")
    return state, Progress(manifest["step"], manifest["extras"]["num_tokens"])


def to_save(job: Job, state: TrainState) -> Any:
    """What a save holds: the state, and with it a reference that follows the policy."""
    if not job.syncs:
        return state
    assert isinstance(job.reference, LiveReference)
    return vars(state) | {"reference": job.reference.params}


def begin(job: Job, state: TrainState) -> tuple[TrainState, Progress]:
    """Start a new run: logs emptied, model files kept, the start proven and evaluated."""
    if hosts.is_writer():
        cut_back(job.run, {log.name: 0 for log in job.run.logs})
        keep_model_files(job.run, job.parts.source, job.parts.tokenizer)
    if job.reference is not None:
        logps = start_logps(job.parts, job.reference, job.policy(state))
        if job.proven:
            prove_start(job.parts, *logps)
        else:
            say(job.parts.config.run.progress, f"mean margin at the start: {mean_margin(*logps):.6g} nats")
    measured: dict[str, float] = {}
    if job.parts.evals:
        measured, distributions = evaluate_sets(job.parts, job.policy(state), job.reference)
        job.log.evaluation(0, measured, distributions)
    job.saves.refuse_unmeasured(measured)  # before any step is made
    return state, Progress(0, 0)


def run_steps(job: Job, state: TrainState, progress: Progress, stop_requested: Callable[[int], bool]) -> TrainState:
    """Every step that is left. A step's metrics are read while the next one runs.

    Order at a step's end: its metrics, evaluation, save, stop; so that a save holds all that came before it.
    """
    parts, config = job.parts, job.parts.config
    num_steps = parts.batches.order.num_steps
    save_every = config.checkpoint.every or max(1, num_steps // 10)
    to_devices = parts.place_parts
    pending: _Pending | None = None
    left, edges = range(progress.done, num_steps), trace_edges(config.run.profile_steps)
    coming, shown = parts.batches.ahead(left), config.run.progress and hosts.is_writer()
    with progress_line(progress.done, num_steps, "step", shown) as line, traced(left, config.run, job.run) as steps:
        clock = time.perf_counter()
        try:
            for step in steps:
                asked = time.perf_counter()
                data = next(coming)
                batch = to_devices(data.batch)
                reference = step_reference(job.reference, job.base, data, parts.batches.store)
                waited = time.perf_counter() - asked
                state, metrics = job.step(state, reference, batch)
                sync_reference(job, state, step + 1)
                if pending is not None:
                    clock = record(job, pending, progress, line, clock)
                pending = _Pending(data, metrics, waited)

                last = step + 1 == num_steps
                evaluates = bool(parts.evals) and (last or _every(config.run.eval_every, step + 1))
                stops = stop_requested(step + 1) and not last
                saves = last or stops or _every(save_every, step + 1)
                if evaluates or saves or step + 1 in edges:
                    clock, pending = record(job, pending, progress, line, clock), None
                evaluation = None
                if evaluates:
                    evaluation, distributions = evaluate_sets(parts, job.policy(state), job.reference)
                    job.log.evaluation(step + 1, evaluation, distributions)
                if saves:
                    save(job, state, progress, evaluation, wait=stops)
                if stops:
                    _preempt(job, progress, num_steps)
                if evaluates or saves:
                    clock = time.perf_counter()
        except NotFinite as bad:
            good = replace(state, healthy=jax.device_put(np.ones((), bool), state.healthy.sharding))
            save(job, good, progress, None, wait=True)
            raise RunStopped(str(bad)) from bad
    return state


@dataclass(frozen=True)
class _Pending:
    """A step whose metrics are still on the devices."""

    data: StepData
    metrics: dict[str, jax.Array]
    waited: float  # seconds for its batch


class NotFinite(Exception):
    """Loss or gradient of a step is NaN or infinite."""


def sync_reference(job: Job, state: TrainState, done: int) -> None:
    """Move the reference towards the policy, after the updates at which the config says so."""
    config = job.parts.config
    if job.syncs and isinstance(config, DPOConfig) and _every(config.reference.sync_every, done):
        assert isinstance(job.reference, LiveReference)
        job.reference = job.reference.mixed(state, config.reference.sync_mix)


def _every(interval: int, done: int) -> bool:
    return interval > 0 and done % interval == 0


def record(job: Job, pending: _Pending, progress: Progress, line: Any, clock: float) -> float:
    """Wait for a step, check it, log it; the time at which it was done.

    Raises:
        NotFinite: naming step and rows; the progress stays before that step.
    """
    config, data, store = job.parts.config, pending.data, job.parts.batches.store
    values = {name: plain(value) for name, value in jax.device_get(pending.metrics).items()}
    now = time.perf_counter()
    real = data.ids[data.ids >= 0]
    if not all_finite(values):
        rows = ", ".join(f"{job.parts.sets.train.report[store.sources[i]]['source']}:{store.rows[i]}" for i in real)
        raise NotFinite(
            f"step {data.step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: the run is stopped, "
            f"the state after step {data.step} is saved; look at rows {rows}, or start a new run with "
            "a lower optimizer.learning_rate: --run.dir NEW, or from this save, if the metrics before are sound: "
            + new_run(job.manifest["config"], job.run.root, job.reference is not None and not job.syncs)
        )
    proven = data.step == 0 and job.proven
    if proven:
        check_first(job.parts, values, data)
    progress.done = data.step + 1
    progress.num_tokens += data.num_tokens
    seconds = now - clock
    if _every(config.run.log_every, progress.done) or progress.done == job.parts.batches.order.num_steps:
        order = job.parts.batches.order
        facts = {
            "learning_rate": float(np.float32(jax.device_get(job.schedule(data.step)))),
            "epoch": order.epoch(progress.done),
            "num_tokens": progress.num_tokens,
            "pairs": len(real),
            "fill": data.fill,
        }
        job.log.metrics(progress.done, values | facts | clipped(values, config.optimizer.max_grad_norm))
        rates = step_rates(config, job.parts.model, job.parts.mesh, store, data, seconds)
        job.log.timings(progress.done, rates | {"data_wait_seconds": pending.waited} | memory())
    shown = {"loss": f"{values['loss']:.4f}"}
    if "rewards/accuracies" in values:
        ties = proven or tied(values, AGREEMENT["float32"])  # a warm-up's first update may change nothing
        accuracy = "tied" if ties else f"{values['rewards/accuracies']:.2f}"
        shown |= {"acc": accuracy, "margin": f"{values['rewards/margins']:.3f}"}
    unit = "pairs/s" if isinstance(config, DPOConfig) else "examples/s"
    line.set_postfix(shown | {unit: f"{len(real) / seconds:.1f}"}, refresh=False)
    line.update(1)
    return now


def save(job: Job, state: TrainState, progress: Progress, evaluation: Mapping[str, float] | None, wait: bool) -> None:
    """Begin to save the state after ``progress.done`` steps, with the lengths of the logs at this moment."""
    started = time.perf_counter()
    offsets = log_offsets(job.run) if hosts.is_writer() else {}
    manifest = job.manifest | {"offsets": offsets, "extras": {"num_tokens": progress.num_tokens}}
    job.saves.save(progress.done, to_save(job, state), manifest, evaluation, wait=wait)
    if hosts.is_writer():
        log_event(job.run, "save", step=progress.done, seconds=round(time.perf_counter() - started, 3))


def _preempt(job: Job, progress: Progress, num_steps: int) -> None:
    if hosts.is_writer():
        log_event(job.run, "preempt", step=progress.done)
    raise Preempted(f"{job.run.root}: stopped after step {progress.done} of {num_steps}, the state is saved: "
                    "run the same command again to resume")  # fmt: skip


def finish(job: Job, state: TrainState) -> None:
    """Export, report, and say where they are."""
    config = job.parts.config
    if config.run.export:
        export_run(job.run, job.run.export, job.parts.model, job.policy(state), overwrite=True)
        say(config.run.progress, f"export: {job.run.export}")
    if not hosts.is_writer():
        return
    log_event(job.run, "end", step=job.parts.batches.order.num_steps)
    if config.run.report:
        stores = {"train": job.parts.batches.store}
        stores |= {name: one.store for name, one in job.parts.evals.items() if one.store is not stores["train"]}
        report_done(job.run.root, {name: store.report for name, store in stores.items()}, config.run.progress)
    say(config.run.progress, f"done: {job.run.root}")
