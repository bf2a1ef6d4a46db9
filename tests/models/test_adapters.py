"""Adapters: the same function as PEFT's, trained alone, beside weights that nothing changes."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from runs import saved_arrays, saved_bits
from safetensors.numpy import load_file, save_file
from small import logps_fn as small_logps_fn
from small import pack, random_pairs, small_model, small_params

from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.commands.evaluate import evaluate
from dpo_jax.commands.export import export
from dpo_jax.config import DPOConfig, LoraConfig, LossConfig, MeshConfig, ModelConfig, SFTConfig
from dpo_jax.config.file import load_yaml, parse_config
from dpo_jax.errors import UserError
from dpo_jax.logprobs import make_logps_fn
from dpo_jax.losses import mean_loss, preference_loss
from dpo_jax.models.adapters import Adapted, make_lora, merge, start_adapters
from dpo_jax.models.decoder import Model, plain_batch
from dpo_jax.models.families import decoder_config
from dpo_jax.parallel.sharding import make_mesh, replicated
from dpo_jax.runs.directory import RunDir, read_json
from dpo_jax.step import Frozen, init_state, make_train_step, state_shardings
from dpo_jax.train import train
from dpo_jax.weights.hub import read_hf_config
from dpo_jax.weights.huggingface import load_params
from dpo_jax.weights.open import (
    adapted_run,
    build_model,
    find_model,
    load_weights,
    param_shardings,
    trained_shardings,
)
from dpo_jax.weights.peft import load_adapters

TOKENS = np.random.default_rng(0).integers(3, 500, (2, 24), dtype=np.int32)
ONE = jax.devices()[:1]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# PEFT asks transformers for a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def options(shared: Path, folder: Path, **more) -> dict:
    """A short run of adapters on real pairs and a real model."""
    return {
        "model": {"path": str(shared / "models" / "stories260K")},
        "lora": {"rank": 4},
        "data": {"train": {"path": str(shared / "reference_curves" / "pairs.jsonl"), "limit": 60}, "max_length": 128,
                 "eval_fraction": 0.1, "workers": 1, "store": str(folder / "store")},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "batch": {"pairs": 4, "max_shapes": 1},
        "run": {"dir": str(folder / "run"), "steps": 3, "progress": False, "report": False,
                "token_stats": False},
        "checkpoint": {"every": 1},
    } | more  # fmt: skip


def config_of(shared: Path, folder: Path, **overrides) -> DPOConfig:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return parse_config(options(shared, folder), named, DPOConfig)


def logits(model: Model, params, adapters=None) -> np.ndarray:
    batch = plain_batch(jnp.asarray(TOKENS), jnp.full(len(TOKENS), TOKENS.shape[1]))
    compute = jax.jit(lambda weights: model.hidden(weights, batch) @ model.unembedding(weights).T)
    return np.asarray(compute(Adapted(adapters, params)))


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def plain_model(folder: Path, lora: LoraConfig | None = None) -> Model:
    model = Model(config=decoder_config(read_hf_config(folder)), attention="xla")
    return model if lora is None else Model(config=model.config, attention="xla", lora=make_lora(lora, model.config))


def on_one_device(tree):
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(ONE[0]), tree)


# ------------------------------------------------------------------------------------------------- runs and files


@pytest.fixture(scope="module")
def made(shared, tmp_path_factory) -> Path:
    """A folder with a finished run of adapters, whose every option of lora differs from its default."""
    folder = tmp_path_factory.mktemp("lora")
    lora = {"lora__rslora": True, "lora__targets": ["[qv]_proj", "gate_proj", "o_proj"], "lora__init": "zero_a"}
    train(config_of(shared, folder, run__export=True, **lora), devices=ONE)
    return folder


def test_what_was_trained_is_the_same_function_in_peft(made, shared, peft, tmp_path, capsys):
    """The adapters alone, merged at the end of the run, merged later, and merged for another run to start from."""
    base = shared / "models" / "stories260K"
    export(made / "run", tmp_path / "adapters", "newest", adapters=True)
    export(made / "run", tmp_path / "merged", "newest")
    files = len(list((tmp_path / "merged").iterdir()))
    assert re.findall(r"exported .*", capsys.readouterr().err) == [
        f"exported the adapters of {made / 'run'} at step 3 to {tmp_path / 'adapters'}: 2 files, 0.1 MB, float32",
        f"exported the model of {made / 'run'} at step 3 to {tmp_path / 'merged'}: {files} files, 1.1 MB, float32",
    ]
    with pytest.raises(UserError, match="it is inside the run"):
        export(made / "run", made / "run" / "checkpoints" / "9", "newest")
    hf_base = partial(transformers.AutoModelForCausalLM.from_pretrained, base)
    before, adapted = torch_logits(hf_base()), peft.PeftModel.from_pretrained(hf_base(), tmp_path / "adapters")
    theirs = torch_logits(adapted)
    assert np.abs(theirs - before).max() > 0.1  # or equality would say little
    found = {}
    for folder in (tmp_path / "merged", made / "run" / "export"):
        found[folder.name] = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(folder))
    model = plain_model(base)
    source, mesh = find_model(str(made / "run"), None), make_mesh(MeshConfig(), ONE)
    given = ModelConfig(path=str(made / "run"))
    params = load_weights(source, build_model(source, given, "cpu"), given, mesh)
    found["loaded"] = logits(model, params)
    for name, ours in found.items():
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=name)


def peft_adapters(base: Path, out: Path, **changes) -> np.ndarray:
    """Adapters of PEFT's making with random A and B in a directory; the logits with them."""
    import peft
    import torch

    torch.manual_seed(0)
    given = {"r": 3, "lora_alpha": 1, "target_modules": list(TARGETS), "init_lora_weights": False,
             "task_type": "CAUSAL_LM"} | changes  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(**given))
    model.save_pretrained(out)
    return torch_logits(model)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "target_modules": ["k_proj", "down_proj", "up_proj"]}])
def test_adapters_of_peft_are_the_same_function_here(shared, peft, tmp_path, changes):
    base = shared / "models" / "stories260K"
    theirs = peft_adapters(base, tmp_path, **changes)
    lora = LoraConfig(rank=3, alpha=1.0, rslora="use_rslora" in changes,
                      targets=tuple(changes.get("target_modules", TARGETS)))  # fmt: skip
    model = plain_model(base, lora)
    params = load_params(base, model, shardings=None, dtype="float32")
    adapters = load_adapters(tmp_path, model, lora, on_one_device(model.adapter_shapes()))
    np.testing.assert_allclose(logits(model, params, adapters), theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(model, merge(Adapted(adapters, params), model)), theirs, atol=1e-4, rtol=0)
    assert np.abs(logits(model, params) - theirs).max() > 0.1


BAD_ADAPTERS = [
    ({"use_dora": True}, {}, "use_dora: True cannot be used"),
    ({"bias": "all"}, {}, "bias: 'all' cannot be used"),
    ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save: ['lm_head'] cannot be used"),
    ({"alpha_pattern": {"q_proj": 2}}, {}, "alpha_pattern: {'q_proj': 2} cannot be used"),
    ({"rank_pattern": {"q_proj": 2}}, {}, "rank_pattern: {'q_proj': 2} cannot be used"),
    ({"peft_type": "LOHA"}, {}, "peft_type: 'LOHA' cannot be used"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights: 'pissa' cannot be used"),
    ({"something_new": 1}, {}, "something_new: 1 cannot be used"),
    ({"layers_to_transform": 0}, {}, "layers_to_transform: 0 cannot be used"),  # the first layer alone
    ({"arrow_config": {}}, {}, "arrow_config: {} cannot be used: this option is not supported; merge these"),
    ({"peft_type": ["LORA"]}, {}, "peft_type: ['LORA'] cannot be used"),
    ({"init_lora_weights": {}}, {}, "init_lora_weights: {} cannot be used"),
    ({"bias": None}, {}, "bias: None cannot be used"),
    ({"r": "3"}, {}, "r: '3' cannot be used: lora.rank is 3"),
    ({"lora_alpha": float("nan")}, {}, "lora_alpha: nan cannot be used"),
    ({}, {"rank": 2}, "r: 3 cannot be used: lora.rank is 2; set both to the same value"),
    ({}, {"alpha": 3.0}, "lora_alpha: 1 cannot be used: lora.alpha is 3.0; set both to the same value"),
    ({}, {"rslora": True}, "use_rslora: False cannot be used: lora.rslora is True; set both to the same value"),
    ({}, {"targets": ("q_proj",)}, "which is not in lora.targets"),
    ({"target_modules": ["q_proj"]}, {}, "which lora.targets requires"),
]


@pytest.fixture(scope="module")
def peft_folder(shared, peft, tmp_path_factory):
    """Adapters of PEFT by their targets."""
    folder = tmp_path_factory.mktemp("peft")
    for name, targets in (("all", list(TARGETS)), ("one", ["q_proj"])):
        peft_adapters(shared / "models" / "stories260K", folder / name, target_modules=targets)
    return folder


@pytest.mark.parametrize(("written", "asked", "line"), BAD_ADAPTERS, ids=[case[2][:30] for case in BAD_ADAPTERS])
def test_what_peft_can_say_and_is_not_done_here_is_refused(shared, peft_folder, tmp_path, written, asked, line):
    folder = peft_folder / ("one" if "target_modules" in written else "all")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    told = json.loads((tmp_path / "adapter_config.json").read_text()) | written
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    lora = LoraConfig(**{"rank": 3, "alpha": 1.0} | asked)
    model = plain_model(shared / "models" / "stories260K", lora)
    with pytest.raises(UserError) as refused:
        load_adapters(tmp_path, model, lora, on_one_device(model.adapter_shapes()))
    assert str(refused.value).startswith("lora.path: ")
    assert line in str(refused.value)


FOREIGN_TENSORS = {
    "base_model.model.model.embed_tokens.weight": "is not an adapter of .* merge these adapters .*merge_and_unload",
    "base_model.model.lm_head.lora_A.weight": "is not an adapter of .* merge these adapters .*merge_and_unload",
    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": "no counterpart in this model: use ",
}


@pytest.mark.parametrize("name", FOREIGN_TENSORS)
def test_tensors_of_a_file_that_are_not_used_are_refused(shared, peft_folder, tmp_path, name):
    shutil.copytree(peft_folder / "all", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {name: np.zeros((3, 64), np.float32)}, file)
    lora = LoraConfig(rank=3, alpha=1.0)
    model = plain_model(shared / "models" / "stories260K", lora)
    with pytest.raises(UserError, match=FOREIGN_TENSORS[name]) as refused:
        load_adapters(tmp_path, model, lora, on_one_device(model.adapter_shapes()))
    assert f"{file} contains {name}" in str(refused.value)


@pytest.mark.parametrize(("text", "line"), [
    ("lora: 3", "lora: 3"),
    ("lora: {rank: [4]}", "lora.rank"),
    ("lora: {rank: 4, targets: 3}", "lora.targets must be a string, got 3"),
    ("lora: {rank: 4, more: 1}", "lora.more"),
    ("lora: {rank: 4}", "model: None"),
    ("{lora: {rank: 4}, model: {path: [x]}}", "model.path"),
    ("{lora: {rank: 4}, model: {}}", "model.path is required"),
])  # fmt: skip
def test_an_edited_config_of_a_run_is_refused_by_name(tmp_path, text, line):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        adapted_run(RunDir(tmp_path))
    assert str(refused.value).startswith(f"{tmp_path / 'config.yaml'}: {line}")


def test_adapters_of_another_model_are_refused(shared, peft_folder):
    lora = LoraConfig(rank=3, alpha=1.0)
    hf = read_hf_config(shared / "models" / "stories260K") | {"intermediate_size": 96}
    config = decoder_config(hf)
    model = Model(config=config, lora=make_lora(lora, config))
    with pytest.raises(UserError, match=r"mlp.* of shape .* but this model needs .* use adapters of this model"):
        load_adapters(peft_folder / "all", model, lora, on_one_device(model.adapter_shapes()))


def test_a_run_of_adapters_whose_base_has_changed_is_refused(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    text = (run / "config.yaml").read_text()
    was = next(line for line in text.splitlines() if line.startswith("  path: ") and "stories260K" in line)
    (run / "config.yaml").write_text(text.replace(was, f"  path: {made / 'run' / 'export'}"))
    with pytest.raises(
        UserError, match=r"model\.path: the adapters of .* were not trained on the weights in .*: restore"
    ):
        export(run, tmp_path / "out", "newest")
    (run / "config.yaml").write_text(text.replace(was, "  path: ./gone"))
    with pytest.raises(UserError, match=r"config\.yaml: the base model of the adapters cannot be loaded"):
        export(run, tmp_path / "out", "newest")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- a run's own story


def test_the_first_step_is_that_of_equal_models_and_only_adapters_are_saved(made):
    rows = read_json(made / "run" / "metrics.jsonl")
    assert abs(next(row for row in rows if row["step"] == 1)["loss"] - np.log(2)) <= 3e-6
    assert abs(rows[0]["eval_held_out_loss"] - np.log(2)) <= 3e-6
    assert rows[-1]["eval_held_out_loss"] != rows[0]["eval_held_out_loss"]
    saved = saved_arrays(made / "run", 3)
    arrays = {name: x for name, x in saved.items() if x.ndim}
    assert len(arrays) == 3 * sum(name.startswith("params/") for name in arrays)  # weights and two moments
    assert {name.rpartition("/")[2] for name in arrays} == {"a", "b"}
    assert all(4 in x.shape and x.dtype == np.float32 for x in arrays.values())


def test_a_run_of_adapters_goes_on_to_the_same_bytes(made, shared, tmp_path):
    run, whole = tmp_path / "run", made / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "3")
    config = parse_config(whole / "config.yaml", {"run.dir": str(run)}, DPOConfig)
    with pytest.raises(UserError, match=r"lora\.alpha: was 16\.0, now 8\.0"):
        train(replace(config, lora=replace(config.lora, alpha=8.0)), devices=ONE)
    train(config, devices=ONE)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert saved_bits(run, 3) == saved_bits(whole, 3)


@pytest.mark.slow
def test_evaluation_is_that_of_the_run(made, tmp_path):
    config = parse_config(made / "run" / "config.yaml", {}, DPOConfig)
    found = evaluate(config, tmp_path / "first.jsonl")["sets"]["held_out"]
    logged = read_json(made / "run" / "metrics.jsonl")[-1]
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert found[name] == pytest.approx(logged[f"eval_held_out_{name}"], rel=1e-4), name
    other = replace(config, lora=replace(config.lora, alpha=8.0))
    with pytest.raises(UserError, match=r"run\.dir: .* was trained with other adapters"):
        evaluate(other, tmp_path / "second.jsonl")
    start = evaluate(replace(config, run=replace(config.run, dir=str(tmp_path / "none"))), tmp_path / "third.jsonl")
    assert start["sets"]["held_out"]["loss"] == pytest.approx(np.log(2), abs=3e-6)


@pytest.mark.slow
def test_a_run_starts_from_adapters_of_another_with_a_cached_reference(made, shared, tmp_path):
    """Its reference stays the model without them, so it begins where the other ended."""
    export(made / "run", tmp_path / "adapters", "newest", adapters=True)
    config = parse_config(made / "run" / "config.yaml", {"run.dir": str(tmp_path / "run")}, DPOConfig)
    lora = replace(config.lora, path=str(tmp_path / "adapters"), init="kaiming")
    config = replace(config, lora=lora, reference=replace(config.reference, mode="cached"))
    train(replace(config, run=replace(config.run, steps=1, export=False)), devices=ONE)
    first, last = read_json(tmp_path / "run" / "metrics.jsonl")[0], read_json(made / "run" / "metrics.jsonl")[-1]
    assert first["eval_held_out_loss"] == pytest.approx(last["eval_held_out_loss"], rel=1e-4)
    shutil.copytree(tmp_path / "adapters", tmp_path / "moved")
    moved = replace(config, lora=replace(lora, path=str(tmp_path / "moved")), run=replace(config.run, steps=2))
    train(moved, devices=ONE)  # the same adapters
    file = tmp_path / "moved" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + np.float32(0.5).tobytes())
    with pytest.raises(UserError, match="adapters: was "):
        train(moved, devices=ONE)


@pytest.mark.slow
def test_fine_tuning_trains_adapters_too(shared, tmp_path):
    given = options(shared, tmp_path, batch={"examples": 4, "max_shapes": 1})
    train(parse_config(given, {"run.steps": 2, "data.eval_fraction": 0}, SFTConfig), devices=ONE)
    losses = [row["loss"] for row in read_json(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 2
    assert {name.rpartition("/")[2] for name, x in saved_arrays(tmp_path / "run", 2).items() if x.ndim} == {"a", "b"}
    with pytest.raises(UserError, match="it is not empty; name another directory to export to"):
        export(tmp_path / "run", tmp_path / "run", "newest", adapters=True)


def test_only_a_run_of_adapters_has_some_to_export(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    config = load_yaml(run / "config.yaml")
    del config["lora"]
    (run / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--adapters: the run .* trained all weights and has no adapters"):
        export(run, tmp_path / "out", "newest", adapters=True)


# ------------------------------------------------------------------------------------- one step, however laid out

PAIRS = random_pairs()
LOSS = LossConfig(beta=0.3)
LORA = LoraConfig(rank=4, alpha=2.0)


@cache
def small_adapters():
    """Adapters that all matter."""
    shapes = adapted_model().adapter_shapes()
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), jnp.float32), shapes)


def adapted_model(**more) -> Model:
    return small_model(lora=make_lora(LORA, small_model().config), **more)


def adapted_logps_fn(model: Model):
    return make_logps_fn(model.hidden, model.unembedding, chunk=64)


def one_step(batch, logps=None, accumulation=1, config=None, devices=None, **model_options):
    """(log-probs [B, K], loss, gradient) of adapters, through a step of plain gradient descent."""
    model, optimizer = adapted_model(**model_options), optax.sgd(1.0)
    mesh = make_mesh(config or MeshConfig(), devices or ONE)
    fn = adapted_logps_fn(model)
    host_adapters, host_base = (jax.tree.map(np.array, tree) for tree in (small_adapters(), small_params()))
    with jax.set_mesh(mesh):
        adapters = jax.device_put(host_adapters, trained_shardings(model, mesh))
        base = jax.device_put(host_base, param_shardings(model, mesh))
        place = make_to_devices(mesh, int(accumulation > 1))
        batch = place(batch)
        abstract = jax.eval_shape(lambda params: init_state(params, optimizer), adapters)
        shardings = state_shardings(abstract, trained_shardings(model, mesh), replicated(mesh), optimizer)
        step = make_train_step(logps_fn=fn, loss=LOSS, optimizer=optimizer, accumulation=accumulation,
                               shardings=shardings, metrics_sharding=replicated(mesh))  # fmt: skip
        scored = jax.vmap(fn, (None, 0)) if accumulation > 1 else fn
        sums = jax.jit(scored, out_shardings=replicated(mesh))(Adapted(adapters, base), batch).sum.reshape(-1, 2)
        after, metrics = step(init_state(adapters, optimizer), Frozen(base, logps), batch)
    jax.tree.map(np.testing.assert_array_equal, base, host_base)  # and it was not donated
    for leaf, own in zip(jax.tree.leaves(after.params), jax.tree.leaves(shardings.params), strict=True):
        assert leaf.sharding.is_equivalent_to(own, leaf.ndim)
    grads = jax.tree.map(lambda before, now: before - np.asarray(now), host_adapters, after.params)
    return sums, metrics["loss"], grads


@cache
def oracle():
    """The same by the chain rule through merged weights, every sequence alone in its row under a dense mask."""
    fn, batch = small_logps_fn(small_model(attention="xla")), pack(PAIRS, layout="padded")
    base = jax.tree.map(jnp.asarray, small_params())

    def objective(adapters):
        policy = fn(merge(Adapted(adapters, base), adapted_model()), batch)
        return mean_loss(preference_loss(policy, fn(base, batch), LOSS), policy), policy.sum

    (value, sums), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(small_adapters())
    return sums, value, grads


def assert_equal(found, expected):
    (sums, value, grads), (sums_0, value_0, grads_0) = jax.device_get((found, expected))
    np.testing.assert_allclose(sums, sums_0, rtol=2e-6)
    assert abs(value - value_0) <= 2e-5
    change = optax.tree.norm(jax.tree.map(jnp.subtract, grads, grads_0)) / optax.tree.norm(grads_0)
    assert float(change) <= 2e-5


@pytest.mark.parametrize("model", [{}, pytest.param({"scan": False, "remat": "full"}, marks=pytest.mark.slow)], ids=str)
def test_adapters_beside_the_weights_are_merged_ones(model):
    assert_equal(one_step(pack(PAIRS), **model), oracle())


def test_a_cached_reference_is_the_base():
    logps = jax.jit(small_logps_fn())(small_params(), pack(PAIRS, layout="repeated"))
    assert_equal(one_step(pack(PAIRS), logps), oracle())


@pytest.mark.slow
def test_an_accumulated_step_is_the_whole():
    assert_equal(one_step(pack(PAIRS, accumulation=2), accumulation=2), oracle())


ORDERED, PERMUTED = (*range(8),), (5, 2, 7, 0, 3, 6, 1, 4)


@pytest.mark.parametrize(
    ("config", "order"),
    [
        (MeshConfig(fsdp=4, tensor=2), PERMUTED),
        pytest.param(MeshConfig(fsdp=4, tensor=2), ORDERED, marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=8), PERMUTED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_agree(config, order):
    devices = [jax.devices()[place] for place in order]
    batch = pack(PAIRS, rows=8 // config.tensor)
    assert_equal(one_step(batch, config=config, devices=devices), oracle())


@pytest.mark.slow
def test_every_start_leaves_the_model_as_it_is():
    model, batch, base = adapted_model(), pack(PAIRS), small_params()
    fn = jax.jit(adapted_logps_fn(model))
    plain = jax.jit(small_logps_fn())(base, batch).sum
    np.testing.assert_array_equal(fn(Adapted(None, base), batch).sum, plain)
    for init in ("kaiming", "gaussian", "zero_a"):
        adapters = start_adapters(model, jax.random.key(0), init)
        for pair in adapters["layers"].values():
            zero, drawn = (pair["a"], pair["b"]) if init == "zero_a" else (pair["b"], pair["a"])
            assert not np.any(zero)
            assert np.all(np.std(np.asarray(drawn), axis=tuple(range(1, drawn.ndim))) > 0.03)
        np.testing.assert_array_equal(fn(Adapted(adapters, base), batch).sum, plain, err_msg=init)


def test_without_adapters_the_program_is_as_before():
    batch, base = pack(PAIRS), small_params()
    hidden = [jax.jit(model.hidden).lower(base, batch).as_text() for model in (small_model(), adapted_model())]
    assert hidden[0] == hidden[1]
