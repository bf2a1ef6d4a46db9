"""Saved steps: real Orbax directories on eight devices, damaged by hand, and processes that die while they save."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from edits import edits
from etils import epath
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DPOConfig,
    InvalidRowsConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    SourceConfig,
)
from dpo_jax.errors import RunStopped, UserError
from dpo_jax.runs.checkpoint import Checkpoints
from dpo_jax.runs.checksums import leaf_checksums
from dpo_jax.runs.manifest import compare_manifest, make_manifest, refuse_changed, rounding_changes
from dpo_jax.runs.restore import Damaged, rank_steps, read_manifest, read_step, restore_part
from dpo_jax.storage import seal, unseal

KEEP = CheckpointConfig(keep=9)
IDENTITY = {"weights": "w1", "tokenizer": "t1", "template": "c1", "reference": "w1", "store": "s1"}


@struct.dataclass
class State:
    """A state of the trainer's shape: several dtypes, scalars, an optimizer's named tuples."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    healthy: jax.Array


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",))


def shardings(tree, mesh):
    """Each array spread along its first dim where that is divisible, else replicated."""
    spec = {True: P("fsdp"), False: P()}
    size = mesh.devices.size
    return jax.tree.map(lambda x: NamedSharding(mesh, spec[x.ndim > 0 and x.shape[0] % size == 0]), tree)


def make_state(mesh, seed=0) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "layers": {"w": jax.random.normal(keys[0], (16, 2400)), "norm": jax.random.normal(keys[1], (3,))},
        "head": jax.random.normal(keys[2], (8, 5)).astype(jnp.bfloat16),
    }
    state = State(jnp.int32(seed), params, optax.adamw(1e-3).init(params), jnp.ones((), bool))
    return jax.device_put(state, shardings(state, mesh))


def abstract(state, mesh):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, mesh))


def make_config() -> DPOConfig:
    return DPOConfig(
        model=ModelConfig(path="models/a"),
        data=DataConfig(train=(SourceConfig(path="pairs.jsonl"),)),
        run=RunConfig(dir="runs/a", steps=100),
    )


def manifest_of(config=None, **identity) -> dict:
    manifest = make_manifest(asdict(config or make_config()), {**IDENTITY, **identity}, {"devices": 8, "processes": 1})
    return {**manifest, "offsets": {}, "extras": {}}


def offsets_at(step: int) -> dict:
    return {"metrics.jsonl": {"size": step, "digest": f"{step}"}}


MANIFEST = manifest_of()


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 1, 2, 3 of states made from seeds 1, 2, 3."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, KEEP) as checkpoints:
        for step in (1, 2, 3):
            manifest = {**MANIFEST, "offsets": offsets_at(step)}
            assert checkpoints.save(step, make_state(mesh_of(8), step), manifest)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# What is saved comes back


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_restores_bit_for_bit_onto_other_numbers_of_devices(saved, num_devices):
    state = make_state(mesh_of(8), 3)
    target = abstract(state, mesh_of(num_devices))
    restored, manifest = Checkpoints(saved, KEEP).restore(target)
    assert_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
    assert manifest["step"] == 3
    assert manifest["offsets"] == offsets_at(3)
    assert manifest["config"] == json.loads(json.dumps(asdict(make_config())))


def test_an_older_step_and_steps_already_saved(saved):
    checkpoints = Checkpoints(saved, KEEP)
    state = make_state(mesh_of(8), 1)
    assert_equal(read_step(checkpoints.directory, 1, abstract(state, mesh_of(8)))[0], state)
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.save(3, state, MANIFEST) is False


def test_nothing_saved_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", KEEP)
    assert checkpoints.restore(abstract(make_state(mesh_of(8)), mesh_of(8))) is None
    assert checkpoints.manifest() is None
    assert checkpoints.steps() == []


def test_a_save_under_way_does_not_see_the_steps_after_it(tmp_path):
    mesh = mesh_of(8)
    init = jax.device_put({"w": jnp.zeros((256, 4096))}, NamedSharding(mesh, P("fsdp")))
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = update(init)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state, MANIFEST)
            for _ in range(10):
                state = update(state)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for step in range(1, 4):
        restored, _ = read_step(checkpoints.directory, step, target)
        assert np.unique(np.asarray(restored["w"])) == 10 * (step - 1) + 1


def restore_params(directory, which, target, *notice):
    fields, manifest = restore_part(directory, which, {"params": target}, *notice)
    assert set(fields) == {"params"}
    return fields["params"], manifest


def test_parameters_alone_in_another_dtype(saved):
    state = make_state(mesh_of(8), 3)
    target = abstract(state.params, mesh_of(2))
    params, manifest = restore_params(saved, "newest", target)
    assert_equal(params, state.params)
    assert manifest["step"] == 3
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), target)
    assert_equal(restore_params(saved, "newest", wide)[0], jax.tree.map(lambda x: x.astype(jnp.float32), state.params))


# What is kept


def test_newest_and_best_are_kept_also_over_a_restart(tmp_path):
    config = CheckpointConfig(keep=2, keep_best=1, best_metric="eval_loss", best_mode="min")
    state = make_state(mesh_of(8))
    values = {1: 0.5, 2: 0.2, 3: 0.4, 4: None, 5: math.nan, 6: 0.9}
    for steps in ((1, 2, 3), (4, 5, 6)):
        with Checkpoints(tmp_path, config) as checkpoints:
            for step in steps:
                metrics = None if values[step] is None else {"eval_loss": np.float32(values[step])}
                checkpoints.save(step, state, manifest_of(replace(make_config(), checkpoint=config)), metrics)
    checkpoints = Checkpoints(tmp_path, config)
    assert checkpoints.steps() == [2, 5, 6]
    target = abstract(state.params, mesh_of(8))
    assert restore_params(tmp_path, "best", target)[1]["step"] == 2
    assert restore_params(tmp_path, "newest", target)[1]["step"] == 6


def test_of_equally_good_steps_the_later_is_better():
    config = CheckpointConfig(keep_best=1, best_metric="m")
    saved = {1: {"m": 1.0}, 2: {"m": 2.0}, 3: {"m": 2.0}, 4: {"m": math.nan}, 5: {"n": 9.0}}
    assert rank_steps(saved, config) == [3, 2, 1]


def test_a_best_metric_that_is_not_measured(tmp_path, saved):
    config = CheckpointConfig(keep_best=1, best_metric="eval_loss")
    with pytest.raises(UserError, match=r"'eval_loss' is not an evaluation metric; available: eval_a/loss"):
        Checkpoints(tmp_path, config).save(1, make_state(mesh_of(8)), MANIFEST, {"eval_a/loss": 1.0})
    with pytest.raises(UserError, match=r"has no checkpoint.best_metric"):
        restore_params(saved, "best", abstract(make_state(mesh_of(8)).params, mesh_of(8)))


# What is damaged


def largest_file(state: Path) -> Path:
    """The file that holds most of the arrays' bytes."""
    return max(state.rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate_arrays(step: Path):
    os.truncate(largest_file(step / "state"), 40)


def flip_a_byte(step: Path):
    path = largest_file(step / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def delete_arrays(step: Path):
    shutil.rmtree(step / "state")


def delete_manifest(step: Path):
    shutil.rmtree(step / "manifest")


def cut_manifest(step: Path):
    os.truncate(step / "manifest" / "metadata", 100)


def edit_manifest(step: Path):
    path = step / "manifest" / "metadata"
    path.write_text(path.read_text().replace('"step": 3', '"step": 2', 1))


def empty_manifest(step: Path):
    (step / "manifest" / "metadata").write_text("{}")


def nested_manifest(step: Path):
    (step / "manifest" / "metadata").write_text("[" * 100_000)


def empty(step: Path):
    shutil.rmtree(step)
    step.mkdir()


def swap_arrays(step: Path):
    """Whole, readable, and of another step."""
    shutil.rmtree(step / "state")
    shutil.copytree(step.parent / "1" / "state", step / "state")


DAMAGE = {
    truncate_arrays: "its arrays cannot be read",
    flip_a_byte: "the checksum of params/layers/w is wrong",  # Orbax reads it without complaint
    delete_arrays: "its arrays cannot be read",
    delete_manifest: "it has no manifest",
    cut_manifest: "its manifest cannot be used: not JSON",
    edit_manifest: "its manifest cannot be used: checksum mismatch",
    empty_manifest: "its manifest cannot be used: checksum mismatch",
    nested_manifest: "its manifest cannot be used: not JSON: RecursionError",
    empty: "it has no manifest",
    swap_arrays: "the checksum of .* is wrong",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_step_is_set_aside_and_the_one_before_taken(copy, damage):
    damage(copy / "3")
    said = []
    checkpoints = Checkpoints(copy, KEEP, said.append)
    state = make_state(mesh_of(8), 2)
    reader = []
    params, manifest = restore_params(copy, "newest", abstract(state.params, mesh_of(8)), reader.append)
    assert manifest["step"] == 2
    assert len(reader) == 1
    assert (copy / "3").exists()
    restored, manifest = checkpoints.restore(abstract(state, mesh_of(4)))
    assert_equal(restored, state)
    assert_equal(params, state.params)
    assert manifest["step"] == 2
    assert checkpoints.steps() == [1, 2]
    assert (copy / "3.damaged").is_dir()
    assert len(said) == 1
    assert "\n" not in said[0]
    assert re.search(f"step 3 is damaged .*{DAMAGE[damage]}", said[0]), said[0]
    with checkpoints:  # and step 3 can be saved again
        checkpoints.save(3, restored, MANIFEST, wait=True)
    assert checkpoints.steps() == [1, 2, 3]


def test_every_edit_of_a_manifest_damages_its_step(copy):
    """Also of a field that is not looked at here, and where the edited manifest was sealed again."""
    path = copy / "3" / "manifest" / "metadata"
    intact = path.read_bytes()
    state = abstract(make_state(mesh_of(8), 2).params, mesh_of(8))
    for name, text in edits(intact).items():
        path.write_bytes(text)
        with pytest.raises(Damaged) as damage:
            read_manifest(epath.Path(copy), 3)
        assert len(str(damage.value).splitlines()) == 1, name
        assert Checkpoints(copy, KEEP).manifest()["step"] == 2
    said = []
    assert restore_params(copy, "newest", state, said.append)[1]["step"] == 2
    assert len(said) == 1


@pytest.mark.parametrize("harm", ["missing", "cut", "garbled"])
def test_whatever_file_is_harmed_what_comes_back_is_right(saved, tmp_path, harm):
    """Orbax may do without a file or not; either way the state is that of the step in the manifest."""
    states = {step: make_state(mesh_of(8), step) for step in (2, 3)}
    files = sorted(path.relative_to(saved) for path in (saved / "3").rglob("*") if path.is_file())
    assert len(files) > 8
    found = set()
    for place, name in enumerate(files):
        copy = Path(shutil.copytree(saved, tmp_path / str(place)))
        if harm == "missing":
            (copy / name).unlink()
        elif harm == "cut":
            os.truncate(copy / name, (copy / name).stat().st_size // 2)
        else:
            (copy / name).write_bytes(os.urandom(200))
        restored, manifest = Checkpoints(copy, KEEP, lambda line: None).restore(abstract(states[3], mesh_of(8)))
        assert_equal(restored, states[manifest["step"]])
        found.add(manifest["step"])
    assert found == {2, 3}


def test_a_run_whose_saves_are_all_damaged_never_starts_over(copy):
    for step in (1, 2, 3):
        truncate_arrays(copy / str(step))
    target = abstract(make_state(mesh_of(8)), mesh_of(8))
    for _ in range(2):  # the second start finds only what was set aside
        with pytest.raises(RunStopped, match=r"in .* is usable \(1.damaged, 2.damaged, 3.damaged") as stopped:
            Checkpoints(copy, KEEP, lambda line: None).restore(target)
        assert "\n" not in str(stopped.value)


def test_other_arrays_are_refused_and_nothing_set_aside(copy):
    state = make_state(mesh_of(8), 3)
    other = replace(state, params={**state.params, "layers": {"w": jnp.zeros((8, 24)), "bias": jnp.zeros(3)}})
    with pytest.raises(UserError, match=r"params/layers/w: saved float32\[16, 2400\], needed .*\[8, 24\]") as refused:
        Checkpoints(copy, KEEP).restore(abstract(other, mesh_of(8)))
    assert "params/layers/norm: saved float32[3], needed absent" in str(refused.value)
    assert Checkpoints(copy, KEEP).steps() == [1, 2, 3]


@pytest.mark.parametrize(("number", "written"), [(99, seal), (1, dict)])
def test_a_manifest_of_another_format_is_refused_and_left(copy, number, written):
    path = copy / "3" / "manifest" / "metadata"
    path.write_text(json.dumps(written({**unseal(path.read_bytes()), "format": number})))
    with pytest.raises(UserError, match=f"has format {number}, but this version reads 5"):
        Checkpoints(copy, KEEP)
    assert (copy / "3").is_dir()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoints: .* cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", KEEP)


# What fails while it is written


def test_a_save_that_fails_in_the_background_is_an_error_and_costs_no_older_step(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def train():
        with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
            checkpoints.save(1, state, MANIFEST, wait=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the arrays do not fit, like on a full disk
            assert checkpoints.save(2, state, MANIFEST)
            checkpoints.save(3, state, MANIFEST)

    try:
        with pytest.raises(RunStopped, match=r"checkpoint of step 2: could not be written") as stopped:
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(stopped.value)
    with Checkpoints(tmp_path, KEEP) as again:
        assert again.steps() == [1]
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        assert_equal(again.restore(target)[0], state)
        assert again.save(2, state, MANIFEST, wait=True)


DIES = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from dpo_jax.runs.checkpoint import Checkpoints
from dpo_jax.runs.manifest import make_manifest
from dpo_jax.config import CheckpointConfig
state = {"w": jax.random.normal(jax.random.key(0), (1 << 23,))}
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig())
manifest = {**make_manifest({}, {}, {}), "offsets": {}, "extras": {}}
checkpoints.save(1, state, manifest, wait=True)
checkpoints.save(2, state, manifest)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_half_way(tmp_path) -> Path:
    """Where a process died between beginning and ending a save; on a busy machine not every attempt hits that."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", DIES, str(folder)]
        child = subprocess.run(command, env=environment, check=False, timeout=120, capture_output=True, text=True)
        assert child.returncode == -signal.SIGKILL, child.stderr
        if any("orbax-checkpoint-tmp" in path.name for path in folder.iterdir()):
            return folder
    pytest.fail("it was killed too late each time")


def test_killed_while_it_saves(tmp_path):
    tmp_path = killed_half_way(tmp_path)
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 23,))}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.steps() == [1]
        restored, _ = checkpoints.restore(target)
        assert_equal(restored, state)
        checkpoints.save(2, restored, MANIFEST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


# Checksums


def reference_checksum(x: np.ndarray) -> int:
    """The definition in docs/checkpoints.md, element by element in Python integers."""

    def mix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    bits = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    return sum(mix(int(bit) ^ mix(place)) for place, bit in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksums_are_their_definition(dtype):
    x = jax.random.normal(jax.random.key(1), (3, 5, 7)).astype(dtype)
    assert leaf_checksums({"x": x}) == {"x": reference_checksum(np.asarray(x))}


def test_checksums_do_not_see_sharding_and_see_every_change():
    x = jax.random.normal(jax.random.key(1), (16, 8))
    sums = set()
    layouts = [((8,), P("a")), ((8,), P(None, "a")), ((2, 4), P("a", "b")), ((4, 2), P(("a", "b"))), ((1,), P())]
    for shape, spec in layouts:
        mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), ("a", "b")[: len(shape)])
        sums.add(leaf_checksums([jax.device_put(x, NamedSharding(mesh, spec))])["0"])
    assert len(sums) == 1
    changed = [x.at[3, 3].add(1e-6), x.at[0, 0].set(-0.0), x[::-1], x.T.reshape(16, 8), -x]
    assert len({leaf_checksums([y])["0"] for y in changed} | sums) == len(changed) + 1


# Manifests


def test_an_equal_run_differs_in_nothing():
    assert compare_manifest(MANIFEST, manifest_of()) == [] == rounding_changes(MANIFEST, manifest_of())


MATTER = {
    "loss.beta": {"loss": replace(make_config().loss, beta=0.2)},
    "optimizer.learning_rate": {"optimizer": OptimizerConfig(learning_rate=1e-6)},
    "batch.pairs": {"batch": BatchConfig(pairs=32)},
    "run.seed": {"run": RunConfig(dir="runs/a", steps=100, seed=1)},
    "run.steps": {"run": RunConfig(dir="runs/a", steps=200)},
    "data.shuffle": {"data": replace(make_config().data, shuffle=False)},
    "data.invalid_rows.too_long": {
        "data": replace(make_config().data, invalid_rows=InvalidRowsConfig(too_long="drop"))
    },
    "model.dtype": {"model": ModelConfig(path="models/a", dtype="bfloat16")},
}


@pytest.mark.parametrize("field", MATTER)
def test_options_that_matter_are_refused(field):
    new = manifest_of(replace(make_config(), **MATTER[field]))
    lines = compare_manifest(MANIFEST, new)
    assert len(lines) == 1
    assert lines[0].startswith(f"{field}: was ")
    with pytest.raises(UserError, match=r"run.dir: runs/a was started with different options") as refused:
        refuse_changed(MANIFEST, new, "runs/a")
    assert lines[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_of_sets_matter():
    old, new = (
        replace(make_config(), data=DataConfig(train=tuple(SourceConfig(path=path, weight=weight) for path in "ab")))
        for weight in (None, 1.0)
    )
    lines = [f"data.train.{index}.weight: was null, now 1.0" for index in (0, 1)]
    assert compare_manifest(manifest_of(old), manifest_of(new)) == lines


def test_options_that_do_not_matter_pass():
    config = make_config()
    new = replace(
        config,
        model=replace(config.model, path="moved/a"),
        data=DataConfig(train=(SourceConfig(path="moved.jsonl"),), workers=3, eval={"e": SourceConfig(path="e")}),
        run=replace(config.run, dir="moved", progress=False, log_every=5, trackers=("wandb",)),
        checkpoint=CheckpointConfig(keep=7),
    )
    assert compare_manifest(MANIFEST, manifest_of(new)) == [] == rounding_changes(MANIFEST, manifest_of(new))


def test_sampling_matters_only_to_what_is_trained_on_samples():
    config = make_config()
    run = replace(config.run, samples=2)
    old, new = (replace(config, run=run, sampling=SamplingConfig(max_tokens=n)) for n in (8, 16))
    assert compare_manifest(manifest_of(old), manifest_of(new)) == []
    trained = [manifest_of(config, ends="[1]") for config in (old, new)]
    assert compare_manifest(*trained) == ["sampling.max_tokens: was 8, now 16"]


def test_layout_and_place_pass_with_a_word():
    config = replace(make_config(), batch=BatchConfig(accumulation=4, layout="repeated"))
    new = make_manifest(asdict(config), IDENTITY, {"devices": 4, "processes": 1})
    assert compare_manifest(MANIFEST, new) == []
    assert rounding_changes(MANIFEST, new) == [
        "batch.accumulation: was 1, now 4",
        'batch.layout: was "shared", now "repeated"',
        "devices: was 8, now 4",
    ]


def test_what_a_path_points_to_decides():
    moved = replace(make_config(), model=ModelConfig(path="models/b"))
    assert compare_manifest(MANIFEST, manifest_of(moved, weights="w2")) == [
        'weights: was "w1", now "w2"',
        'model.path: was "models/a", now "models/b"',
    ]
    unknown = manifest_of(moved, weights=None)
    assert compare_manifest(manifest_of(weights=None), unknown) == ['model.path: was "models/a", now "models/b"']


def test_a_longer_run_goes_on_only_where_its_steps_stay_the_same():
    constant = replace(make_config(), optimizer=OptimizerConfig(schedule="constant"))
    longer = replace(constant, run=RunConfig(dir="runs/a", steps=200))
    assert compare_manifest(manifest_of(constant), manifest_of(longer)) == []
    one, two = (replace(constant, run=RunConfig(dir="runs/a", epochs=epochs)) for epochs in (1, 2))
    assert compare_manifest(manifest_of(one), manifest_of(two)) == ["run.epochs: was 1, now 2"]


def test_another_format_is_refused():
    with pytest.raises(UserError, match="checkpoint format 0, but this version reads 5"):
        refuse_changed({**MANIFEST, "format": 0}, MANIFEST, "runs/a")


def test_a_save_returns_before_its_step_is_on_the_disk(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 22,))}
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, state, MANIFEST, wait=True)
        checkpoints.save(2, state, MANIFEST)
        begun = checkpoints.steps()
        deadline = time.monotonic() + 60
        while checkpoints.steps() == begun and time.monotonic() < deadline:
            time.sleep(0.01)
    assert begun == [1]
    assert checkpoints.steps() == [1, 2]
