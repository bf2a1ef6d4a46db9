"""Profiler traces of the steps in ``run.profile_steps``."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import jax

from dpo_jax.config import RunConfig
from dpo_jax.console import say
from dpo_jax.errors import require
from dpo_jax.runs.directory import RunDir


def refuse_window(window: Sequence[int], num_steps: int) -> None:
    """Raise ``UserError`` if the run ends before the last step to be traced."""
    remedy = f"the run has {num_steps} steps; choose earlier steps"
    require(not window or window[-1] <= num_steps, "run.profile_steps", list(window), remedy)


def trace_edges(window: Sequence[int]) -> set[int]:
    """Return the steps, counted from 1, whose end to wait for, so that exactly the window's steps are traced."""
    return {window[0] - 1, window[1]} if window else set()


@contextmanager
def traced(steps: range, config: RunConfig, run: RunDir) -> Iterator[Iterator[int]]:
    """Context manager that yields ``steps``, counted from 0, and traces ``config.profile_steps`` to ``run.profile``.

    The caller must wait for the steps of ``trace_edges``. A run that resumes within the window traces the rest of it.
    """
    window, trace = config.profile_steps, ExitStack()

    def stop() -> None:
        jax.profiler.stop_trace()
        say(config.progress, f"profiler trace of steps {window[0]} to {window[1]}: {run.profile}")

    def iterate_steps() -> Iterator[int]:
        for step in steps:
            if not window or not window[0] <= step + 1 <= window[1]:
                yield step
                continue
            if step + 1 == max(window[0], steps.start + 1):
                jax.profiler.start_trace(run.profile)
                trace.callback(stop)
            with jax.profiler.StepTraceAnnotation("step", step_num=step + 1):
                yield step
            if step + 1 == window[1]:
                trace.close()

    with trace:  # also closes the trace if the run stops within the window
        yield iterate_steps()
