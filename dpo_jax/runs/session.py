"""An open run: resume, log, save, stop. Its state may be any pytree.

Every process makes the same calls; only the writer writes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from dpo_jax.bucket import LAST_SECONDS, RETRY
from dpo_jax.config import CheckpointConfig, RunConfig
from dpo_jax.console import progress_line, say, warn
from dpo_jax.errors import Preempted, StorageDenied, StorageUnreachable, UserError, reason
from dpo_jax.parallel import hosts
from dpo_jax.runs.checkpoint import Checkpoints
from dpo_jax.runs.directory import (
    RunDir,
    empty_logs,
    locked_run,
    log_event,
    log_offsets,
    lost_checkpoints,
    run_at,
    truncate_logs,
    writing,
)
from dpo_jax.runs.logs import Evaluation, MetricsLog, peak_memory
from dpo_jax.runs.manifest import refuse_changed, rounding_changes
from dpo_jax.runs.mirror import empty
from dpo_jax.runs.profile import trace_edges, traced
from dpo_jax.storage import write_atomically

RESUME = "run the same command again to resume"
RETRY_SECONDS = 5.0  # between attempts to write a save that must not fail

Metrics = Mapping[str, float | int]


class StepFacts(NamedTuple):
    """What a training method provides, besides metrics, for logging and checking one step."""

    counts: Mapping[str, int]  # counters to be summed over the run
    log_row: Callable[[Metrics, Mapping[str, int]], Metrics]  # metrics and the run's counts so far -> metrics.jsonl
    rates: Callable[[float], Mapping[str, float]]  # seconds of the step -> timings.jsonl
    progress_metrics: Callable[[Metrics, float], Mapping[str, str]]  # metrics and seconds -> the progress line
    check: Callable[[Metrics], None]  # raises `UserError` if the metrics are not as expected at this step
    advice: Callable[[str], str]  # the run's path or url -> what to do if loss or gradient is not finite


class NotFinite(Exception):
    """Raised if a step's loss or gradient is NaN or infinite; ``num_done`` is the number of good steps before it."""

    def __init__(self, text: str, num_done: int):
        super().__init__(text)
        self.num_done = num_done


@contextmanager
def lock_run(directory: str) -> Iterator[RunDir]:
    """Context manager that locks the run directory on the writer process and yields its paths on all processes."""
    with _resumable(), ExitStack() as stack:
        run, error = run_at(directory, jax.process_index()), None
        try:
            if run.mirror is not None:
                run.mirror.bucket.connect()
            if hosts.is_writer():
                run = stack.enter_context(locked_run(directory, warn))
                log_event(run, "start", devices=jax.device_count(), processes=jax.process_count())
        except StorageDenied as denied:
            error = UserError(f"run.dir: {denied}")  # before the run began
        except UserError as user_error:
            error = user_error
        hosts.agree(error, "run directory")
        with failure_logged(run):
            yield run


@contextmanager
def _resumable() -> Iterator[None]:
    """Context manager that says of storage that does not answer how the run is resumed."""
    try:
        yield
    except StorageUnreachable as error:
        raise StorageUnreachable(f"{str(error).removesuffix(RETRY)}: {RESUME}") from error


@contextmanager
def failure_logged(run: RunDir) -> Iterator[None]:
    """Context manager that logs the error a run ends with, for whoever looks when its machine is gone."""
    try:
        yield
    except Exception as error:
        if hosts.is_writer() and not isinstance(error, Preempted):
            text = str(error) if isinstance(error, UserError) else reason(error)
            with suppress(UserError):  # such as a full disk, of which the error itself may tell
                log_event(run, "error", exit_code=getattr(error, "exit_code", 1), text=text)
        raise


@contextmanager
def open_session(
    run: RunDir, config: RunConfig, checkpoint: CheckpointConfig, manifest: Mapping[str, Any], num_steps: int
) -> Iterator["Session"]:
    """Context manager that opens a session of a locked run; a checkpoint to resume from must match ``manifest``."""
    with (
        hosts.stop_signals() as stop_requested,  # first, so that a signal does not break off the last save
        Checkpoints(run.checkpoints, checkpoint) as checkpoints,
        MetricsLog(run, config, hosts.is_writer()) as logs,
    ):
        save_every = checkpoint.every or max(1, num_steps // 10)
        yield Session(run, config, manifest, num_steps, save_every, checkpoints, logs, stop_requested)


class Due(NamedTuple):
    """The actions due after a step, in this order."""

    evaluation: bool = False
    save: bool = False
    stop: bool = False


@dataclass
class Session:
    """Logs, checkpoints and clocks of a run. A step's metrics are read while the next step runs."""

    run: RunDir
    _config: RunConfig
    _manifest: Mapping[str, Any]
    _num_steps: int
    _save_every: int
    _checkpoints: Checkpoints
    _logs: MetricsLog
    _stop_requested: Callable[[int], bool]
    due: Due = field(default_factory=Due)  # actions due after the last logged step
    _totals: dict[str, int] = field(default_factory=dict)  # counts of all steps, by name
    _pending: tuple[int, Mapping[str, jax.Array], StepFacts] | None = None  # the last step, if not read yet
    _evaluation: Mapping[str, float] | None = None  # metrics of the last evaluation
    _evaluates: bool = False
    _trace_edges: set[int] = field(default_factory=set)  # steps to wait for, so that the profiler traces whole steps
    _progress: Any = field(init=False)  # tqdm progress bar
    _clock: float = field(init=False)  # when the last step, evaluation or save ended

    def resume(self, abstract_state: Any) -> tuple[Any, int] | None:
        """Restore the newest usable checkpoint, if any, and truncate the logs to it; return state and step, or None."""
        saved_manifest = self._checkpoints.manifest()
        if saved_manifest is not None:
            refuse_changed(saved_manifest, self._manifest, self.run.location)
        restored = self._checkpoints.restore(abstract_state)
        if restored is None:
            hosts.agree(lost_checkpoints(self.run) if hosts.is_writer() else None, "saved steps")
            return None
        state, manifest = restored
        if hosts.is_writer():
            truncate_logs(self.run, manifest["offsets"])
            log_event(self.run, "restore", step=manifest["step"])
        self.say(f"resuming from step {manifest['step']} of {self._num_steps}")
        for line in rounding_changes(manifest, self._manifest):
            self.say(f"results are no longer bit-identical: {line}")
        self._totals = dict(manifest["extras"])
        return state, manifest["step"]

    def begin(self) -> None:
        """Empty the logs, as an earlier attempt may have stopped before its first save."""
        if hosts.is_writer():
            empty_logs(self.run)

    def write_config(self, text: str) -> None:
        """Write the resolved options, also on resume, as some options may have changed.

        Of a run in a bucket, all processes then have a copy of the files that the writer has.
        """
        if hosts.is_writer():
            with writing(self.run.config):
                write_atomically(self.run.config, text)
        if self.run.mirror is not None and jax.process_count() > 1:
            hosts.on_writer(self.run.push, "files of the run")
            if not hosts.is_writer():
                empty(self.run.root)
                self.run.mirror.pull()

    def say(self, line: str | None) -> None:
        """Print a line for the user, unless it is None."""
        if line is not None:
            say(self._config.progress, line)

    @contextmanager
    def steps(self, first: int, evaluates: bool) -> Iterator[Iterator[int]]:
        """Context manager that yields the remaining steps, counted from 0, with progress line and profiler.

        With ``evaluates``, an evaluation is due every ``run.eval_every`` steps and after the last step.
        """
        self._evaluates = evaluates
        self._trace_edges, remaining = trace_edges(self._config.profile_steps), range(first, self._num_steps)
        shows_progress = self._config.progress and hosts.is_writer()
        with (
            progress_line(first, self._num_steps, "step", shows_progress) as self._progress,
            traced(remaining, self._config, self.run) as steps,
        ):
            self._clock = time.perf_counter()
            yield steps

    def log(self, step: int, metrics: Mapping[str, jax.Array], facts: StepFacts) -> None:
        """Log the metrics of the previous step, and those of this step too if an action is due after it.

        Raises:
            NotFinite: the loss or gradient is not finite; the message names step and rows.
        """
        if self._pending is not None:
            self._read(*self._pending)
        self._pending = step, metrics, facts
        num_done = step + 1
        is_last = num_done == self._num_steps
        stop = not is_last and self._stop_requested(num_done)
        self.due = Due(
            evaluation=self._evaluates and (is_last or _every(self._config.eval_every, num_done)),
            save=is_last or stop or _every(self._save_every, num_done),
            stop=stop,
        )
        if self.due.evaluation or self.due.save or num_done in self._trace_edges:
            self._read(*self._pending)
            self._pending = None

    def _read(self, step: int, pending: Mapping[str, jax.Array], facts: StepFacts) -> None:
        """Wait for a step's metrics, check them, and log them every ``run.log_every`` steps."""
        metrics = {name: value.item() for name, value in jax.device_get(pending).items()}
        now = time.perf_counter()
        num_done = step + 1
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            self.due = Due()
            raise NotFinite(
                f"step {num_done}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: the run stopped, and "
                f"the state after step {step} is saved; {facts.advice(self.run.location)}",
                step,
            )
        facts.check(metrics)
        for name, count in facts.counts.items():
            self._totals[name] = self._totals.get(name, 0) + count
        seconds, self._clock = now - self._clock, now
        if _every(self._config.log_every, num_done) or num_done == self._num_steps:
            self._logs.metrics(num_done, facts.log_row(metrics, self._totals))
            self._logs.timings(num_done, {**facts.rates(seconds), **peak_memory()})
        self._progress.set_postfix(facts.progress_metrics(metrics, seconds), refresh=False)
        self._progress.update(1)

    def log_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log an evaluation after ``step`` steps; at step 0, also check that it contains ``best_metric``."""
        if evaluation.metrics:
            self._logs.evaluation(step, evaluation)
        if step == 0:
            self._checkpoints.check_best_metric(evaluation.metrics)
        self._evaluation = evaluation.metrics
        self._clock = time.perf_counter()

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Start saving the state after ``step`` steps, together with the current lengths of the logs.

        If the storage of a bucket does not answer, a save is left out, as the next one comes; but the last one, and
        one before a stop, are tried again for ``LAST_SECONDS``.

        Raises:
            StorageUnreachable: such a save could not be written.
        """
        wait = wait or self.due.stop
        if self.run.mirror is None:
            return self._save(step, state, wait)
        is_last = wait or step == self._num_steps
        deadline = time.monotonic() + LAST_SECONDS
        while True:
            try:
                return self._save(step, state, wait=is_last)
            except StorageUnreachable as error:
                if hosts.is_writer():
                    log_event(self.run, "save_failed", step=step)
                if is_last and not hosts.on_writer(lambda: time.monotonic() < deadline, "retry of a save"):
                    raise
                plan = "trying again" if is_last else "training continues, and the next save is due as planned"
                warn(f"the save after step {step} failed: {str(error).removesuffix(RETRY)}: {plan}")
                if not is_last:
                    return None
                time.sleep(RETRY_SECONDS)

    def _save(self, step: int, state: Any, wait: bool) -> None:
        start_time = time.perf_counter()
        if self.run.mirror is not None:
            self._report_failed_save()
            hosts.on_writer(self.run.push, "logs in the bucket")
        offsets = log_offsets(self.run) if hosts.is_writer() else {}
        manifest = {**self._manifest, "offsets": offsets, "extras": self._totals}
        evaluation = self._evaluation if self.due.evaluation else None
        self._checkpoints.save(step, state, manifest, evaluation, wait=wait)
        if hosts.is_writer():
            log_event(self.run, "save", step=step, seconds=round(time.perf_counter() - start_time, 3))
        self._clock = time.perf_counter()

    def _report_failed_save(self) -> None:
        """Wait for the save in progress, and report if the storage of a bucket did not take it."""
        try:
            self._checkpoints.wait()
        except StorageUnreachable as error:
            if hosts.is_writer():
                log_event(self.run, "save_failed")
            warn(f"the last save failed: {str(error).removesuffix(RETRY)}: training continues")

    def stop_if_asked(self, step: int) -> None:
        """Raise ``Preempted`` if a stop was requested; the caller has saved the state."""
        if not self.due.stop:
            return
        if hosts.is_writer():
            log_event(self.run, "preempt", step=step)
        raise Preempted(
            f"{self.run.location}: stopped after step {step} of {self._num_steps}, the state is saved: {RESUME}"
        )


def _every(interval: int, num_done: int) -> bool:
    return interval > 0 and num_done % interval == 0
