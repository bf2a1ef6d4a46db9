"""The programs that make a rollout: the copy of the policy, the sampler, and the reward model's scores."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Lowered

from dpo_jax.batch import Adapted
from dpo_jax.batching.packing import BatchShape
from dpo_jax.inference.answer_scores import make_scores, scored_shape
from dpo_jax.inference.generate import make_answer_rows, make_copy, rollout_shardings, to_compute_dtype
from dpo_jax.inference.sampling import row_keys
from dpo_jax.methods.value_model import ValueModel
from dpo_jax.models.decoder import Model
from dpo_jax.parallel.sharding import replicated, rollout_mesh, row_devices, row_sharding, sharded_structs
from dpo_jax.plan.ahead_of_time import (
    Arguments,
    Compiled,
    Phase,
    batch_structs,
    compile_program,
    compile_step,
    num_bytes,
    step_sizes,
)
from dpo_jax.plan.load import Load, PlannedConfig, RolloutLoad
from dpo_jax.policy_gradient import ActorCritic
from dpo_jax.weights.open import param_shardings

NUM_ENDS = 2  # tokens that end an answer; the plan does not depend on it


@dataclass(frozen=True)
class RolloutPlan:
    """Inputs from which a plan compiles the rollout of a policy-gradient or online DPO step."""

    config: PlannedConfig
    model: Model
    value: ValueModel | None  # None: neither RLOO nor online DPO has one
    reward_model: Model | None  # None: a Python function scores the answers
    mesh: Mesh | AbstractMesh
    load: RolloutLoad

    def policy(self, arguments: Arguments) -> Any:
        """Return the policy's weights, with the base if it has adapters, from the arguments of the train step."""
        params, base = arguments[0].params, arguments[1].base
        params = params.policy if isinstance(params, ActorCritic) else params
        return params if base is None else Adapted(params, base)

    @property
    def copy(self) -> Any:
        """The copy of the policy's weights, as shapes and shardings."""
        model, has_adapters = self.model, self.model.lora is not None
        shapes = Adapted(model.adapter_shapes(), model.param_shapes()) if has_adapters else model.param_shapes()
        shardings = rollout_shardings(model, rollout_mesh(self.mesh), has_adapters)
        return sharded_structs(jax.eval_shape(partial(to_compute_dtype, model), shapes), shardings)

    @property
    def reward_weights(self) -> Any:
        """The reward model's weights, as shapes and shardings; None if a Python function scores."""
        model = self.reward_model
        return None if model is None else sharded_structs(model.param_shapes(), param_shardings(model, self.mesh))

    @property
    def scored(self) -> BatchShape:
        """Shape of the rows that the reward model scores."""
        return scored_shape(self.load.rows, self.load.longest)

    def lower_copy(self, arguments: Arguments) -> Lowered:
        """Lower the program that copies the policy's weights."""
        assert isinstance(self.mesh, Mesh)
        copy: Any = make_copy(self.model, rollout_mesh(self.mesh), self.model.lora is not None)
        with jax.set_mesh(self.mesh):
            return copy.lower(self.policy(arguments))

    def lower_sampler(self) -> Lowered:
        """Lower the program that samples all answers of a step."""
        assert isinstance(self.mesh, Mesh)
        mesh, load = rollout_mesh(self.mesh), self.load
        integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding(mesh))  # noqa: E731
        keys = jax.eval_shape(lambda: row_keys(0, 0, jnp.arange(load.rows)))
        prompts, ends = integers(load.rows, load.prompt_slots), jax.ShapeDtypeStruct((NUM_ENDS,), jnp.int32)
        with jax.set_mesh(mesh):
            sampler: Any = make_answer_rows(self.model, self.config.sampling, replicated(mesh))
            return sampler.lower(self.copy, prompts, integers(load.rows), keys, ends)

    def lower_scores(self) -> Lowered:
        """Lower the program by which the reward model scores all answers of a step."""
        assert isinstance(self.mesh, Mesh)
        assert self.reward_model is not None
        scores: Any = make_scores(self.reward_model, self.mesh)
        with jax.set_mesh(self.mesh):
            return scores.lower(self.reward_weights, batch_structs(self.scored, self.load.rows, 1, self.mesh))


def cache_bytes(model: Model, load: RolloutLoad, mesh: Mesh | AbstractMesh) -> int:
    """Return the bytes per device of the cache: a key and a value per layer, key head and slot of its rows.

    Key heads are sharded over ``tensor`` if it divides them.
    """
    c, tensor = model.config, mesh.shape["tensor"]
    heads = c.kv_heads if c.kv_heads % tensor else c.kv_heads // tensor
    slots = load.rows // row_devices(mesh) * load.slots
    return 2 * c.layers * heads * c.head_dim * slots * jnp.dtype(model.dtype).itemsize


def rollout_phases(plan: RolloutPlan, arguments: Arguments, load: Load) -> list[Phase]:
    """Compile all programs of a step on sampled answers; return them with what is in memory while each runs.

    The state, the reference, the reward model and the last rollout are there in every phase; the copy of the policy,
    from its making until the answers have scores.
    """
    sizes = step_sizes(arguments)
    reward_bytes, copy, policy = num_bytes(plan.reward_weights), num_bytes(plan.copy), num_bytes(plan.policy(arguments))
    always = sizes | {"reward_model": reward_bytes}
    total, cache = sum(always.values()), cache_bytes(plan.model, plan.load, plan.mesh)

    def compiled(lower: Any, least: int) -> Compiled:
        """Compile a program; without devices, estimate its memory as ``least``, its arguments and results."""
        return Compiled(None, None, least) if isinstance(plan.mesh, AbstractMesh) else compile_program(lower)

    copying = compiled(lambda: plan.lower_copy(arguments), policy + copy)
    sampling = compiled(plan.lower_sampler, copy + cache)
    phases = [
        Phase("copy", copying, always | {"copy": copy}, total - policy),
        Phase("sampling", sampling, always | {"copy": copy, "cache": cache}, total),
    ]
    if plan.reward_model is not None:
        scoring = compiled(plan.lower_scores, reward_bytes)
        phases.append(Phase("scoring", scoring, always | {"copy": copy}, total - reward_bytes + copy))
    update = compile_step(plan.config, plan.model, plan.mesh, load, arguments, plan.value)
    return [*phases, Phase("update", update, always, reward_bytes)]
