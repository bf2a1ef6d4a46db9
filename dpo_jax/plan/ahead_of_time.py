"""Compile a train step, or another program, ahead of time for a TPU topology, from shapes alone."""

import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Lowered

from dpo_jax.batch import BLOCK, PairLogps, PreferenceBatch, round_up
from dpo_jax.batching.packing import BatchShape, empty_batch
from dpo_jax.config import PairConfig, PPOConfig
from dpo_jax.errors import UserError
from dpo_jax.methods.optimizer import make_optimizer
from dpo_jax.methods.ppo import abstract_policy_state, make_policy_step
from dpo_jax.methods.setup import abstract_state, make_step, train_logps_fn
from dpo_jax.methods.value_model import ValueModel
from dpo_jax.models.decoder import Model
from dpo_jax.models.flops import projections
from dpo_jax.models.projections import layer_projections
from dpo_jax.parallel.chips import Topology
from dpo_jax.parallel.compiler import compiler_options, no_cache_writes
from dpo_jax.parallel.sharding import abstract_mesh, make_mesh, replicated, row_devices, row_sharding, sharded_structs
from dpo_jax.parallel.versions import mismatches
from dpo_jax.plan.load import Load, PlannedConfig
from dpo_jax.policy_gradient import Rollout
from dpo_jax.step import Frozen, TrainState
from dpo_jax.weights.open import param_shardings

NUM_STEPS = 1000  # length of the learning-rate schedule; the plan does not depend on it
# libtpu probes for a TPU and for other processes that use it; this machine has none
WITHOUT_TPU = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
               "TPU_ACCELERATOR_TYPE": "v5litepod-1"}  # fmt: skip


def slice_devices(slice_: Topology, slices: int = 1) -> list[jax.Device]:
    """Return the devices of TPU slices, for which programs can be compiled but not run; libtpu must be installed.

    Raises:
        UserError: jax, jaxlib and libtpu do not fit each other; the compiler may fail on programs of another jax.
    """
    if problems := mismatches("jax", ("tpu",)):
        raise UserError("; ".join(problems))
    os.environ.update({name: value for name, value in WITHOUT_TPU.items() if name not in os.environ})
    from jax.experimental import topologies

    options = slice_.options | ({"num_slices": slices} if slices > 1 else {})
    return topologies.get_topology_desc(slice_.name, "tpu", **options).devices


def slice_mesh(config: PlannedConfig, slice_: Topology, slices: int) -> Mesh | AbstractMesh:
    """Return the config's mesh of compile-only TPU devices, or an abstract mesh if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        return abstract_mesh(config.mesh, slice_.devices * slices)
    return make_mesh(config.mesh, slice_devices(slice_, slices))


def abstract_batch(load: Load, mesh: Mesh | AbstractMesh, leading: tuple[int, ...] | None = None) -> PreferenceBatch:
    """Return a train step's batch as shapes and shardings; ``leading`` dims default to those for microbatches."""
    num_answers = len(load.lengths) - 1
    shape = BatchShape(
        rows=load.rows,
        length=load.row_length,
        targets=load.targets,
        answers=num_answers * math.ceil(load.row_length / load.unit_room),
        blocks=16 * (load.row_length // BLOCK),
        longest=round_up(load.longest, BLOCK),
        branch_length=load.row_length,
    )
    if leading is None:
        leading = () if load.microbatches == 1 else (load.microbatches,)
    return batch_structs(shape, load.examples // load.microbatches, num_answers, mesh, leading)


def abstract_pairs(config: PairConfig, load: Load, mesh: Mesh | AbstractMesh) -> PreferenceBatch:
    """Return the pairs of a step as shapes and shardings; pairs of sampled answers have labels and log-probs."""
    batch = abstract_batch(load, mesh)
    if config.judge is None:
        return batch
    array: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=replicated(mesh))
    shape = batch.weight.shape
    return replace(batch, label=array(shape), sampled_sum=array((*shape, 2)))


def batch_structs(
    shape: BatchShape, num_pairs: int, num_answers: int, mesh: Mesh | AbstractMesh, leading: tuple[int, ...] = ()
) -> PreferenceBatch:
    """Return a batch as shapes and shardings."""
    batch = empty_batch(shape, num_pairs, num_answers, leading=leading, zeros=jax.ShapeDtypeStruct)
    return sharded_structs(batch, batch.per_array(row_sharding(mesh, len(leading)), replicated(mesh)))


def abstract_rollout(config: PPOConfig, load: Load, mesh: Mesh | AbstractMesh) -> Rollout:
    """Return the rollout of a step as shapes and shardings."""
    leading = (load.microbatches,)
    shape = (*leading, load.examples // load.microbatches, config.ppo.answers)
    array: Any = partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
    tokens = (*shape, config.sampling.max_tokens)
    return Rollout(
        inputs=abstract_batch(load, mesh, leading),
        mask=array(tokens, jnp.bool_),
        ended=array(shape, jnp.bool_),
        scores=array(shape, jnp.float32),
        sampled_logps=array(tokens, jnp.float32),
    )


def abstract_frozen(config: PlannedConfig, model: Model, mesh: Mesh | AbstractMesh, load: Load) -> Frozen:
    """Return the step's frozen inputs, base weights and reference, as shapes and shardings."""
    weights = sharded_structs(model.param_shapes(), param_shardings(model, mesh))
    mode, logps = config.reference_mode, None
    if mode == "live" and model.lora is None and config.reference.dtype != "auto":
        dtype = jnp.dtype(config.reference.dtype)
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), weights)
    if mode == "cached":
        shape = (load.examples,) if load.microbatches == 1 else (load.microbatches, load.examples // load.microbatches)
        array: Any = partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
        per_answer, weight, valid = array((*shape, 2), jnp.float32), array(shape, jnp.float32), array(shape, jnp.bool_)
        tail = None if config.objective.ld_alpha is None else per_answer
        logps = PairLogps(sum=per_answer, count=per_answer, weight=weight, valid=valid, tail_sum=tail)
    if model.lora is not None:
        return Frozen(weights, logps)
    return Frozen(reference=weights if mode == "live" and not config.reference.sync_every else logps)


@dataclass(frozen=True)
class Compiled:
    """A compiled program, or an estimate if there is no compiler."""

    seconds: float | None  # None: not compiled, and ``peak`` is a lower bound
    text: str | None  # None: out of memory, or not compiled
    peak: int  # bytes per device, arguments included

    @property
    def out_of_memory(self) -> bool:
        """Whether the compiler found the program too large for the device."""
        return self.seconds is not None and self.text is None


@dataclass(frozen=True)
class Phase:
    """A program of a step, and what is in memory while it runs; sizes are bytes per device."""

    name: str
    program: Compiled
    sizes: dict[str, int]  # of the arrays of known size, arguments of the program or not
    outside: int = 0  # of these, what is no argument of the program and no part of its peak

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return self.program.peak + self.outside


Arguments = tuple[TrainState, Frozen, PreferenceBatch | Rollout]  # of a train step, as shapes and shardings


def step_arguments(
    config: PlannedConfig, model: Model, mesh: Mesh | AbstractMesh, load: Load, value: ValueModel | None = None
) -> Arguments:
    """Return shapes and shardings of the arguments of the config's train step; ``value``: the value model of PPO."""
    frozen = abstract_frozen(config, model, mesh, load)
    if isinstance(config, PPOConfig):
        state = abstract_policy_state(model, value, mesh, _optimizer(config))
        return state, frozen, abstract_rollout(config, load, mesh)
    return abstract_state(config, model, mesh, _optimizer(config)), frozen, abstract_pairs(config, load, mesh)


def lower_step(
    config: PlannedConfig, model: Model, mesh: Mesh, arguments: Arguments, value: ValueModel | None = None
) -> Lowered:
    """Lower the config's train step for the mesh's devices; ``value``: the value model of PPO."""
    with no_cache_writes():
        flags = compiler_options(mesh, config.run.compiler_flags)
    step = _train_step(config, model, value, mesh, arguments[0], flags)
    with jax.set_mesh(mesh):
        return step.lower(*arguments)


def _train_step(
    config: PlannedConfig,
    model: Model,
    value: ValueModel | None,
    mesh: Mesh,
    state: TrainState,
    flags: Mapping[str, str],
) -> Any:
    if isinstance(config, PPOConfig):
        return make_policy_step(config, model, value, mesh, _optimizer(config), state, flags)
    return make_step(config, train_logps_fn(config, model), mesh, _optimizer(config), state, flags)


def _optimizer(config: PlannedConfig) -> optax.GradientTransformation:
    return make_optimizer(config.optimizer, NUM_STEPS, config.ppo.epochs if isinstance(config, PPOConfig) else 1)


def step_sizes(arguments: Arguments) -> dict[str, int]:
    """Return the bytes per device of a train step's arguments."""
    state, frozen, batch = arguments
    return {
        "weights": num_bytes((state.params, frozen.base)),
        "optimizer": num_bytes(state.opt_state),
        "reference": num_bytes((state.reference, frozen.reference)),
        "batch": num_bytes(batch),
    }


def compile_step(
    config: PlannedConfig,
    model: Model,
    mesh: Mesh | AbstractMesh,
    load: Load,
    arguments: Arguments,
    value: ValueModel | None = None,
) -> Compiled:
    """Compile the config's train step for the mesh's devices; on an abstract mesh, only bound its memory.

    ``value``: the value model of PPO.
    """
    if isinstance(mesh, AbstractMesh):
        peak = sum(step_sizes(arguments).values())
        return Compiled(None, None, peak + _min_temporaries(model, mesh, load, num_bytes(arguments[0].params)))
    return compile_program(partial(lower_step, config, model, mesh, arguments, value))


def compile_program(lower: Callable[[], Lowered]) -> Compiled:
    """Compile what ``lower`` returns, and measure the memory that it needs, even if the device has less."""
    start_time = time.perf_counter()
    lowered = lower()
    try:
        with no_cache_writes():
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory_error = re.search(r"RESOURCE_EXHAUSTED.*?\(?([\d.]+)([MG])\)? (?:exceeds|of)", str(error), re.S)
        if memory_error is None:
            raise
        peak = int(float(memory_error[1]) * {"M": 2**20, "G": 2**30}[memory_error[2]])
        return Compiled(time.perf_counter() - start_time, None, peak)
    memory: Any = program.memory_analysis()
    return Compiled(time.perf_counter() - start_time, program.as_text(), memory.peak_memory_in_bytes)


def _min_temporaries(model: Model, mesh: Mesh | AbstractMesh, load: Load, trained: int) -> int:
    """Return a lower bound on temporary bytes: gradients, each layer's saved input, and one layer's activations."""
    config, itemsize = model.config, jnp.dtype(model.dtype).itemsize
    tokens = load.rows // row_devices(mesh) * load.row_length
    gradient_bytes = trained * (2 if load.microbatches > 1 else 1)  # of one microbatch, and their sum
    activation_bytes = config.layers * tokens * config.hidden * itemsize
    rows, gathered_experts = layer_projections(config), 0  # a device gathers each of a layer's other matrices
    if config.experts is not None and mesh.shape["fsdp"] > 1:
        gathered_experts = config.experts.number // mesh.shape["expert"]
    layer_weights = sum(
        inputs * outputs * (gathered_experts if rows[name].stack else 1)
        for name, (inputs, outputs) in projections(config).items()
    )
    features = (4 if config.gated else 2) * tokens * config.ffn
    return gradient_bytes + activation_bytes + itemsize * (layer_weights + features) // mesh.shape["tensor"]


def num_bytes(tree: Any) -> int:
    """Return the bytes per device of a tree of shapes and shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
