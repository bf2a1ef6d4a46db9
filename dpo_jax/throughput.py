"""How fast a run is: rates of a step, its share of what the chips could do, and traces of chosen steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.chips import chip_of
from dpo_jax.config import DPOConfig, RunConfig, SFTConfig
from dpo_jax.console import say
from dpo_jax.data.batches import StepData
from dpo_jax.data.store import Store
from dpo_jax.errors import UserError
from dpo_jax.models.decoder import Model
from dpo_jax.models.flops import pairs_work, step_flops
from dpo_jax.rundir import RunDir


def model_flops(config: DPOConfig | SFTConfig, model: Model, lengths: np.ndarray, num_targets: np.ndarray) -> int:
    """Model operations of a step on its real tokens: padding and what is computed again do not count.

    Args:
        config: of the run; its layout says how often a prompt passes, its reference whether that passes too.
        model: the policy.
        lengths: [B, 1 + K], tokens of the prompt and answers of the step's pairs.
        num_targets: [B, K], answer tokens that are learned.
    """
    preferences = isinstance(config, DPOConfig)
    layout = config.batch.layout if preferences else "shared"
    work = pairs_work(lengths, num_targets, layout=layout, window=model.config.window)
    live = preferences and config.reference_mode == "live"
    return step_flops(model.config, work, live_reference=live, lora=model.lora)


def step_rates(
    config: DPOConfig | SFTConfig, model: Model, mesh: Mesh, store: Store, data: StepData, seconds: float
) -> dict[str, float]:
    """What timings.jsonl says of a step's speed: rates of all devices together.

    ``flops_per_second`` are model operations; ``mfu``, their share of what the devices could do in bfloat16, is there
    only where the chip is known.
    """
    real = data.ids[data.ids >= 0]
    flops = model_flops(config, model, store.lengths[real], store.num_targets[real])
    rates = {
        "step_seconds": seconds,
        "pairs_per_second": len(real) / seconds,
        "tokens_per_second": data.used / seconds,
        "flops_per_second": flops / seconds,
    }
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is not None:
        rates["mfu"] = flops / (seconds * mesh.size * chip.device_peak_flops)
    return rates


def refuse_window(window: Sequence[int], num_steps: int) -> None:
    """Raise one line if the run ends before the last step to be traced."""
    if window and window[-1] > num_steps:
        raise UserError(f"run.profile_steps: {list(window)} cannot be used: the run has {num_steps} steps; "
                        "choose earlier ones")  # fmt: skip


def trace_edges(window: Sequence[int]) -> set[int]:
    """Steps, counted from 1, whose results must be waited for, so that a trace holds its own steps and no other."""
    return {window[0] - 1, window[1]} if window else set()


@contextmanager
def traced(steps: range, config: RunConfig, run: RunDir) -> Iterator[Iterator[int]]:
    """These steps, counted from 0, with a trace of those that ``config.profile_steps`` names, in ``run.profile``.

    The caller waits at ``trace_edges``. A run that resumes within the window traces what is left of it.
    """
    window, running = config.profile_steps, False

    def stop() -> None:
        nonlocal running
        if running:
            running = False
            jax.profiler.stop_trace()
            say(config.progress, f"trace of steps {window[0]} to {window[1]}: {run.profile}")

    def walk() -> Iterator[int]:
        nonlocal running
        for step in steps:
            if not window or not window[0] <= step + 1 <= window[1]:
                yield step
                continue
            if not running:
                running = True
                jax.profiler.start_trace(run.profile)
            with jax.profiler.StepTraceAnnotation("step", step_num=step + 1):
                yield step
            if step + 1 == window[1]:
                stop()

    try:
        yield walk()
    finally:
        stop()  # the run was stopped within the window
