"""Operations, memory traffic and collectives of a step, by stage, and bounds on its time.

Operations and traffic are closed forms; collectives are read from the compiled programs.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.config import PairConfig, PPOConfig
from dpo_jax.methods.throughput import model_flops
from dpo_jax.models.decoder import Model
from dpo_jax.models.flops import (
    Work,
    adapter_flops,
    causal_pairs,
    forward_flops,
    pairs_work,
    recomputed_flops,
    step_flops,
)
from dpo_jax.parallel.chips import GIB, Topology
from dpo_jax.parallel.sharding import row_devices
from dpo_jax.plan.hlo import Collective, collectives
from dpo_jax.plan.load import Load
from dpo_jax.plan.rollout import RolloutPlan, cache_bytes
from dpo_jax.plan.roofline import collective_times, forward_traffic, matrix_traffic


class Stage(NamedTuple):
    """A part of a step that ends before the next one begins."""

    name: str
    model_flops: float  # on real tokens, over all devices
    flops: float  # with padding and recomputation, over all devices
    traffic: float  # bytes per device
    collectives: Sequence[Collective]


def rows_work(load: Load, model: Model) -> Work:
    """Return the workload of a step's rows when they are full, as the kernels compute them."""
    # most tokens that the attention kernel looks back in each layer
    bands = [load.longest if window is None else min(window, load.longest) for window in model.config.windows]
    num_answers = len(load.lengths) - 1
    mean_lengths = np.round(load.lengths).astype(int)
    rows = np.full(num_answers * load.rows * load.microbatches, load.row_length)
    num_targets = load.examples * int(mean_lengths[1:].sum())
    return Work(load.slots, int(causal_pairs(rows, bands).sum()), num_targets)


def pair_stage(config: PairConfig, model: Model, mesh: Mesh | AbstractMesh, load: Load, text: str) -> Stage:
    """Return the stage of the update on pairs; ``text``: the HLO text of its compiled program."""
    lengths = np.tile(np.round(load.lengths).astype(int), (load.examples, 1))
    model_ops = model_flops(config, model, lengths, lengths[:, 1:])
    has_live_reference, work = config.reference_mode == "live", rows_work(load, model)
    hardware_ops = step_flops(model.config, work, live_reference=has_live_reference, lora=model.lora)
    hardware_ops += recomputed_flops(model.config, work, model.remat)
    tokens, targets = _per_microbatch(load, work, mesh)
    traffic = matrix_traffic(
        model,
        tokens,
        targets,
        microbatches=load.microbatches,
        live_reference=has_live_reference,
        **_weight_shards(mesh),
    )
    return Stage("update", model_ops, hardware_ops, traffic, collectives(text, mesh.size))


def _weight_shards(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Return how many devices share the matrices of a layer that they multiply by, and its experts."""
    return {axis: mesh.shape[axis] for axis in ("tensor", "expert")}


def _per_microbatch(load: Load, work: Work, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Return the tokens and targets of a microbatch on one device."""
    shards = mesh.size // mesh.shape["tensor"]
    return work.tokens // load.microbatches // shards, work.targets // load.microbatches // shards


def _forward(model: Model, work: Work) -> int:
    """Count the operations of a forward pass, with adapters if the model has them."""
    adapters = 0 if model.lora is None else adapter_flops(model.config, work, model.lora)
    return forward_flops(model.config, work).total + adapters


def sampled_stages(plan: RolloutPlan, load: Load, texts: Mapping[str, str]) -> list[Stage]:
    """Return the stages of a step on sampled answers; ``texts``: HLO texts of the compiled programs, by phase."""
    model, mesh, rollout, reward = plan.model, plan.mesh, plan.load, plan.reward_model
    shards, num_rows = _weight_shards(mesh), rollout.rows // row_devices(mesh)
    prompt, answer = np.round(load.lengths[:2]).astype(int)
    lengths = np.tile([prompt, answer], (rollout.answers, 1))
    layout: Any = {"layout": "padded", "windows": model.config.windows}
    full_work = pairs_work(lengths, lengths[:, 1:], **layout)
    prefill_work = pairs_work(lengths * [1, 0], lengths[:, 1:] * 0, **layout)
    new_work = Work(*(all_work - prompt_work for all_work, prompt_work in zip(full_work, prefill_work, strict=True)))
    slots, num_new = rollout.prompt_slots, rollout.max_tokens
    padded_prompts = Work(rollout.rows * slots, model.config.layers * rollout.rows * slots**2, 0)
    padded_tokens = Work(
        rollout.rows * num_new, model.config.layers * rollout.rows * num_new * rollout.slots, rollout.rows * num_new
    )
    # a loop of unknown length is that over tokens, which ends at the latest after ``max_tokens``
    sampling_ops = collectives(texts["sampling"], mesh.size)
    prefill_ops = [op for op in sampling_ops if not op.at_least]
    decode_ops = [op._replace(times=op.times * num_new, at_least=False) for op in sampling_ops if op.at_least]
    token_traffic = forward_traffic(model, num_rows, num_rows, **shards) + cache_bytes(model, rollout, mesh)
    prompt_traffic = forward_traffic(model, num_rows * slots, 0, **shards)
    stages = [
        Stage("copy", 0, 0, 0, collectives(texts["copy"], mesh.size)),
        Stage("prompts", _forward(model, prefill_work), _forward(model, padded_prompts), prompt_traffic, prefill_ops),
        Stage("tokens", _forward(model, new_work), _forward(model, padded_tokens), num_new * token_traffic, decode_ops),
    ]
    if reward is not None:
        length = plan.scored.length
        num_visible = int(causal_pairs(np.full(rollout.rows, length), reward.config.windows).sum())
        padded_work = Work(rollout.rows * length, num_visible, 0)
        traffic = forward_traffic(reward, num_rows * length, 0, **shards)
        score_ops = collectives(texts["scoring"], mesh.size)
        scored = pairs_work(lengths, lengths[:, 1:], **layout | {"windows": reward.config.windows})
        stages.append(Stage("scoring", _forward(reward, scored), _forward(reward, padded_work), traffic, score_ops))
    if not isinstance(plan.config, PPOConfig):
        return [*stages, pair_stage(plan.config, model, mesh, load, texts["update"])]
    return [*stages, _updates_stage(plan, plan.config, load, texts["update"])]


def _updates_stage(plan: RolloutPlan, config: PPOConfig, load: Load, text: str) -> Stage:
    """Return the stage of all updates on a rollout.

    Before the first one, policy, reference and value model are computed once; then policy and value model are trained
    in each. A value model that shares the policy's layers adds nothing that counts.
    """
    policy, value, mesh, epochs = plan.model, plan.value, plan.mesh, config.ppo.epochs
    lengths = np.tile(np.round(load.lengths).astype(int), (load.examples, 1))
    shards = _weight_shards(mesh)
    tokens, targets = _per_microbatch(load, rows_work(load, policy), mesh)
    trained = [policy] if value is None or value.shared else [policy, value.model]
    forward = [*trained, replace(policy, lora=None)]

    def real_work(m: Model) -> Work:
        return pairs_work(lengths, lengths[:, 1:], layout=config.batch.layout, windows=m.config.windows)

    def operations(work_of: Callable[[Model], Work]) -> int:
        updates = sum(step_flops(m.config, work_of(m), live_reference=False, lora=m.lora) for m in trained)
        return epochs * updates + sum(_forward(m, work_of(m)) for m in forward)

    rows = partial(rows_work, load)
    recomputed = epochs * sum(recomputed_flops(m.config, rows(m), m.remat) for m in trained)
    sizes: Any = {"microbatches": load.microbatches, "live_reference": False, **shards}
    traffic = epochs * sum(matrix_traffic(m, tokens, targets, **sizes) for m in trained)
    traffic += load.microbatches * sum(forward_traffic(m, tokens, targets, **shards) for m in forward)
    return Stage("update", operations(real_work), operations(rows) + recomputed, traffic, collectives(text, mesh.size))


def step_costs(
    stages: Sequence[Stage],
    unit: str,
    load: Load,
    sampled: int,
    mesh: Mesh | AbstractMesh,
    slice_: Topology,
    slices: int,
) -> dict[str, Any]:
    """Return the step's operations, collectives, and bounds on its time and throughput.

    ``unit``: of the examples; ``sampled``: number of answers that the step samples.
    """
    chip, devices = slice_.chip, mesh.size
    model_ops = sum(stage.model_flops for stage in stages)
    all_ops = [op for stage in stages for op in stage.collectives]
    times = {
        stage.name: {
            "compute": stage.flops / devices / chip.device_peak_flops,
            "memory": stage.traffic / (chip.memory_bandwidth / chip.devices),
            **collective_times(stage.collectives, chip, devices // slices),
        }
        for stage in stages
    }
    totals = {resource: sum(t[resource] for t in times.values()) for resource in ("compute", "memory", "ici", "dcn")}
    longest_stage = max(times, key=lambda name: max(times[name].values()))
    bound_resource = max(times[longest_stage], key=lambda resource: times[longest_stage][resource])

    def rates(t: float) -> dict[str, float]:
        speed = {f"{unit}s_per_second": load.examples / t, "tokens_per_second": load.examples * load.unit / t}
        if sampled:
            speed["sampled_tokens_per_second"] = sampled * load.lengths[1] / t
        return {"step_seconds": t, "mfu": model_ops / (t * devices * chip.device_peak_flops)} | speed

    costs = {
        "flops": {
            "model": model_ops,
            "hardware": sum(stage.flops for stage in stages),
            f"model_per_{unit}": model_ops / load.examples,
        },
        "collectives": _by_kind(all_ops, devices // slices),
        "collectives_at_least": any(op.at_least for op in all_ops),
        "seconds": totals,
        "bound": bound_resource,
        "full_overlap": rates(sum(max(t.values()) for t in times.values())),
        "no_overlap": rates(sum(totals.values())),
    }
    return costs if len(stages) == 1 else costs | {"stages": times, "longest_stage": longest_stage}


def run_costs(costs: dict[str, Any], steps: int, slice_: Topology, slices: int) -> dict[str, Any]:
    """Return the duration of a run of ``steps`` steps, in hours, and its price in chip-hours."""
    hours = [steps * costs[name]["step_seconds"] / 3600 for name in ("full_overlap", "no_overlap")]
    return {"steps": steps, "hours": hours, "chip_hours": [t * slice_.chips * slices for t in hours]}


def _by_kind(collective_ops: Sequence[Collective], devices_per_slice: int) -> dict[str, dict[str, float]]:
    """Return the number and GiB per device of each kind of collective; those between slices are listed separately."""
    by_kind: dict[str, list[Collective]] = defaultdict(list)
    for op in collective_ops:
        by_kind[f"{op.kind} between slices" if op.slices(devices_per_slice) > 1 else op.kind].append(op)
    return {
        kind: {"times": sum(op.times for op in ops), "gib": sum(op.moved * op.times for op in ops) / GIB}
        for kind, ops in sorted(by_kind.items())
    }
