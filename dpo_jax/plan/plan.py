"""Plan a run for a TPU topology ahead of time: memory, collectives, step time and cost.

The TPU's own compiler compiles the config's own train step from shapes alone, on any Linux x86-64 machine. Memory and
collectives are those of the compiled program; operations, traffic and times are closed forms.
"""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.batching.batches import train_batches
from dpo_jax.batching.packing import assign_rows, make_units
from dpo_jax.batching.sets import DataSets
from dpo_jax.config import ModelConfig, PairConfig
from dpo_jax.errors import UserError, require
from dpo_jax.methods.dpo import find_reference
from dpo_jax.methods.setup import sets_of, with_head
from dpo_jax.methods.throughput import model_flops
from dpo_jax.models.decoder import Model, count_adapters, count_params
from dpo_jax.models.flops import Work, causal_pairs, recomputed_flops, step_flops
from dpo_jax.parallel.chips import GIB, Topology, parse_topology
from dpo_jax.parallel.sharding import row_devices
from dpo_jax.plan.ahead_of_time import Compiled, Load, compile_step, slice_mesh
from dpo_jax.plan.hlo import Collective, collectives
from dpo_jax.plan.roofline import collective_times, matrix_traffic
from dpo_jax.weights.known import known_config
from dpo_jax.weights.open import ModelSource, build_model, find_model, find_tokenizer


@dataclass(frozen=True)
class Inputs:
    """What a plan needs to know besides the config: the number of slices, and sizes of the data."""

    slices: int = 1
    rows: int | None = None  # of ``batch.row_length`` tokens, per device; None: as many as the lengths need, else 1
    lengths: tuple[float, float, float] | None = None  # None: full rows of pairs in equal thirds
    sets: DataSets | None = None  # the data, from which mean lengths, rows and steps follow
    examples: int | None = None  # pairs in the data, for the hours of a run without ``run.steps``
    data: bool = False  # read the data for all of these


def plan_slices(
    config: PairConfig, topologies: Sequence[str], inputs: Inputs, search: bool
) -> Iterator[dict[str, Any]]:
    """Yield the `plan` of each slice; with ``search``, also those of settings that need less memory until one fits."""
    slices = [parse_topology(text) for text in topologies]
    for slice_ in slices:
        remedy = f"the bandwidth between slices of {slice_.chip.name} is not published; plan a single slice"
        require(inputs.slices == 1 or slice_.chip.dcn_bandwidth is not None, "--slices", inputs.slices, remedy)
    source = _source(config.model, tokenizer=inputs.data)
    if config.reference.path is not None:
        find_config = lambda path: _source(ModelConfig(path=path), tokenizer=False)  # noqa: E731
        find_reference(
            config,
            config.reference.path,
            with_head(build_model(source, config.model, "tpu"), config),
            "tpu",
            find_config,
        )
    if inputs.data:
        inputs = _measured_inputs(config, source, inputs)
    for slice_ in slices:
        report = plan(config, source, slice_, inputs)
        yield report
        if search and report["memory"]["fits"] is False:
            yield from search_fit(config, source, slice_, inputs, report["memory"]["peak"])


def plan(config: PairConfig, source: ModelSource, slice_: Topology, inputs: Inputs) -> dict[str, Any]:
    """Compile the config's train step for a slice; return its facts as a JSON tree for ``text.render``.

    Raises:
        UserError: the config cannot run on that slice.
    """
    mesh = slice_mesh(config, slice_, inputs.slices)
    model = with_head(build_model(source, config.model, "tpu", config.lora), config)
    load = find_load(config, mesh, inputs)
    num_adapter_params = 0 if model.lora is None else count_adapters(model)
    options = {"dtype": model.dtype, "attention": model.attention, "remat": model.remat, "adapters": num_adapter_params}
    options["scores"] = model.config.scores
    sizes = {"pairs": load.pairs, "microbatches": load.microbatches, "rows_per_device": load.rows // row_devices(mesh)}
    row_stats = {"row_length": load.row_length, "fill": load.fill, "mean_lengths": list(load.lengths)}
    report: dict[str, Any] = {
        "topology": slice_.name,
        "slices": inputs.slices,
        "chips": slice_.chips * inputs.slices,
        "mesh": dict(mesh.shape),
        "model": {"path": config.model.path, "parameters": count_params(model)} | options,
        "batch": sizes | row_stats | {"assumed": inputs.lengths is None},
    }
    print(f"compiling for {slice_.name}; this takes minutes", file=sys.stderr)
    compiled = compile_step(config, model, mesh, load)
    report |= {"compile_seconds": compiled.seconds, "memory": _memory(compiled, slice_)}
    if compiled.text is None and compiled.seconds is not None:
        return report
    return report | _costs(config, model, mesh, load, slice_, compiled.text or "", inputs)


MEMORY_SAVERS: dict[str, Callable[[PairConfig], PairConfig]] = {  # cheapest first
    "model.remat": lambda c: replace(c, model=replace(c.model, remat="full")),
    "batch.accumulation": lambda c: replace(c, batch=replace(c.batch, accumulation=2 * c.batch.accumulation)),
    "mesh.tensor": lambda c: replace(c, mesh=replace(c.mesh, tensor=2 * c.mesh.tensor)),
    "reference.mode": lambda c: (
        replace(c, reference=replace(c.reference, mode="cached", dtype="auto")) if c.reference_mode == "live" else c
    ),
    "optimizer.moment_dtype": lambda c: replace(c, optimizer=replace(c.optimizer, moment_dtype="bfloat16")),
}


def search_fit(
    config: PairConfig, source: ModelSource, slice_: Topology, inputs: Inputs, peak: float
) -> list[dict[str, Any]]:
    """Return plans of settings that need ever less memory, until one fits or no setting lowers it further.

    Each setting is applied again as long as it lowers the peak, initially ``peak`` GiB, and is listed as ``changed``.
    """
    plans: list[dict[str, Any]] = []
    changed: dict[str, Any] = {}
    for option, save_memory in MEMORY_SAVERS.items():
        section, name = option.split(".")
        while (candidate := save_memory(config)) != config:
            rows = inputs.rows if option == "batch.accumulation" else None
            if rows is not None and rows % 2:
                break
            candidate_inputs = inputs if rows is None else replace(inputs, rows=rows // 2)
            try:
                report = plan(candidate, source, slice_, candidate_inputs)
            except UserError:  # the setting cannot go further
                break
            if report["memory"]["peak"] > 0.99 * peak:
                break
            config, inputs, peak = candidate, candidate_inputs, report["memory"]["peak"]
            changed = changed | {option: getattr(getattr(config, section), name)}
            plans.append(report | {"changed": changed})
            if report["memory"]["fits"] is not False:
                return plans
    return plans


def _measured_inputs(config: PairConfig, source: ModelSource, inputs: Inputs) -> Inputs:
    """Return ``inputs`` with the config's data sets and the mean lengths of the training pairs."""
    tokenizer = find_tokenizer(source, config.model, config.data.chat_template)
    sets = sets_of(config, tokenizer)
    ids = np.concatenate([sets.order.step_ids(step) for step in range(sets.order.num_steps)])
    prompt_length, chosen_length, rejected_length = sets.train.lengths[ids[ids >= 0]].mean(0).tolist()
    return replace(inputs, lengths=(prompt_length, chosen_length, rejected_length), sets=sets)


def _source(config: ModelConfig, *, tokenizer: bool) -> ModelSource:
    """Find a model's config: in local files, in the table of known models if no tokenizer is needed, or on the hub."""
    known_hf_config = known_config(config.path)
    reads_files = os.path.isdir(os.path.expanduser(config.path)) or (tokenizer and config.tokenizer is None)
    if known_hf_config is not None and not reads_files:
        return ModelSource(known_hf_config, None, None)
    return find_model(config.path, config.revision, config.checkpoint, weights=False)


def find_load(config: PairConfig, mesh: Mesh | AbstractMesh, inputs: Inputs) -> Load:
    """Return the input size of a step, from the config and ``inputs``."""
    batch, devices, rows, lengths = config.batch, row_devices(mesh), inputs.rows, inputs.lengths
    remedy = "its rows depend on the data; use shared or repeated"
    require(batch.layout != "padded", "batch.layout", batch.layout, remedy)
    if batch.row_length == "auto":
        raise UserError("batch.row_length", "auto", "plan needs a number, such as --batch.row_length 4096")
    pairs = batch.pairs / batch.accumulation  # of a microbatch
    copies = 1 if batch.layout == "shared" else 2  # of a prompt
    num_rows = (rows or 1) * devices
    if lengths is None:
        pair_slots = batch.row_length * min(num_rows / pairs, copies)
        mean_length = float(int(min(pair_slots / (copies + 2), config.data.max_length / 2)))
        remedy = f"no row has room for {pairs / num_rows:g} pairs; give --rows, or raise batch.row_length"
        require(mean_length > 0, "batch.row_length", batch.row_length, remedy)
        lengths = (mean_length, mean_length, mean_length)
    load = Load(
        pairs=batch.pairs,
        microbatches=batch.accumulation,
        rows=num_rows,
        row_length=batch.row_length,
        lengths=lengths,
        copies=copies,
        longest=min(config.data.max_length, batch.row_length),
    )
    longest, max_length = lengths[0] + max(lengths[1:]), config.data.max_length
    fits = longest <= max_length and max(longest, load.unit / copies) <= batch.row_length
    reason = f"a prompt and answer may have {max_length} tokens (data.max_length), a pair {batch.row_length} (a row)"
    require(fits, "--lengths", lengths, f"{reason}; give mean lengths")
    if rows is None and inputs.sets is not None:
        return replace(load, rows=train_batches(inputs.sets, config.batch, devices).packer.shapes[-1].rows)
    if rows is None and inputs.lengths is not None:
        pair_lengths = np.tile(np.round(lengths).astype(int), (int(pairs), 1))
        units = make_units(pair_lengths, pair_lengths[:, 1:], batch.layout)
        packed_rows = assign_rows(units, layout=batch.layout, multiple=devices, row_length=batch.row_length)
        return replace(load, rows=len(packed_rows))
    if load.fill > 1:
        rows_text = f"{rows} rows of {batch.row_length} tokens per device"
        remedy = "give more rows or raise batch.accumulation"
        raise UserError(f"--rows: {rows_text} cannot hold {pairs:g} pairs of {load.unit:g} tokens; {remedy}")
    return load


def _memory(compiled: Compiled, slice_: Topology) -> dict[str, Any]:
    """Return the step's memory in GiB per device, and ``fits``, which is None if only the compiler can tell."""
    capacity = slice_.chip.device_memory
    compiles = compiled.seconds is None or compiled.text is not None  # else the compiler ran out of memory
    sizes = {name: size / GIB for name, size in compiled.sizes.items()}
    activations = (compiled.peak - sum(compiled.sizes.values())) / GIB if compiles else None
    fits = compiles and compiled.peak <= capacity
    return sizes | {
        "activations": activations,
        "save": compiled.save / GIB,
        "peak": compiled.peak / GIB,
        "capacity": capacity / GIB,
        "fits": None if fits and compiled.seconds is None else fits,
    }


def _costs(
    config: PairConfig, model: Model, mesh: Mesh | AbstractMesh, load: Load, slice_: Topology, text: str, inputs: Inputs
) -> dict[str, Any]:
    """Return the step's operations, collectives, bounds on its time, and the resulting throughput and duration."""
    chip, is_live = slice_.chip, config.reference_mode == "live"
    lengths = np.tile(np.round(load.lengths).astype(int), (load.pairs, 1))
    num_targets = int(lengths[:, 1:].sum())
    model_ops = model_flops(config, model, lengths, lengths[:, 1:])
    band = min(filter(None, (load.longest, model.config.window)))  # most tokens that the attention kernel looks back
    attended_pairs = causal_pairs(np.full(2 * load.rows * load.microbatches, load.row_length), band).sum()
    work = Work(load.slots, int(attended_pairs), num_targets)
    hardware_ops = step_flops(model.config, work, live_reference=is_live, lora=model.lora)
    hardware_ops += recomputed_flops(model.config, work, model.remat)

    devices, tensor = mesh.size, mesh.shape["tensor"]
    data_shards = devices // tensor
    tokens, target_tokens = (count // load.microbatches // data_shards for count in (load.slots, num_targets))
    traffic = matrix_traffic(
        model, tokens, target_tokens, microbatches=load.microbatches, tensor=tensor, live_reference=is_live
    )
    collective_ops = collectives(text, devices)
    seconds = {
        "compute": hardware_ops / devices / chip.device_peak_flops,
        "memory": traffic / (chip.memory_bandwidth / chip.devices),
        **collective_times(collective_ops, chip, devices // inputs.slices),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    min_seconds, max_seconds = seconds[bound], sum(seconds.values())

    def rates(t: float) -> dict[str, float]:
        speed = {"pairs_per_second": load.pairs / t, "tokens_per_second": load.pairs * load.unit / t}
        return {"step_seconds": t, "mfu": model_ops / (t * devices * chip.device_peak_flops)} | speed

    costs = {
        "flops": {"model": model_ops, "hardware": hardware_ops, "model_per_pair": model_ops / load.pairs},
        "collectives": _by_kind(collective_ops, devices // inputs.slices),
        "collectives_at_least": any(op.at_least for op in collective_ops),
        "seconds": seconds,
        "bound": bound,
        "full_overlap": rates(min_seconds),
        "no_overlap": rates(max_seconds),
    }
    steps = config.run.steps if inputs.sets is None else inputs.sets.order.num_steps
    if not steps and inputs.examples:
        steps = math.ceil((config.run.epochs or 1) * inputs.examples / load.pairs)
    if steps:
        hours = [steps * t / 3600 for t in (min_seconds, max_seconds)]
        costs["run"] = {"steps": steps, "hours": hours, "chip_hours": [t * devices / chip.devices for t in hours]}
    return costs


def _by_kind(collective_ops: Sequence[Collective], devices_per_slice: int) -> dict[str, dict[str, float]]:
    """Return the number and GiB per device of each kind of collective; those between slices are listed separately."""
    by_kind: dict[str, list[Collective]] = defaultdict(list)
    for op in collective_ops:
        by_kind[f"{op.kind} between slices" if op.slices(devices_per_slice) > 1 else op.kind].append(op)
    return {
        kind: {"times": sum(op.times for op in ops), "gib": sum(op.moved * op.times for op in ops) / GIB}
        for kind, ops in sorted(by_kind.items())
    }
