"""Throughput of a train step in pairs, tokens and model FLOPs per second."""

import numpy as np
from jax.sharding import Mesh

from dpo_jax.batching.batches import StepData
from dpo_jax.config import AnyConfig
from dpo_jax.data.store import Store
from dpo_jax.models.decoder import Model
from dpo_jax.models.flops import pairs_work, step_flops
from dpo_jax.parallel.chips import chip_of


def model_flops(config: AnyConfig, model: Model, lengths: np.ndarray, num_targets: np.ndarray) -> int:
    """Return the model FLOPs of a step on its real tokens; padding and recomputation do not count.

    ``lengths`` [B, 1 + K]: tokens of the prompt and of each answer; ``num_targets`` [B, K]: answer tokens in the loss.
    The config's layout decides how often a prompt is computed, its reference mode whether the reference runs too.
    """
    work = pairs_work(lengths, num_targets, layout=config.batch.layout, windows=model.config.windows)
    return step_flops(model.config, work, live_reference=config.reference_mode == "live", lora=model.lora)


def step_rates(
    config: AnyConfig, model: Model, mesh: Mesh, store: Store, data: StepData, seconds: float
) -> dict[str, float]:
    """Return the step's rates for timings.jsonl, over all devices together.

    ``flops_per_second`` counts model FLOPs; ``mfu``, their share of the devices' bfloat16 peak, is present only if the
    chip is known.
    """
    real_ids = data.ids[data.ids >= 0]
    flops = model_flops(config, model, store.lengths[real_ids], store.num_targets[real_ids])
    rates = {
        "step_seconds": seconds,
        "pairs_per_second": len(real_ids) / seconds,
        "tokens_per_second": data.num_real_tokens / seconds,
        "flops_per_second": flops / seconds,
    }
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is not None:
        rates["mfu"] = flops / (seconds * mesh.size * chip.device_peak_flops)
    return rates
