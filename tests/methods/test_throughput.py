"""Speed as it is logged, traces of chosen steps, and the compiler's options."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from small import logps_fn, pack, random_pairs, small_params
from small_tokenizer import make_tokenizer

from dpo_jax.config import DPOConfig, LossConfig, MeshConfig, RunConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.methods.setup import assemble
from dpo_jax.methods.throughput import model_flops, step_rates
from dpo_jax.models.flops import Work, step_flops
from dpo_jax.parallel.chips import CHIPS
from dpo_jax.parallel.compiler import FLAGS, compiler_options, platform_flags
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.runs.directory import RunDir, read_json
from dpo_jax.runs.logs import peak_memory
from dpo_jax.runs.profile import trace_edges, traced
from dpo_jax.step import init_state, make_train_step
from dpo_jax.train import train

STEPS = 4
PROMPT, ANSWERS = 4, (8, 4)  # tokens: <s> and 3 letters; 7 letters and </s>, 3 letters and </s>


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four steps of two pairs of the same lengths, of which the second and third are traced; and the run itself."""
    folder = tmp_path_factory.mktemp("throughput")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"prompt": f"Q{i}?", "chosen": f"yes, {i}.", "rejected": f"no{i}"} for i in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model": {"path": "builtin:tiny", "tokenizer": str(folder / "tokenizer")},
        "data": {"train": str(folder / "pairs.jsonl"), "workers": 1, "store": str(folder / "store")},
        "batch": {"pairs": 2},
        "run": {"dir": str(folder / "run"), "steps": STEPS, "progress": False, "report": False, "profile_steps": [2, 3],
                "compiler_flags": {"xla_cpu_enable_fast_math": "false"}},
    }  # fmt: skip
    config = parse_config(given, {}, DPOConfig)
    train(config, devices=jax.devices()[:1])
    return config


# of the reader of traces: raised inside it, the warning would abort the process
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_a_run_logs_its_operations_and_traces_its_steps(config):
    run = RunDir(Path(config.run.dir))
    rows = read_json(run.timings)
    assert len(rows) == STEPS
    setup = assemble(config, make_mesh(config.mesh, jax.devices()[:1]))
    layers = setup.model.config.layers
    seen = layers * 2 * (sum(range(13)) + sum(range(9)) - sum(range(5)))  # two sequences, their prompt once
    work = Work(tokens=2 * (PROMPT + sum(ANSWERS)), seen=seen, targets=2 * sum(ANSWERS))
    expected = step_flops(setup.model.config, work, live_reference=True)
    for row in rows:
        assert row["flops_per_second"] * row["step_seconds"] == pytest.approx(expected)
        assert row["data_wait_seconds"] >= 0
        assert "mfu" not in row  # a CPU's peak is not known

    (trace,) = run.profile.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    steps = {
        dict(event.stats)["step_num"]
        for plane in planes for line in plane.lines for event in line.events
        if event.name == "step" and "step_num" in dict(event.stats)
    }  # fmt: skip
    assert steps == {2, 3}


def test_layout_reference_and_adapters_decide_what_a_step_asks_for(config):
    setup = assemble(config, make_mesh(config.mesh, jax.devices()[:1]))
    store = setup.batches.store
    count = lambda config: model_flops(config, setup.model, store.lengths[:2], store.num_targets[:2])  # noqa: E731
    live = count(config)
    cached = count(replace(config, reference=replace(config.reference, mode="cached")))
    assert live * 3 == cached * 4
    assert count(replace(config, batch=replace(config.batch, layout="repeated"))) > live


def test_utilization_is_of_all_devices_of_a_known_chip(config, tpus):
    setup = assemble(config, make_mesh(config.mesh, jax.devices()[:1]))
    mesh = Mesh(np.array(tpus("v5e:2x2")).reshape(1, 4, 1), ("data", "fsdp", "tensor"))
    data = setup.batches(0)
    rates = step_rates(config, setup.model, mesh, setup.batches.store, data, seconds=0.5)
    assert rates["mfu"] == pytest.approx(rates["flops_per_second"] / (4 * CHIPS["v5e"].peak_flops))
    assert rates["pairs_per_second"] == 4
    halves = Mesh(np.array(tpus("tpu7x:2x2x1")).reshape(1, 8, 1), mesh.axis_names)  # 2 devices a chip
    rates = step_rates(config, setup.model, halves, setup.batches.store, data, seconds=0.5)
    assert rates["mfu"] == pytest.approx(rates["flops_per_second"] / (4 * CHIPS["tpu7x"].peak_flops))


def test_devices_that_tell_nothing_of_their_memory_are_passed_over(tpus, monkeypatch):
    for devices in (jax.devices(), tpus("v5e:2x2")):
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        assert peak_memory().keys() == {"host_memory_gib"}


def num_traces(run: RunDir) -> int:
    return len(list(run.profile.rglob("*.xplane.pb")))


def test_a_run_that_goes_on_traces_what_is_left_of_the_window(tmp_path):
    config, run = RunConfig(dir="unused", profile_steps=(3, 7), progress=False), RunDir(tmp_path)
    with traced(range(5, 9), config, run) as steps:
        assert [(step, num_traces(run)) for step in steps] == [(5, 0), (6, 0), (7, 1), (8, 1)]
    assert trace_edges(config.profile_steps) == {2, 7}


def test_a_run_that_stops_within_the_window_leaves_its_trace(tmp_path):
    config, run = RunConfig(dir="unused", profile_steps=(3, 7), progress=False), RunDir(tmp_path)

    def stopped() -> None:
        with traced(range(9), config, run) as steps:
            for step in steps:
                if step == 4:
                    raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert num_traces(run) == 1


def test_no_window_is_no_trace(tmp_path):
    with traced(range(3), RunConfig(dir="unused"), RunDir(tmp_path)) as steps:
        assert list(steps) == [0, 1, 2]
    assert num_traces(RunDir(tmp_path)) == 0
    assert trace_edges(()) == set()


@pytest.mark.parametrize("window", [(3,), (0, 2), (4, 3), (1, 2, 3)])
def test_a_window_is_a_first_and_a_last_step(window):
    with pytest.raises(UserError, match=r"run\.profile_steps(: .* counted from 1, such as \[10, 12\]|\.0 must be pos)"):
        RunConfig(dir="unused", profile_steps=window)


def test_a_window_beyond_the_run_is_refused(config, tmp_path):
    beyond = replace(config.run, dir=str(tmp_path / "run"), profile_steps=(2, 5))
    with pytest.raises(UserError, match=r"run\.profile_steps: \[2, 5\] cannot be used: the run has 4 steps"):
        train(replace(config, run=beyond), devices=jax.devices()[:1])


@pytest.mark.parametrize("text", ["v5e:4x4", "v4:2x2x1", "v5p:2x2x2", "v6e:4x4", "tpu7x:2x2x1"])
def test_the_table_of_flags_is_what_the_compiler_knows(text, for_tpus):
    mesh = Mesh(np.array(for_tpus(text)), ("fsdp",))
    expected = [flag.name for flag in FLAGS["tpu"] if not flag.kinds or text.startswith("v5e")]
    assert list(compiler_options(mesh, {})) == expected
    for flags, why in (({"xla_tpu_nonsense": "1"}, "No such compile option: 'xla_tpu_nonsense'"),
                       ({"xla_tpu_scoped_vmem_limit_kib": "much"}, "Failed to parse 'much'")):  # fmt: skip
        with pytest.raises(UserError, match=f"^run.compiler_flags: .*{why}"):
            compiler_options(mesh, flags)


def test_options_are_asked_for_on_the_mesh_in_force():
    mesh, flags = make_mesh(MeshConfig(fsdp=4, tensor=2)), {"xla_cpu_enable_fast_math": "false"}
    with jax.set_mesh(mesh):
        assert compiler_options(mesh, flags) == {"xla_cpu_enable_fast_math": "False"}


def test_flags_are_added_replaced_and_left_out():
    first, *others = (flag.name for flag in FLAGS["tpu"])
    overrides = {first: "", others[0]: "false", "xla_tpu_scoped_vmem_limit_kib": "98304"}
    found = platform_flags("tpu", "TPU v5 lite", overrides)
    assert found == {others[0]: "False", **dict.fromkeys(others[1:], "True"), "xla_tpu_scoped_vmem_limit_kib": "98304"}
    assert platform_flags("cpu", "cpu", {}) == {}


def test_what_this_compiler_does_not_know_is_refused_before_a_run(config, tmp_path):
    for flags, why in (({"xla_nonsense": "1"}, "No such"), ({"xla_cpu_enable_fast_math": "maybe"}, "not a valid bool")):
        wrong = replace(config.run, dir=str(tmp_path / "run"), compiler_flags=flags, profile_steps=())
        with pytest.raises(UserError, match=f"^run.compiler_flags: .*{why}") as refused:
            train(replace(config, run=wrong), devices=jax.devices()[:1])
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_train_step_is_compiled_with_the_options_it_is_given():
    optimizer, params = optax.sgd(0.1), jax.tree.map(jnp.copy, small_params())
    step = make_train_step(logps_fn=logps_fn(), loss=LossConfig(), optimizer=optimizer,
                           compiler_options={"xla_nonsense": "1"})  # fmt: skip
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        step(init_state(params, optimizer), small_params(), pack(random_pairs(2)))
