"""Plans of policy gradients and online DPO: the run's own programs, sizes by hand, and what is in memory when."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dpo_jax.cli import main
from dpo_jax.config import (
    BatchConfig,
    DataConfig,
    DPOConfig,
    JudgeConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OnlineConfig,
    PairDataConfig,
    PolicyGradientConfig,
    PPOConfig,
    RolloutBatchConfig,
    RunConfig,
    SamplingConfig,
    SourceConfig,
)
from dpo_jax.config.online import PairJudgeConfig
from dpo_jax.errors import UserError
from dpo_jax.inference import answer_scores, generate
from dpo_jax.inference.generate import Generated
from dpo_jax.methods.online_dpo import online_dpo
from dpo_jax.methods.ppo import ppo
from dpo_jax.methods.setup import assemble
from dpo_jax.methods.value_model import ValueModel, value_model_of
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.flops import projections
from dpo_jax.parallel.chips import GIB
from dpo_jax.parallel.sharding import abstract_mesh, make_mesh, rollout_mesh
from dpo_jax.plan import ahead_of_time as aot
from dpo_jax.plan import plan as plan_module
from dpo_jax.plan import rollout as rollout_module
from dpo_jax.plan.costs import pair_stage, sampled_stages
from dpo_jax.plan.load import Inputs, RolloutLoad, find_load, find_rollout
from dpo_jax.plan.plan import MEMORY_SAVERS, plan_slices
from dpo_jax.plan.rollout import RolloutPlan, cache_bytes
from dpo_jax.plan.text import render, table
from dpo_jax.weights.known import builtin_model


def constant(prompts, answers, rows):
    """Give every answer the same score."""
    return [0.5] * len(answers)


def tiny(**changes) -> PPOConfig:
    config = PPOConfig(
        model=ModelConfig(path="builtin:tiny"),
        data=DataConfig(train=(SourceConfig(path="not read"),), max_length=64),
        reward=JudgeConfig(path="runs/none yet"),
        sampling=SamplingConfig(max_tokens=24),
        batch=RolloutBatchConfig(prompts=16, row_length=256),
        run=RunConfig(dir="not made", steps=100),
    )
    return replace(config, **changes)


def online(**changes) -> DPOConfig:
    sampled = OnlineConfig(reward=PairJudgeConfig(path="runs/none yet"), answers=4)
    config = DPOConfig(
        model=ModelConfig(path="builtin:tiny"),
        data=PairDataConfig(train=(SourceConfig(path="not read"),), max_length=64, online=sampled),
        sampling=SamplingConfig(max_tokens=24),
        batch=BatchConfig(pairs=16, row_length=256),
        run=RunConfig(dir="not made", steps=100),
    )
    return replace(config, **changes)


# By hand


def test_rows_have_room_for_the_longest_answers():
    mesh = abstract_mesh(MeshConfig(), 4)
    config = tiny(ppo=PolicyGradientConfig(answers=3), batch=RolloutBatchConfig(prompts=20, row_length=256))
    load = find_load(config, mesh, Inputs())
    assert (load.lengths, load.longest) == ((40, 24, 24, 24), 64)
    assert (load.rows, load.unit, load.targets) == (12, 112, 192)  # two prompts of 112 tokens in a row
    shorter = find_load(config, mesh, Inputs(lengths=(20, 10)))
    assert (shorter.rows, shorter.unit, shorter.unit_room) == (12, 50, 92)  # also two
    assert shorter.fill == 20 * 50 / (12 * 256)
    rollout = find_rollout(config, mesh, Inputs())
    assert rollout == RolloutLoad(rows=60, answers=60, prompt_slots=64, max_tokens=24, longest=64)
    assert find_rollout(replace(config, batch=replace(config.batch, prompts=1)), mesh, Inputs()).rows == 4
    for lengths in ((41, 10), (40, 25)):
        with pytest.raises(UserError, match=r"a prompt may have at most 40 tokens .* and an answer 24"):
            find_load(config, mesh, Inputs(lengths=lengths))
    with pytest.raises(UserError, match=r"--rows: 1 rows .* cannot hold 20 prompts of 112 tokens; give more rows"):
        find_load(config, mesh, Inputs(rows=1))


@pytest.mark.parametrize(("fsdp", "tensor", "shards"), [(4, 1, 4), (2, 2, 4), (2, 4, 2)])
def test_the_cache_is_the_sampler_s(fsdp, tensor, shards):
    """Keys and values of all slots; 4 devices of the tensor axis do not divide 2 key heads, and each has both."""
    model = make_model(decoder_config(builtin_model("builtin:tiny")), ModelConfig(path="unused"), "tpu")
    mesh = abstract_mesh(
        MeshConfig(fsdp=4 // min(tensor, 2) if tensor < 4 else 2, tensor=tensor), {1: 4, 2: 4, 4: 8}[tensor]
    )
    load = RolloutLoad(rows=8, answers=8, prompt_slots=64, max_tokens=24, longest=64)
    layers = jax.eval_shape(lambda: model.empty_cache(8, 64).grow(24).layers)
    total = layers.keys.size * 2 + layers.values.size * 2  # bfloat16
    assert total == 2 * 2 * 2 * 8 * 88 * 16 * 2
    assert cache_bytes(model, load, mesh) == total / shards


def test_operations_and_traffic_of_a_step_by_hand():
    config = tiny(ppo=PolicyGradientConfig(epochs=3), mesh=MeshConfig())
    mesh = abstract_mesh(config.mesh, 4)
    c = decoder_config(builtin_model("builtin:tiny"))
    model = make_model(c, config.model, "tpu")
    reward = replace(model, config=replace(c, scores=1))
    load = find_load(config, mesh, Inputs(lengths=(20, 10)))
    plan = RolloutPlan(config, model, value_model_of(config, model), reward, mesh, find_rollout(config, mesh, Inputs()))
    texts = dict.fromkeys(("copy", "sampling", "scoring", "update"), "")
    stages = {stage.name: stage for stage in sampled_stages(plan, load, texts)}
    assert [*stages] == ["copy", "prompts", "tokens", "scoring", "update"]
    linear = 2 * c.layers * sum(inputs * outputs for inputs, outputs in projections(c).values())
    attention, head = 4 * c.layers * c.heads * c.head_dim, 2 * c.hidden * c.vocab
    seen = 30 * 31 // 2
    assert stages["prompts"].model_flops == 16 * (20 * linear + 20 * 21 // 2 * attention)
    assert stages["prompts"].flops == 16 * (64 * linear + 64 * 64 * attention)
    assert stages["tokens"].model_flops == 16 * (10 * linear + (seen - 20 * 21 // 2) * attention + 10 * head)
    assert stages["tokens"].flops == 16 * 24 * (linear + 88 * attention + head)
    assert stages["scoring"].model_flops == 16 * (30 * linear + seen * attention)
    forward, value = 16 * (30 * linear + seen * attention + 10 * head), 16 * (30 * linear + seen * attention)
    assert stages["update"].model_flops == 3 * 3 * (forward + value) + 2 * forward + value
    matrices = sum(4 * (inputs + outputs) + inputs * outputs for inputs, outputs in projections(c).values())
    token = 2 * (c.layers * matrices + c.hidden * (4 + c.vocab)) + cache_bytes(model, plan.load, mesh)
    assert stages["tokens"].traffic == 24 * token  # 4 rows per device
    rloo = replace(config, ppo=PolicyGradientConfig(estimator="rloo", answers=2, epochs=3))
    load = find_load(rloo, mesh, Inputs(lengths=(20, 10)))
    plan = RolloutPlan(rloo, model, None, None, mesh, find_rollout(rloo, mesh, Inputs()))
    stages = sampled_stages(plan, load, texts)
    both = 16 * (40 * linear + (2 * seen - 20 * 21 // 2) * attention + 20 * head)
    assert [stage.name for stage in stages] == ["copy", "prompts", "tokens", "update"]
    assert stages[-1].model_flops == (3 * 3 + 2) * both
    shared = replace(config, ppo=replace(config.ppo, value_model="shared"))
    head_plan = RolloutPlan(shared, model, value_model_of(shared, model), reward, mesh, plan.load)
    load = find_load(shared, mesh, Inputs(lengths=(20, 10)))
    assert sampled_stages(head_plan, load, texts)[-1].model_flops == (3 * 3 + 2) * forward
    own = replace(reward, config=replace(reward.config, layers=1))  # another architecture than the policy's
    value_plan = RolloutPlan(config, model, ValueModel(own), reward, mesh, plan.load)
    assert sampled_stages(value_plan, load, texts)[-1].model_flops == (3 * 3 + 2) * forward + (3 * 3 + 1) * value / 2


def test_pairs_of_sampled_answers_have_the_rollout_of_all_answers_and_the_update_of_two():
    config, mesh = online(), abstract_mesh(MeshConfig(), 4)
    model = make_model(decoder_config(builtin_model("builtin:tiny")), config.model, "tpu")
    load, rollout = find_load(config, mesh, Inputs(lengths=(20, 10))), find_rollout(config, mesh, Inputs())
    assert (load.lengths, load.unit, load.unit_room) == ((20, 10, 10), 40, 68)
    assert rollout == RolloutLoad(rows=64, answers=64, prompt_slots=64, max_tokens=24, longest=64)
    texts = dict.fromkeys(("copy", "sampling", "scoring", "update"), "")
    stages = sampled_stages(RolloutPlan(config, model, None, model, mesh, rollout), load, texts)
    assert [stage.name for stage in stages] == ["copy", "prompts", "tokens", "scoring", "update"]
    c = model.config
    linear = 2 * c.layers * sum(inputs * outputs for inputs, outputs in projections(c).values())
    attention, head = 4 * c.layers * c.heads * c.head_dim, 2 * c.hidden * c.vocab
    assert stages[1].model_flops == 64 * (20 * linear + 20 * 21 // 2 * attention)
    forward = 16 * (40 * linear + (2 * 30 * 31 // 2 - 20 * 21 // 2) * attention + 20 * head)
    assert stages[-1].model_flops == (3 + 1) * forward  # forward and backward pass, and the reference
    assert stages[-1] == pair_stage(config, model, mesh, load, "")


def test_settings_that_save_memory_are_those_of_a_policy_gradient():
    config = tiny()
    assert MEMORY_SAVERS["reference.mode"](config) == config  # its log-probs cannot be cached
    assert MEMORY_SAVERS["reference.dtype"](config).reference.dtype == "bfloat16"
    adapted = tiny(lora=LoraConfig(rank=2))
    assert MEMORY_SAVERS["reference.dtype"](adapted) == adapted
    assert MEMORY_SAVERS["reference.mode"](online()) == online()


# The run's own programs


def structs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2)], ids=["all-weights", "lora"])
def test_what_is_planned_is_what_runs(shared, tmp_path, monkeypatch, lora):
    """State, reference, copy and programs of a run are those that a plan of its config has, to the letter."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Once upon a time, a girl"}) + "\n")
    data = DataConfig(
        train=(SourceConfig(path=str(tmp_path / "prompts.jsonl")),), max_length=64, workers=1, store=str(tmp_path)
    )
    config = tiny(
        model=ModelConfig(path=str(shared / "models" / "stories260K")),
        lora=lora,
        data=data,
        reward=JudgeConfig(function=f"{__name__}:constant"),
        mesh=MeshConfig(tensor=2),
        batch=RolloutBatchConfig(prompts=8, row_length=256, accumulation=2),
        run=RunConfig(dir=str(tmp_path / "run"), steps=aot.NUM_STEPS, progress=False),
    )
    mesh, sampled = make_mesh(config.mesh, jax.devices()[:4]), []

    def recorded(model, options, out_sharding):
        def answers(*inputs):
            sampled.append((original(model, options, out_sharding), inputs))
            rows, ones = len(inputs[1]), np.ones
            return Generated(ones((rows, 24), int), ones((rows, 24)), ones(rows, int) * 24, ones(rows, bool))

        return answers

    original = generate.make_answer_rows
    monkeypatch.setattr(generate, "make_answer_rows", recorded)
    with jax.set_mesh(mesh):
        setup = assemble(config, mesh)
        method, start = ppo(setup, {})
        state = method.first_state(start)
        run = method.batch(0, state)
        lowered = method.step.lower(state, run.frozen, run.rollout)
    inputs = Inputs(lengths=(9, 24))
    load, rollout = find_load(config, mesh, inputs), find_rollout(config, mesh, replace(inputs, sets=None))
    value = value_model_of(config, setup.model)
    arguments = aot.step_arguments(config, setup.model, mesh, load, value)
    assert structs(state) == arguments[0]
    assert structs(run.frozen) == arguments[1]
    planned = arguments[2]
    kinds = lambda tree: jax.tree.map(lambda x: (x.dtype, x.ndim, x.sharding), tree)  # noqa: E731
    assert kinds(replace(run.rollout, inputs=None)) == kinds(replace(planned, inputs=None))
    assert jax.tree.leaves(kinds(run.rollout)) == jax.tree.leaves(kinds(planned))
    assert planned.mask.shape == run.rollout.mask.shape == (2, 4, 1, 24)
    own = (*arguments[:2], structs(run.rollout))
    assert aot.lower_step(config, setup.model, mesh, own, value).as_text() == lowered.as_text()

    plan = RolloutPlan(config, setup.model, value, None, mesh, rollout)
    ((sampler, (copy, tokens, lengths, keys, ends)),) = sampled
    assert structs(copy) == plan.copy
    assert (rollout.rows, rollout.prompt_slots) == (8, 64)
    padded = jax.ShapeDtypeStruct((8, 64), np.int32, sharding=tokens.sharding)
    free = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, ends)]  # on no device in particular
    monkeypatch.setattr(rollout_module, "NUM_ENDS", len(ends))
    with jax.set_mesh(rollout_mesh(mesh)):
        expected = sampler.lower(copy, padded, structs(lengths), *free).as_text()
    assert plan.lower_sampler().as_text() == expected


@pytest.mark.slow
def test_the_step_of_online_dpo_is_planned_as_it_runs(shared, tmp_path):
    """State, reference, pairs and program of a run are those that a plan of its config has, to the letter."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Once upon a time, a girl"}) + "\n")
    sampled = OnlineConfig(reward=PairJudgeConfig(function=f"{__name__}:constant"), answers=3)
    data = PairDataConfig(
        train=(SourceConfig(path=str(tmp_path / "prompts.jsonl")),),
        max_length=64,
        workers=1,
        store=str(tmp_path),
        online=sampled,
    )
    config = online(
        model=ModelConfig(path=str(shared / "models" / "stories260K")),
        data=data,
        mesh=MeshConfig(tensor=2),
        batch=BatchConfig(pairs=8, row_length=256, accumulation=2),
        run=RunConfig(dir=str(tmp_path / "run"), steps=aot.NUM_STEPS, progress=False),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    with jax.set_mesh(mesh):
        setup = assemble(config, mesh)
        method, start = online_dpo(setup, {})
        state = method.first_state(start)
        run = method.batch(0, state)
        lowered = method.dpo.step.lower(state, run.frozen, run.batch)
    load = find_load(config, mesh, Inputs(lengths=(9, 24)))
    arguments = aot.step_arguments(config, setup.model, mesh, load)
    assert structs(state) == arguments[0]
    assert structs(run.frozen) == arguments[1]
    kinds = lambda tree: jax.tree.map(lambda x: (x.dtype, x.ndim, x.sharding), tree)  # noqa: E731
    assert jax.tree.leaves(kinds(run.batch)) == jax.tree.leaves(kinds(arguments[2]))
    assert run.batch.label.shape == arguments[2].label.shape == (2, 4)
    own = (*arguments[:2], structs(run.batch))
    assert aot.lower_step(config, setup.model, mesh, own).as_text() == lowered.as_text()


def test_scores_are_planned_with_the_rows_of_the_run(monkeypatch):
    """Answers as long as they may be make the batch that a plan compiles the reward model's scores for."""
    config, scored = tiny(), []
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    reward = make_model(replace(decoder_config(builtin_model("builtin:tiny")), scores=1), config.model, "cpu")

    def scores(weights, batch):
        scored.append(batch)
        return SimpleNamespace(sum=np.zeros((16, 1)))

    monkeypatch.setattr(answer_scores, "make_scores", lambda model, mesh: scores)
    plan = RolloutPlan(config, reward, None, reward, mesh, find_rollout(config, mesh, Inputs()))
    answer_scores.make_answer_scores(reward, {}, mesh)([[1] * 40] * 16, [[2] * 24] * 16)
    assert structs(scored[0]) == aot.batch_structs(plan.scored, 16, 1, mesh)


# Plans


def planned(config: PPOConfig | DPOConfig, topology: str, inputs: Inputs = Inputs()):  # noqa: B008  frozen
    (found,) = plan_slices(config, [topology], inputs, search=False)
    return found


def check_sums(found, answers=16):
    """Every phase holds its parts, the most of them is the peak, and stages follow each other."""
    memory, stages = found["memory"], found["stages"]
    for phase in memory["phases"].values():
        assert phase["activations"] >= 0
        assert phase["peak"] == pytest.approx(sum(phase[name] for name in phase if name != "peak"))
    assert memory["peak"] == max(phase["peak"] for phase in memory["phases"].values())
    assert memory["peak"] == memory["phases"][memory["phase"]]["peak"]
    best, worst = found["full_overlap"], found["no_overlap"]
    assert best["step_seconds"] == pytest.approx(sum(max(seconds.values()) for seconds in stages.values()))
    assert worst["step_seconds"] == pytest.approx(sum(sum(seconds.values()) for seconds in stages.values()))
    assert max(stages[found["longest_stage"]].values()) == max(max(seconds.values()) for seconds in stages.values())
    assert best["sampled_tokens_per_second"] == pytest.approx(
        answers * found["batch"]["mean_lengths"][1] / best["step_seconds"]
    )
    assert found["run"]["hours"][0] == pytest.approx(100 * best["step_seconds"] / 3600)


def test_without_the_compiler_closed_forms_bound_every_phase(monkeypatch):
    """Sizes of what lives through a step, and of the copy and the cache beside it, over 4 chips."""
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    found = planned(tiny(), "v5e:2x2", Inputs(lengths=(20, 10)))
    check_sums(found)
    memory, weights = found["memory"], 4 * found["model"]["parameters"] / 4 / GIB
    head = 4 * 64 / 4 / GIB  # of the value and the reward model
    assert memory["weights"] == pytest.approx(2 * weights + head)
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"], rel=1e-3)
    assert memory["reference"] == pytest.approx(weights)
    assert memory["reward_model"] == pytest.approx(weights + head)
    sampling = memory["phases"]["sampling"]
    assert sampling["copy"] == pytest.approx(2 * weights)  # in bfloat16, whole on every chip
    assert sampling["cache"] == 2 * 2 * 2 * 4 * 88 * 16 * 2 / GIB
    assert memory["fits"] is None
    text = render(found)
    assert "ASSUMED: it is not found" in text
    assert "rollout      4 answers per device, 1 to a prompt; 4 updates on them" in text
    assert "not compiled" in text
    assert "bound by" in table([found, found])


def test_what_is_held_by_a_shared_value_model_and_by_online_dpo(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    found = planned(online(), "v5e:2x2", Inputs(lengths=(20, 10)))
    check_sums(found, answers=64)
    weights, head = 4 * found["model"]["parameters"] / 4, 4 * 64 / 4
    assert found["memory"]["weights"] == pytest.approx(weights / GIB)
    assert found["memory"]["reward_model"] == pytest.approx((weights + head) / GIB)
    assert found["memory"]["phases"]["sampling"]["cache"] == 2 * 2 * 2 * 16 * 88 * 16 * 2 / GIB
    text = render(found)
    assert "rollout      16 answers per device, 4 to a prompt; 1 update on them" in text
    assert "of prompt, chosen and rejected answer of 20 + 10 + 10 tokens" in text
    shared, mesh = tiny(ppo=PolicyGradientConfig(value_model="shared")), abstract_mesh(MeshConfig(), 4)
    model = make_model(decoder_config(builtin_model("builtin:tiny")), shared.model, "tpu")
    value, load = value_model_of(shared, model), find_load(shared, mesh, Inputs())
    sizes = aot.step_sizes(aot.step_arguments(shared, model, mesh, load, value))
    assert sizes["weights"] == weights + head  # no second trunk
    facts = {"value_parameters": 64, "value_shared": True}
    assert "value model  a head on the policy's layers" in render(found | {"rollout": found["rollout"] | facts})


@pytest.mark.slow
def test_a_small_plan_of_online_dpo_is_compiled():
    found = planned(online(mesh=MeshConfig(tensor=2)), "v5e:2x2")
    print(render(found))
    check_sums(found, answers=64)
    assert found["memory"]["fits"]
    assert [*found["memory"]["phases"]] == ["copy", "sampling", "scoring", "update"]
    assert found["memory"]["phases"]["sampling"]["cache"] == 2 * 2 * 2 * 32 * 1 * 88 * 16 / GIB
    assert found["stages"]["update"]["ici"] > 0


@pytest.mark.slow
def test_a_small_plan_is_compiled(monkeypatch):
    """The sampler's program carries the cache of the closed form; what its loop sends counts for every token."""
    phases, original = [], plan_module.rollout_phases
    monkeypatch.setattr(plan_module, "rollout_phases", lambda *args: phases.extend(original(*args)) or phases)
    found = planned(tiny(mesh=MeshConfig(tensor=2)), "v5e:2x2")
    print(render(found))
    check_sums(found)
    assert found["memory"]["fits"]
    texts = {phase.name: phase.program.text for phase in phases}
    assert [*texts] == ["copy", "sampling", "scoring", "update"]
    cache = "bf16[2,8,1,88,16]"  # layers, rows of two row devices, one of two key heads, slots, head
    assert cache in texts["sampling"]
    sizes = {phase.name: phase.sizes for phase in phases}
    assert sizes["sampling"]["cache"] == 2 * 2 * 2 * 8 * 1 * 88 * 16
    assert found["stages"]["tokens"]["ici"] > 24 * found["stages"]["prompts"]["ici"] / 64  # two sums a layer and token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "20,10,10"], "--lengths: '20,10,10' cannot be used: give mean tokens of prompt and answer"),
        (
            ["--lengths", "41,10"],
            "--lengths: (41.0, 10.0) cannot be used: a prompt may have at most 40 tokens (data.max_length)",
        ),
        (["--batch.row_length", "auto"], "batch.row_length: 'auto' cannot be used: plan needs a number"),
        (
            ["--batch.row_length", "64", "--ppo.answers", "2"],
            "a prompt with its answers at most 64 (batch.row_length); reduce the lengths",
        ),
        (
            ["--reward.path", "meta-llama/Llama-3.2-1B"],
            "reward.path: 'meta-llama/Llama-3.2-1B' cannot be used: it is a language model, which has",
        ),
        (["--reward.path", "."], "reward.path: . holds neither config.json nor checkpoints/"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    config = tmp_path / "ppo.yaml"
    config.write_text("model: {path: builtin:tiny}\ndata: {train: none.jsonl, max_length: 64}\n"
                      "batch: {row_length: 256}\nsampling: {max_tokens: 24}\n"
                      "reward: {path: ./none}\nrun: {dir: none}\n")  # fmt: skip
    assert main(["plan", str(config), "--for", "ppo", "--topology", "v5e:2x2", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "20,10,10"], "--lengths: '20,10,10' cannot be used: give mean tokens of prompt and answer"),
        (["--data.online.reward.path", "."], "data.online.reward.path: . holds neither config.json nor checkpoints/"),
    ],
)
def test_refusals_of_online_dpo(arguments, message, tmp_path, capsys):
    config = tmp_path / "online.yaml"
    config.write_text("model: {path: builtin:tiny}\nbatch: {row_length: 256}\nsampling: {max_tokens: 24}\n"
                      "data: {train: none.jsonl, max_length: 64, online: {reward: ./none}}\n"
                      "run: {dir: none}\n")  # fmt: skip
    assert main(["plan", str(config), "--topology", "v5e:2x2", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
