"""An open run: resume, log, save, stop. Its state may be any pytree.

Every process makes the same calls; only the writer writes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dpo_jax.config import CheckpointConfig, RunConfig
from dpo_jax.console import progress_line, say
from dpo_jax.errors import Preempted, UserError
from dpo_jax.parallel import hosts
from dpo_jax.runs.checkpoint import Checkpoints
from dpo_jax.runs.directory import RunDir, cut_back, hold_run, log_event, log_offsets, lost_saves, writing
from dpo_jax.runs.logs import MetricsLog, all_finite, memory
from dpo_jax.runs.manifest import refuse_changed, rounding_changes
from dpo_jax.runs.profile import trace_edges, traced
from dpo_jax.storage import write_whole

Metrics = Mapping[str, float | int]


class StepFacts(NamedTuple):
    """What the training method provides for logging and checking a step, besides its metrics."""

    counts: Mapping[str, int]  # counters to be summed over the run
    logged: Callable[[Metrics, Mapping[str, int]], Metrics]  # metrics and the run's counts so far -> metrics.jsonl
    rates: Callable[[float], Mapping[str, float]]  # seconds of the step -> timings.jsonl
    shown: Callable[[Metrics, float], Mapping[str, str]]  # metrics and seconds -> the progress line
    check: Callable[[Metrics], None]  # raises `UserError` if the metrics are not what is known of this step
    advice: Callable[[Path], str]  # the run's root -> what to do if loss or gradient is not finite


class NotFinite(Exception):
    """The loss or gradient of a step is NaN or infinite, after ``done`` good steps."""

    def __init__(self, text: str, done: int):
        super().__init__(text)
        self.done = done


@contextmanager
def lock_run(directory: str) -> Iterator[RunDir]:
    """Context manager that yields the run directory, locked by the writer process."""
    with ExitStack() as stack:
        run, error = RunDir(Path(directory).expanduser().absolute()), None
        if hosts.is_writer():
            try:
                run = stack.enter_context(hold_run(directory))
                log_event(run, "start", devices=jax.device_count(), processes=jax.process_count())
            except UserError as refusal:
                error = refusal
        hosts.agree(error, "run directory")
        yield run


@contextmanager
def open_session(
    run: RunDir, config: RunConfig, checkpoint: CheckpointConfig, manifest: Mapping[str, Any], num_steps: int
) -> Iterator["Session"]:
    """Context manager for the session of a locked run; a resumed run must match its old ``manifest``."""
    with (
        Checkpoints(run.checkpoints, checkpoint) as saves,
        MetricsLog(run, config, hosts.is_writer()) as log,
        hosts.stop_signals() as stop_requested,
    ):
        save_every = checkpoint.every or max(1, num_steps // 10)
        yield Session(run, config, manifest, num_steps, save_every, saves, log, stop_requested)


class Due(NamedTuple):
    """The actions due after a step, in this order."""

    evaluation: bool = False
    save: bool = False
    stop: bool = False


class Session:
    """Logs, checkpoints and clocks of a run. A step's metrics are read while the next step runs."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        manifest: Mapping[str, Any],
        num_steps: int,
        save_every: int,
        saves: Checkpoints,
        log: MetricsLog,
        stop_requested: Callable[[int], bool],
    ):
        self.run, self._config, self._manifest = run, config, manifest
        self._num_steps, self._save_every = num_steps, save_every
        self._saves, self._log, self._stop_requested = saves, log, stop_requested
        self._totals: dict[str, int] = {}
        self._pending: tuple[int, Mapping[str, jax.Array], StepFacts] | None = None  # not read yet
        self._evaluation: Mapping[str, float] | None = None  # metrics of the last evaluation
        self.due = Due()  # actions due after the last logged step

    def resume(self, abstract_state: Any) -> tuple[Any, int] | None:
        """Restore the newest usable checkpoint and its step, and truncate the logs to it; None if there is none."""
        saved = self._saves.manifest()
        if saved is not None:
            refuse_changed(saved, self._manifest, str(self.run.root))
        restored = self._saves.restore(abstract_state)
        if restored is None:
            hosts.agree(lost_saves(self.run) if hosts.is_writer() else None, "saved steps")
            return None
        state, manifest = restored
        if hosts.is_writer():
            cut_back(self.run, manifest["offsets"])
            log_event(self.run, "restore", step=manifest["step"])
        self.say(f"resuming from step {manifest['step']} of {self._num_steps}")
        for line in rounding_changes(manifest, self._manifest):
            self.say(f"results are no longer bit-identical: {line}")
        self._totals = dict(manifest["extras"])
        return state, manifest["step"]

    def begin(self) -> None:
        """Empty the logs of an earlier attempt that stopped before its first save."""
        if hosts.is_writer():
            cut_back(self.run, {log.name: 0 for log in self.run.logs})

    def write_config(self, text: str) -> None:
        """Write the resolved options, also on resume, as some options may have changed."""
        if hosts.is_writer():
            with writing(self.run.config):
                write_whole(self.run.config, text)

    def say(self, line: str | None) -> None:
        """Print a line for the user; None prints nothing."""
        if line is not None:
            say(self._config.progress, line)

    @contextmanager
    def steps(self, first: int, evaluates: bool) -> Iterator[Iterator[int]]:
        """Context manager that yields the remaining steps, counted from 0, with progress line and profiler.

        With ``evaluates``, an evaluation is due every ``run.eval_every`` steps and after the last step.
        """
        self._evaluates = evaluates
        self._edges, remaining = trace_edges(self._config.profile_steps), range(first, self._num_steps)
        shows_progress = self._config.progress and hosts.is_writer()
        with (
            progress_line(first, self._num_steps, "step", shows_progress) as self._line,
            traced(remaining, self._config, self.run) as steps,
        ):
            self._clock = time.perf_counter()
            yield steps

    def log(self, step: int, metrics: Mapping[str, jax.Array], facts: StepFacts) -> None:
        """Accept a step's metrics and log those of the previous step, and its own too if an action is due after it.

        Raises:
            NotFinite: the loss or gradient is not finite; the message names step and rows.
        """
        if self._pending is not None:
            self._read(*self._pending)
        self._pending = step, metrics, facts
        done = step + 1
        is_last = done == self._num_steps
        stop = self._stop_requested(done) and not is_last
        self.due = Due(
            evaluation=self._evaluates and (is_last or _every(self._config.eval_every, done)),
            save=is_last or stop or _every(self._save_every, done),
            stop=stop,
        )
        if self.due.evaluation or self.due.save or done in self._edges:
            self._read(*self._pending)
            self._pending = None

    def _read(self, step: int, pending: Mapping[str, jax.Array], facts: StepFacts) -> None:
        """Wait for a step's metrics, check them and log them."""
        metrics = {name: value.item() for name, value in jax.device_get(pending).items()}
        now = time.perf_counter()
        done = step + 1
        if not all_finite(metrics):
            self.due = Due()
            raise NotFinite(
                f"step {done}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: the run is stopped, the "
                f"state after step {step} is saved; {facts.advice(self.run.root)}",
                step,
            )
        facts.check(metrics)
        for name, count in facts.counts.items():
            self._totals[name] = self._totals.get(name, 0) + count
        seconds, self._clock = now - self._clock, now
        if _every(self._config.log_every, done) or done == self._num_steps:
            self._log.metrics(done, facts.logged(metrics, self._totals))
            self._log.timings(done, {**facts.rates(seconds), **memory()})
        self._line.set_postfix(facts.shown(metrics, seconds), refresh=False)
        self._line.update(1)

    def log_evaluation(
        self, step: int, metrics: Mapping[str, float], distributions: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log an evaluation after ``step`` steps; at step 0, also check that it contains ``best_metric``."""
        if metrics:
            self._log.evaluation(step, metrics, distributions)
        if step == 0:
            self._saves.refuse_unmeasured(metrics)
        self._evaluation = metrics
        self._clock = time.perf_counter()

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Start saving the state after ``step`` steps, together with the current lengths of the logs."""
        start_time = time.perf_counter()
        offsets = log_offsets(self.run) if hosts.is_writer() else {}
        manifest = {**self._manifest, "offsets": offsets, "extras": self._totals}
        evaluation = self._evaluation if self.due.evaluation else None
        self._saves.save(step, state, manifest, evaluation, wait=wait or self.due.stop)
        if hosts.is_writer():
            log_event(self.run, "save", step=step, seconds=round(time.perf_counter() - start_time, 3))
        self._clock = time.perf_counter()

    def stop_if_asked(self, step: int) -> None:
        """End the run after its save if a stop was requested.

        Raises:
            Preempted: a stop was requested.
        """
        if not self.due.stop:
            return
        if hosts.is_writer():
            log_event(self.run, "preempt", step=step)
        raise Preempted(
            f"{self.run.root}: stopped after step {step} of {self._num_steps}, the state is saved: "
            "run the same command again to resume"
        )


def _every(interval: int, done: int) -> bool:
    return interval > 0 and done % interval == 0
