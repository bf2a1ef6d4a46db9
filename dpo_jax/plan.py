"""Compile a run's train step for a TPU slice that is not there: does it fit, what does it move, what will it cost.

The very step of the config is compiled ahead of time by the TPU's own compiler, from shapes alone, on any Linux x86-64
machine. Memory and exchanges are the compiled program's; operations, traffic and times are closed forms.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax.assemble import abstract_state, loss_of, train_logps_fn
from dpo_jax.batch import BLOCK, PairLogps, PreferenceBatch
from dpo_jax.chips import Topology, parse_topology
from dpo_jax.compiler import platform_flags
from dpo_jax.config import DPOConfig, ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.hlo import exchanges
from dpo_jax.models.decoder import Model, count_adapters, count_params
from dpo_jax.models.flops import Work, causal_pairs, pairs_work, step_flops
from dpo_jax.models.known import known_config
from dpo_jax.optimizer import make_optimizer
from dpo_jax.policy import ModelSource, build_model, find_model, placed_shapes
from dpo_jax.roofline import exchange_times, hardware_flops, matrix_traffic
from dpo_jax.sharding import make_mesh, replicated, row_devices, row_sharding
from dpo_jax.step import Base, make_train_step

GIB = 2**30
# libtpu looks for a TPU, and for other programs that use one; this machine has none
WITHOUT_TPU = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
               "TPU_ACCELERATOR_TYPE": "v5litepod-1"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step is asked for. Lengths are means of a pair: prompt, chosen, rejected."""

    pairs: int  # of a step
    parts: int
    rows: int  # of a part, over all devices
    row_length: int
    lengths: tuple[float, float, float]
    longest: int  # tokens of a prompt with one answer

    @property
    def unit(self) -> float:
        """Tokens of a pair, its prompt once."""
        return sum(self.lengths)

    @property
    def slots(self) -> int:
        """Tokens that a step has room for."""
        return self.parts * self.rows * self.row_length

    @property
    def fill(self) -> float:
        """Share of the slots that holds tokens."""
        return self.pairs * self.unit / self.slots

    @property
    def targets(self) -> int:
        """Of a row, if it is full."""
        return _up(self.row_length * (1 - self.lengths[0] / self.unit), BLOCK)


def _up(number: float, multiple: int) -> int:
    return multiple * math.ceil(number / multiple)


def plan(
    config: DPOConfig,
    topology: str,
    *,
    slices: int = 1,
    rows: int | None = None,
    lengths: tuple[float, float, float] | None = None,
    examples: int | None = None,
) -> dict[str, Any]:
    """Everything that can be said of the config's step on that slice, as a JSON tree; see `render`.

    Args:
        config: of the run. Its data is not read.
        topology: such as v5e:4x4, or v5litepod-16.
        slices: how many of them.
        rows: of ``batch.row_length`` tokens, a device and part; None: what ``lengths`` ask for, else 1.
        lengths: mean tokens of prompt, chosen and rejected; None: rows are taken to be full, of equal thirds.
        examples: pairs of the data, for the length of the run where it is not given in steps.

    Raises:
        UserError: the config cannot run there.
    """
    slice_ = parse_topology(topology)
    mesh = _mesh(config, slice_, slices)
    model = build_model(_source(config.model), config.model, mesh, config.lora)
    load = find_load(config, mesh, rows, lengths)
    found: dict[str, Any] = {
        "topology": slice_.name,
        "slices": slices,
        "chips": slice_.chips * slices,
        "mesh": dict(mesh.shape),
        "model": {"path": config.model.path, "parameters": count_params(model), "dtype": model.dtype,
                  "attention": model.attention, "remat": model.remat,
                  "adapters": 0 if model.lora is None else count_adapters(model)},
        "batch": {"pairs": load.pairs, "parts": load.parts, "rows_a_device": load.rows // row_devices(mesh),
                  "row_length": load.row_length, "fill": load.fill, "mean_lengths": list(load.lengths),
                  "assumed": lengths is None},
    }  # fmt: skip
    compiled = compile_step(config, model, mesh, load)
    found |= {"compile_seconds": compiled.seconds, "memory": _memory(compiled, slice_)}
    if compiled.text is None:
        return found
    return found | _costs(config, model, mesh, load, slice_, compiled.text, examples)


def _source(config: ModelConfig) -> ModelSource:
    """The model's shapes: of the files where they are, else as published, else from the hub."""
    known = known_config(config.path)
    if known is not None and not os.path.isdir(os.path.expanduser(config.path)):
        return ModelSource(known, None, None)
    return find_model(config.path, config.revision)


def _mesh(config: DPOConfig, slice_: Topology, slices: int) -> Mesh:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('--topology: its compiler is missing: pip install "dpo_jax[plan]", on Linux x86-64')
    os.environ.update({name: value for name, value in WITHOUT_TPU.items() if name not in os.environ})
    from jax.experimental import topologies

    options = slice_.options | ({"num_slices": slices} if slices > 1 else {})
    devices = topologies.get_topology_desc(slice_.name, "tpu", **options).devices
    return make_mesh(config.mesh, devices)


def find_load(config: DPOConfig, mesh: Mesh, rows: int | None, lengths: tuple[float, float, float] | None) -> Load:
    """Rows and lengths of a step, from what is known of them."""
    batch, devices = config.batch, row_devices(mesh)
    if batch.row_length == "auto":
        raise UserError("batch.row_length: auto takes it from the data, which plan does not read; give a number, such "
                        "as --batch.row_length 4096")  # fmt: skip
    pairs = batch.pairs / batch.accumulation  # of a part
    if lengths is None:
        total = (rows or 1) * devices * batch.row_length
        third = min(total / pairs, 2 * config.data.max_length) / 3
        lengths = (third, third, third)
    needed = math.ceil(pairs * sum(lengths) / batch.row_length / 0.97)  # rows are not filled to the last token
    num_rows = _up(needed, devices) if rows is None else rows * devices
    if pairs * sum(lengths) > num_rows * batch.row_length:
        raise UserError(f"--rows: {rows} rows of {batch.row_length} tokens a device do not hold {pairs:g} pairs of "
                        f"{sum(lengths):g} tokens; give more, or raise batch.accumulation")  # fmt: skip
    return Load(pairs=batch.pairs, parts=batch.accumulation, rows=num_rows, row_length=batch.row_length,
                lengths=lengths, longest=min(config.data.max_length, batch.row_length))  # fmt: skip


def abstract_batch(load: Load, mesh: Mesh) -> PreferenceBatch:
    """The batch's shapes and places."""
    lead = () if load.parts == 1 else (load.parts,)
    pairs, answers = load.pairs // load.parts, 2 * math.ceil(load.row_length / load.unit)
    row, targets = (load.rows, load.row_length), (load.rows, load.targets)

    def empty() -> PreferenceBatch:
        ints = lambda *shape: jnp.zeros((*lead, *shape), jnp.int32)  # noqa: E731
        return PreferenceBatch(
            **{name: ints(*row) for name in ("tokens", "positions", "segments", "branches")},
            **{f"target_{name}": ints(*targets) for name in ("tokens", "sources", "answers", "offsets")},
            target_mask=ints(*targets) > 0,
            answer_slots=ints(pairs, 2),
            weight=jnp.zeros((*lead, pairs)),
            valid=ints(pairs) > 0,
            blocks=ints(load.rows, 16 * (load.row_length // BLOCK), 2),
            answers_per_row=answers,
            longest=_up(load.longest, BLOCK),
            branch_length=load.row_length,
        )

    batch = jax.eval_shape(empty)
    return _placed(batch, batch.place(row_sharding(mesh, len(lead)), replicated(mesh)))


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def abstract_reference(config: DPOConfig, model: Model, mesh: Mesh, load: Load) -> Any:
    """The shapes and places of the step's ``reference`` argument."""
    weights, mode, cached = placed_shapes(model, mesh), config.reference_mode, None
    if mode == "live" and model.lora is None and config.reference.dtype != "auto":
        dtype = jnp.dtype(config.reference.dtype)
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), weights)
    if mode == "cached":
        shape = (load.pairs,) if load.parts == 1 else (load.parts, load.pairs // load.parts)

        def empty() -> PairLogps:
            answers, pairs = jnp.zeros((*shape, 2)), jnp.zeros(shape)
            tail = None if config.loss.ld_alpha is None else answers
            return PairLogps(sum=answers, count=answers, weight=pairs, valid=pairs > 0, tail_sum=tail)

        logps = jax.eval_shape(empty)
        cached = _placed(logps, jax.tree.map(lambda _: replicated(mesh), logps))
    if model.lora is not None:
        return Base(weights, cached)
    return {"live": weights, "cached": cached, "none": None}[mode]


@dataclass(frozen=True)
class Compiled:
    """What the compiler said. Bytes a device."""

    seconds: float
    text: str | None  # None: it does not fit
    peak: int
    held: dict[str, int]  # weights, optimizer, reference, batch


def compile_step(config: DPOConfig, model: Model, mesh: Mesh, load: Load) -> Compiled:
    """The train step of the config, compiled for the mesh's devices."""
    optimizer = make_optimizer(config.optimizer, 1000)
    state = abstract_state(model, mesh, optimizer)
    batch, reference = abstract_batch(load, mesh), abstract_reference(config, model, mesh, load)
    step: Any = make_train_step(
        logps_fn=train_logps_fn(config, model),
        loss=loss_of(config),
        optimizer=optimizer,
        accumulation=load.parts,
        shardings=jax.tree.map(lambda x: x.sharding, state),
        metrics_sharding=replicated(mesh),
        compiler_options=platform_flags("tpu", config.run.compiler_flags),
    )
    held = {
        "weights": _bytes(state.params) + (_bytes(reference.params) if isinstance(reference, Base) else 0),
        "optimizer": _bytes(state.opt_state),
        "reference": 0 if isinstance(reference, Base) else _bytes(reference),
        "batch": _bytes(batch),
    }
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.lower(state, reference, batch)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"RESOURCE_EXHAUSTED.*?\(?([\d.]+)([MG])\)? (?:exceeds|of)", str(error), re.S)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak = int(float(wanted[1]) * {"M": 2**20, "G": GIB}[wanted[2]]) if wanted else 0
        return Compiled(time.perf_counter() - start, None, peak, held)
    memory = program.memory_analysis()
    return Compiled(time.perf_counter() - start, program.as_text(), memory.peak_memory_in_bytes, held)


def _bytes(tree: Any) -> int:
    """Of a device, by shapes and places."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _memory(compiled: Compiled, slice_: Topology) -> dict[str, Any]:
    """GiB a device."""
    room = slice_.chip.device_memory
    held = sum(compiled.held.values())
    fits = compiled.text is not None and compiled.peak <= room
    parts = {name: size / GIB for name, size in compiled.held.items()}
    rest = None if compiled.text is None else (compiled.peak - held) / GIB
    return parts | {"activations": rest, "peak": compiled.peak / GIB, "room": room / GIB, "fits": fits}


def _costs(
    config: DPOConfig, model: Model, mesh: Mesh, load: Load, slice_: Topology, text: str, examples: int | None
) -> dict[str, Any]:
    """Operations, traffic, times and what follows from them."""
    chip, live = slice_.chip, config.reference_mode == "live" and config.loss.needs_reference
    lengths = np.tile(np.round(load.lengths).astype(int), (load.pairs, 1))
    real = pairs_work(lengths, lengths[:, 1:], layout=config.batch.layout, window=model.config.window)
    rank, adapted = (0, ()) if model.lora is None else (model.lora.rank, model.lora.targets)
    useful = step_flops(model.config, real, live_reference=live, rank=rank, adapted=adapted)
    seen = causal_pairs(np.full(2 * load.rows * load.parts, load.row_length), _band(model, load)).sum()
    hardware = hardware_flops(model, Work(load.slots, int(seen), real.targets), live_reference=live)

    devices, tensor = mesh.size, mesh.shape["tensor"]
    spread = devices // tensor
    traffic = matrix_traffic(model, load.slots // load.parts // spread, real.targets // load.parts // spread,
                             parts=load.parts, tensor=tensor, live_reference=live)  # fmt: skip
    found = exchanges(text, devices)
    seconds = {
        "compute": hardware / devices / chip.device_peak_flops,
        "memory": traffic / (chip.memory_bandwidth / chip.devices),
        **exchange_times(found, chip, devices // len({getattr(d, "slice_index", 0) for d in mesh.devices.flat})),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    best, worst = seconds[bound], sum(seconds.values())
    of = lambda t: {"step_seconds": t, "mfu": useful / (t * devices * chip.device_peak_flops),  # noqa: E731
                    "pairs_per_second": load.pairs / t,
                    "tokens_per_second": load.pairs * load.unit / t}  # fmt: skip
    costs = {
        "flops": {"model": useful, "hardware": hardware, "model_a_pair": useful / load.pairs},
        "exchanges": _by_kind(found),
        "seconds": seconds,
        "bound": bound,
        "at_best": of(best),
        "one_after_another": of(worst),
    }
    steps = config.run.steps or (examples and math.ceil((config.run.epochs or 1) * examples / load.pairs))
    if steps:
        hours = [steps * t / 3600 for t in (best, worst)]
        costs["run"] = {"steps": steps, "hours": hours, "chip_hours": [t * devices / chip.devices for t in hours]}
    return costs


def _band(model: Model, load: Load) -> int:
    """Tokens back that the attention kernel looks at most."""
    return min(filter(None, (load.longest, model.config.window)))


def _by_kind(found: Sequence[Any]) -> dict[str, dict[str, float]]:
    kinds = sorted({one.kind for one in found})
    own = {kind: [one for one in found if one.kind == kind] for kind in kinds}
    return {
        kind: {"times": sum(one.times for one in ones), "gib": sum(one.moved * one.times for one in ones) / GIB}
        for kind, ones in own.items()
    }
