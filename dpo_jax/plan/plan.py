"""Plan a run for a TPU topology ahead of time: memory, collectives, step time and cost.

The TPU's own compiler compiles the config's own train step from shapes alone, on any Linux x86-64 machine. Memory and
collectives are those of the compiled program; operations, traffic and times are closed forms.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.config import JudgeConfig, ModelConfig, PPOConfig
from dpo_jax.errors import UserError, require
from dpo_jax.methods.dpo import find_reference
from dpo_jax.methods.setup import sets_of, trained_model
from dpo_jax.methods.value_model import value_model_of
from dpo_jax.models.decoder import Model, count_adapters, count_params, refuse_expert_axis
from dpo_jax.parallel.chips import GIB, Topology, parse_topology
from dpo_jax.parallel.sharding import row_devices
from dpo_jax.plan.ahead_of_time import Phase, compile_step, slice_mesh, step_arguments, step_sizes
from dpo_jax.plan.costs import pair_stage, run_costs, sampled_stages, step_costs
from dpo_jax.plan.load import Inputs, Load, PlannedConfig, find_load, find_rollout
from dpo_jax.plan.rollout import RolloutPlan, rollout_phases
from dpo_jax.storage import expanded
from dpo_jax.weights.known import known_config
from dpo_jax.weights.open import ModelSource, OpenModel, build_model, find_model, find_tokenizer
from dpo_jax.weights.reward_model import refuse_language_model, reward_model_config


def plan_slices(
    config: PlannedConfig, topologies: Sequence[str], inputs: Inputs, search: bool
) -> Iterator[dict[str, Any]]:
    """Yield the `plan` of each slice; with ``search``, also plans that need less memory, until one fits."""
    slices = [parse_topology(text) for text in topologies]
    for slice_ in slices:
        remedy = f"the bandwidth between slices of {slice_.chip.name} is not published; plan a single slice"
        require(inputs.slices == 1 or slice_.chip.dcn_bandwidth is not None, "--slices", inputs.slices, remedy)
    source = _source(config.model, tokenizer=inputs.data)
    if config.reference.path is not None:
        find_config = lambda path: _source(ModelConfig(path=path), tokenizer=False, section="reference")  # noqa: E731
        find_reference(
            config,
            config.reference.path,
            trained_model(build_model(source, config.model, "tpu"), config),
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


def plan(config: PlannedConfig, source: ModelSource, slice_: Topology, inputs: Inputs) -> dict[str, Any]:
    """Compile the programs of the config's step for a slice; return its facts as a JSON tree for ``text.render``.

    Raises:
        UserError: the config cannot run on that slice.
    """
    mesh = slice_mesh(config, slice_, inputs.slices)
    model = trained_model(build_model(source, config.model, "tpu", config.lora), config)
    refuse_expert_axis(model.config, mesh)
    load, unit = find_load(config, mesh, inputs), config.batch.counts.removesuffix("s")
    rollout, reward = find_rollout_plan(config, model, mesh, inputs)
    value = None if rollout is None else rollout.value
    arguments = step_arguments(config, model, mesh, load, value)
    report: dict[str, Any] = {
        "topology": slice_.name,
        "slices": inputs.slices,
        "chips": slice_.chips * inputs.slices,
        "mesh": dict(mesh.shape),
        "model": _model_facts(config, model),
        "batch": _batch_facts(config, mesh, load, inputs),
    }
    if rollout is not None:
        report["rollout"] = _rollout_facts(rollout, reward)
    print(f"compiling for {slice_.name}; this takes minutes", file=sys.stderr)
    if rollout is None:
        phases = [Phase("update", compile_step(config, model, mesh, load, arguments), step_sizes(arguments))]
    else:
        phases = rollout_phases(rollout, arguments, load)
    seconds = [phase.program.seconds for phase in phases]
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    report["compile_seconds"] = None if None in seconds else sum(filter(None, seconds))
    report["memory"] = _memory(phases, slice_) | {"save": state_bytes / GIB}
    if any(phase.program.out_of_memory for phase in phases):
        return report
    texts = {phase.name: phase.program.text or "" for phase in phases}
    if rollout is not None:
        stages = sampled_stages(rollout, load, texts)
    else:
        assert not isinstance(config, PPOConfig)
        stages = [pair_stage(config, model, mesh, load, texts["update"])]
    costs = step_costs(stages, unit, load, load.examples * config.planned.sampled, mesh, slice_, inputs.slices)
    steps = _num_steps(config, load, inputs)
    return report | costs | ({"run": run_costs(costs, steps, slice_, inputs.slices)} if steps else {})


def _model_facts(config: PlannedConfig, model: Model) -> dict[str, Any]:
    return {
        "path": config.model.path,
        "parameters": count_params(model),
        "dtype": model.dtype,
        "attention": model.attention,
        "remat": model.remat,
        "adapters": 0 if model.lora is None else count_adapters(model),
        "scores": model.config.scores,
    }


def _batch_facts(config: PlannedConfig, mesh: Mesh | AbstractMesh, load: Load, inputs: Inputs) -> dict[str, Any]:
    return {
        config.batch.counts: load.examples,
        "microbatches": load.microbatches,
        "rows_per_device": load.rows // row_devices(mesh),
        "row_length": load.row_length,
        "fill": load.fill,
        "mean_lengths": list(load.lengths),
        "assumed": inputs.lengths is None,
    }


def find_rollout_plan(
    config: PlannedConfig, model: Model, mesh: Mesh | AbstractMesh, inputs: Inputs
) -> tuple[RolloutPlan | None, OpenModel | None]:
    """Return the `RolloutPlan`, or None if the config samples no answers, and the reward model's files if it has any.

    Raises:
        UserError: the reward model cannot be used.
    """
    if config.judge is None:
        return None, None
    reward_model, reward = find_reward_model(config, config.judge, model)
    value = value_model_of(config, model, reward) if isinstance(config, PPOConfig) else None
    return RolloutPlan(config, model, value, reward_model, mesh, find_rollout(config, mesh, inputs)), reward


def _rollout_facts(plan: RolloutPlan, reward_files: OpenModel | None) -> dict[str, Any]:
    """Return the models that a step on sampled answers needs besides the policy, and the size of its rollout."""
    value, reward, load, config = plan.value, plan.reward_model, plan.load, plan.config
    assert config.judge is not None
    return {
        "answers": config.planned.sampled,
        "updates": config.ppo.epochs if isinstance(config, PPOConfig) else 1,
        "rows_per_device": load.rows // row_devices(plan.mesh),
        "prompt_slots": load.prompt_slots,
        "max_tokens": load.max_tokens,
        "value_parameters": None if value is None else _num_parameters(value.trained(value.model.param_shapes())),
        "value_shared": value is not None and value.shared,
        "reward": config.judge.path or config.judge.function,
        "reward_parameters": None if reward is None else count_params(reward),
        "reward_exists": reward is None or reward_files is not None,
    }


def _num_parameters(shapes: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def find_reward_model(
    config: PlannedConfig, judge: JudgeConfig, policy: Model
) -> tuple[Model | None, OpenModel | None]:
    """Return the model of ``judge.path`` and its files; if there are none, assume the policy with a score head.

    A run of ``dpo-jax reward`` does not exist before it has run. No model: a Python function scores the answers.

    Raises:
        UserError: it is a language model, or its directory holds no model.
    """
    if judge.path is None:
        return None, None
    options = reward_model_config(judge, config.model)
    try:
        source = _source(options, tokenizer=False, section=judge.section)
    except UserError:
        if os.path.exists(expanded(judge.path)):
            raise
        return replace(policy, lora=None, config=replace(policy.config, scores=1)), None
    opened = OpenModel(source, options, "tpu", None)
    refuse_language_model(opened.model, judge)
    return opened.model, opened


def _num_steps(config: PlannedConfig, load: Load, inputs: Inputs) -> int | None:
    """Return the number of steps of the run, or None if it is not known."""
    if inputs.sets is not None:
        return inputs.sets.order.num_steps
    if config.run.steps or not inputs.examples:
        return config.run.steps
    return math.ceil((config.run.epochs or 1) * inputs.examples / load.examples)


def _changed(config: PlannedConfig, section: str, **options: Any) -> Any:
    return replace(config, **{section: replace(getattr(config, section), **options)})


MEMORY_SAVERS: dict[str, Callable[[PlannedConfig], PlannedConfig]] = {  # cheapest first
    "model.remat": lambda c: _changed(c, "model", remat="full"),
    "batch.accumulation": lambda c: _changed(c, "batch", accumulation=2 * c.batch.accumulation),
    "mesh.tensor": lambda c: _changed(c, "mesh", tensor=2 * c.mesh.tensor),
    "reference.mode": lambda c: (
        _changed(c, "reference", mode="cached", dtype="auto")
        if c.reference_mode == "live" and not c.planned.per_prompt
        else c
    ),
    "reference.dtype": lambda c: (
        _changed(c, "reference", dtype="bfloat16") if c.reference_mode == "live" and c.lora.rank == 0 else c
    ),
    "optimizer.moment_dtype": lambda c: _changed(c, "optimizer", moment_dtype="bfloat16"),
}


def search_fit(
    config: PlannedConfig, source: ModelSource, slice_: Topology, inputs: Inputs, peak: float
) -> list[dict[str, Any]]:
    """Return plans with settings that need less and less memory, until one fits or no setting helps further.

    Each setting is applied again as long as it lowers the peak, initially ``peak`` GiB, and is listed as ``changed``.
    """
    plans: list[dict[str, Any]] = []
    changed: dict[str, Any] = {}
    for option, save_memory in MEMORY_SAVERS.items():
        section, name = option.split(".")
        while True:
            rows = inputs.rows if option == "batch.accumulation" else None
            if rows is not None and rows % 2:
                break
            candidate_inputs = inputs if rows is None else replace(inputs, rows=rows // 2)
            try:
                candidate = save_memory(config)
                if candidate == config:
                    break
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


def _measured_inputs(config: PlannedConfig, source: ModelSource, inputs: Inputs) -> Inputs:
    """Return ``inputs`` with the config's data sets and the mean lengths of the training pairs added."""
    tokenizer = find_tokenizer(source, config.model, config.data.chat_template)
    sets = sets_of(config, tokenizer).with_answers(config.planned)
    ids = np.concatenate([sets.order.step_ids(step) for step in range(sets.order.num_steps)])
    lengths = sets.train.lengths[ids[ids >= 0]].mean(0).tolist()
    return replace(inputs, lengths=tuple(lengths[:2] if config.planned.per_prompt else lengths), sets=sets)


def _source(config: ModelConfig, *, tokenizer: bool, section: str = "model") -> ModelSource:
    """Find a model's config: in local files, in the table of known models if no tokenizer is needed, or on the hub."""
    known_hf_config = known_config(config.path)
    reads_files = os.path.isdir(expanded(config.path)) or (tokenizer and config.tokenizer is None)
    if known_hf_config is not None and not reads_files:
        return ModelSource(known_hf_config, None, None)
    return find_model(config.path, config.revision, config.checkpoint, weights=False, section=section)


def _memory(phases: Sequence[Phase], slice_: Topology) -> dict[str, Any]:
    """Return the memory of the phase that needs most, in GiB per device, and the peaks of all if there are several.

    ``fits`` is None if only the compiler can tell; ``activations`` is None if there is not enough for the program.
    """
    capacity = slice_.chip.device_memory
    phase = max(phases, key=lambda phase: phase.peak)
    is_compiled = all(phase.program.seconds is not None for phase in phases)
    fits = not any(phase.program.out_of_memory for phase in phases) and phase.peak <= capacity
    memory = _phase_memory(phase) | {
        "capacity": capacity / GIB,
        "fits": None if fits and not is_compiled else fits,
    }
    if len(phases) > 1:
        memory |= {"phase": phase.name, "phases": {phase.name: _phase_memory(phase) for phase in phases}}
    return memory


def _phase_memory(phase: Phase) -> dict[str, float | None]:
    sizes = {name: size / GIB for name, size in phase.sizes.items()}
    activations = None if phase.program.out_of_memory else (phase.peak - sum(phase.sizes.values())) / GIB
    return sizes | {"activations": activations, "peak": phase.peak / GIB}
