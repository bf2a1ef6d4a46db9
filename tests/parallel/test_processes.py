"""One run in 1, 2 and 4 processes: the same pairs, each process its own rows, and the same numbers."""

import json
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import ended, events, joined, num_lines, started_jointly, write_config
from small import HF_CONFIG, small_model, small_params

from dpo_jax.batch import PreferenceBatch
from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.config import DPOConfig, MeshConfig
from dpo_jax.config.file import parse_config
from dpo_jax.data import store as store_module
from dpo_jax.data.store import Store
from dpo_jax.methods.setup import assemble
from dpo_jax.parallel import rendezvous
from dpo_jax.parallel.sharding import local_row_shards, make_mesh
from dpo_jax.runs.directory import read_json
from dpo_jax.weights.huggingface import export_params
from dpo_jax.weights.open import param_shardings

PERMUTED = [5, 2, 7, 0, 3, 6, 1, 4]
MESHES = {
    "rows apart": (MeshConfig(), range(8), 1),
    "rows of several processes": (MeshConfig(fsdp=4, tensor=2), PERMUTED, 1),
    "parts of scattered rows": (MeshConfig(data=2, fsdp=4), PERMUTED, 2),
}


@pytest.fixture
def given(shared, tmp_path):
    """A run of 4 pairs a step, evaluated on sets that are no multiple of 4, against a cached reference."""
    pairs = (shared / "reference_curves" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(pairs[:48]))
    (tmp_path / "dev.jsonl").write_text("".join(pairs[48:60]))
    return {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": {"dev": str(tmp_path / "dev.jsonl")},
                 "eval_fraction": 0.2, "max_length": 160, "workers": 1, "store": str(tmp_path / "store")},
        "reference": {"mode": "cached"},
        "optimizer": {"learning_rate": 5e-4, "schedule": "constant"},
        "batch": {"pairs": 4},
        "run": {"dir": str(tmp_path / "run"), "epochs": 1, "progress": False, "report": False},
    }  # fmt: skip


# Rows


class Counted(Store):
    """A store that remembers what is read of it."""

    def example(self, i):
        self.read.append(int(i))
        return super().example(i)


def counted(store: Store) -> Counted:
    found = Counted(**vars(store))
    object.__setattr__(found, "read", [])
    return found


def wrong_shards(sharded_structs: PreferenceBatch, whole: PreferenceBatch) -> list[str]:
    """Arrays that are not, on this process' devices, what one process would have put there."""

    def same(array, own):
        shards = array.addressable_shards
        return array.shape == own.shape and all(np.array_equal(shard.data, own[shard.index]) for shard in shards)

    arrays = {name: own for name, own in vars(whole).items() if isinstance(own, np.ndarray)}
    return [name for name, own in arrays.items() if not same(getattr(sharded_structs, name), own)]


def look_at_rows(given: dict) -> dict:
    """What this process makes of each step, by mesh, and how often it has tokenized."""
    tokenized, convert = [], store_module.converted_chunks
    store_module.converted_chunks = lambda sources, *rest: tokenized.append(len(sources)) or convert(sources, *rest)
    facts: dict = {}
    for name, (sizes, order, accumulation) in MESHES.items():
        config = parse_config(given, {"batch.pairs": 12, "batch.accumulation": accumulation}, DPOConfig)
        mesh = make_mesh(sizes, [jax.devices()[i] for i in order])
        setup = assemble(config, mesh)
        to_devices = make_to_devices(mesh, int(accumulation > 1))
        batches = replace(setup.batches, store=counted(setup.batches.store))
        steps = [batches(step) for step in range(batches.order.num_steps)]
        expected = [replace(setup.batches, local_row_shards=None)(step) for step in range(len(steps))]
        facts[name] = {
            "own": local_row_shards(mesh),
            "ids": [data.ids.tolist() for data in steps],
            "counts": [[data.num_tokens, data.num_real_tokens, data.slots] for data in steps],
            "read": batches.store.read,
            "rows": steps[0].batch.tokens.shape[-2] / expected[0].batch.tokens.shape[-2],
            "wrong": [
                wrong_shards(to_devices(data.batch), whole.batch) for data, whole in zip(steps, expected, strict=True)
            ],
        }
    store_module.converted_chunks = convert
    return facts | {"tokenized": len(tokenized)}


def look_in_a_process(given: dict, folder) -> int:
    rendezvous.start_hosts()
    facts = json.dumps(look_at_rows(given))
    (folder / f"facts-{jax.process_index()}.json").write_text(facts)
    return 0


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_lays_its_own_rows(given, tmp_path, count):
    with joined(count, look_in_a_process, given, tmp_path, folder=tmp_path) as processes:
        assert [process.code() for process in processes] == [0] * count, "\n".join(p.said() for p in processes)
    found = [json.loads((tmp_path / f"facts-{i}.json").read_text()) for i in range(count)]
    alone = json.loads(json.dumps(look_at_rows(given)))
    assert [facts["tokenized"] for facts in found] == [2, *[0] * (count - 1)]  # both files, by one of them
    assert alone["tokenized"] == 0
    for name in MESHES:
        for facts in found:
            assert facts[name]["ids"] == alone[name]["ids"]
            assert facts[name]["counts"] == alone[name]["counts"]
            assert not any(facts[name]["wrong"])
    apart = [facts["rows apart"] for facts in found]
    assert [share for facts in apart for share in facts["own"]] == list(range(8))
    assert {facts["rows"] for facts in apart} == {1 / count}
    every = sorted(i for ids in alone["rows apart"]["ids"] for i in ids if i >= 0)
    assert sorted(i for facts in apart for i in facts["read"]) == every  # each example by one process, once
    assert len(set(every)) == len(every) > 16
    assert all(facts["read"] for facts in apart)
    assert sum(len(facts["rows of several processes"]["own"]) for facts in found) > 4  # of 4 shares
    scattered = found[0]["parts of scattered rows"]["own"]
    assert max(np.diff(scattered)) > 1


# Exports


def export_small(folder) -> int:
    """A model of the same weights in any number of processes, spread over all of their devices, written as files."""
    rendezvous.start_hosts()
    model = small_model()
    shardings = param_shardings(model, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    params = jax.device_put(small_params(), shardings)
    export_params(params, model, hf_config=HF_CONFIG, out_dir=folder, dtype="float32", source_dir=None,
                  max_shard_bytes=100_000, overwrite=False)  # fmt: skip
    return 0


def test_several_processes_write_one_export(tmp_path):
    with joined(2, export_small, tmp_path / "two", folder=tmp_path) as processes:
        assert [process.code() for process in processes] == [0, 0], "\n".join(p.said() for p in processes)
    export_small(tmp_path / "one")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) > 3
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == files
    for name in files:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


# Numbers

RELATIVE = {"loss": 2e-5, "grad_norm": 1e-4, "logps/chosen": 2e-6, "logps/rejected": 2e-6}


def allowed(key: str) -> float:
    """Largest difference of a metric between layouts, as a share of it, of values of at least 1; 0: none."""
    for prefix in ("", "eval_held_out_", "eval_dev_"):
        if key.removeprefix(prefix) in RELATIVE:
            return RELATIVE[key.removeprefix(prefix)]
    return 0.0 if key in {"step", "pairs", "num_tokens", "epoch", "learning_rate"} else np.inf


def assert_agree(ours: list[dict], theirs: list[dict]) -> None:
    """Two logs of the same steps."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    worst: dict[str, float] = {}
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            difference = abs(one[key] - other[key]) / max(1.0, abs(other[key]))
            worst[key] = max(worst.get(key, 0.0), difference)
    print({key: value for key, value in worst.items() if np.isfinite(allowed(key))})
    assert {key: value for key, value in worst.items() if value > allowed(key)} == {}


def stopped_at(run, steps: int, processes) -> int:
    """The last process alone is asked to stop after so many steps; the step at which all have stopped."""
    processes[0].wait_for(lambda: num_lines(run / "metrics.jsonl") > steps + 1)
    processes[-1].send(signal.SIGTERM)
    assert [process.code() for process in processes] == [42] * len(processes), "\n".join(p.said() for p in processes)
    said = {process.said().split("stopped after step ")[1].split()[0] for process in processes}
    (event,) = events(run, "preempt")
    assert said == {str(event["step"])}
    assert len(events(run, "start")) == 1  # one process writes
    return event["step"]


@pytest.mark.weekly
def test_runs_of_1_2_and_4_processes_are_one_run(given, tmp_path):
    """Four are asked to stop, two are killed, and what the two have saved is gone on with by four and by one."""
    config = write_config(tmp_path / "config.yaml", given)
    run = {name: tmp_path / name for name in ("four", "two", "two in four", "two in one", "one")}

    def command(name: str, steps: int) -> list:
        return ["train", config, "--run.dir", run[name], "--run.epochs", "null", "--run.steps", steps,
                "--run.eval_every", 3, "--checkpoint.every", 3, "--run.export", "true"]  # fmt: skip

    with started_jointly(4, *command("four", 2000), folder=tmp_path) as processes:
        stopped = stopped_at(run["four"], 3, processes)
    assert (run["four"] / "checkpoints" / str(stopped)).is_dir()
    caches = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/reference-*")}
    assert len(caches) == len(list((tmp_path / "store").iterdir())) == 2  # of the pairs to train on, and of dev

    with started_jointly(2, *command("two", 2000), folder=tmp_path) as processes:
        processes[0].wait_for((run["two"] / "checkpoints" / "3").exists)
        for process in processes:
            process.kill()
    for name, count in (("two in four", 4), ("two in one", 1)):
        shutil.copytree(run["two"], run[name])
        steps = max(int(path.name) for path in (run[name] / "checkpoints").iterdir() if path.name.isdigit()) + 2
        with started_jointly(count, *command(name, steps), folder=tmp_path) as processes:
            assert [process.code() for process in processes] == [0] * count, "\n".join(p.said() for p in processes)
        assert events(run[name], "restore")[-1]["step"] == steps - 2
        assert (run[name] / "export" / "model.safetensors").is_file()

    assert ended(*command("one", 5), devices=8, output=tmp_path / "said") == (0, "")
    rows = {name: [row for row in read_json(path / "metrics.jsonl") if row["step"] <= 4] for name, path in run.items()}
    whole = rows["one"]
    assert [row["step"] for row in whole] == [0, 1, 2, 3, 3, 4]
    for name in ("four", "two in four", "two in one"):
        assert_agree(rows[name], whole[: len(rows[name])])
        assert len(rows[name]) >= 5
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/reference-*")} == caches

    scores = {}
    for count in (4, 1):  # one save, by the pair and by the token
        judge = ["eval", config, "--run.dir", run["two"], "--reference.mode", "live", "--per-token", "--output"]
        with started_jointly(count, *judge, tmp_path / f"{count}.jsonl", folder=tmp_path) as processes:
            assert [process.code() for process in processes] == [0] * count, "\n".join(p.said() for p in processes)
            assert ['"pairs"' in process.said() for process in processes] == [True] + [False] * (count - 1)
        scores[count] = read_json(tmp_path / f"{count}.jsonl")
    for ours, theirs in zip(scores[4], scores[1], strict=True):
        for answer in ("chosen", "rejected"):
            for key in (f"logps/{answer}", f"reference_logps/{answer}"):
                assert abs(ours[key] - theirs[key]) <= 2e-6 * abs(theirs[key])
            np.testing.assert_allclose(ours[f"log_ratios/{answer}"], theirs[f"log_ratios/{answer}"], atol=2e-5)


@pytest.mark.slow
def test_a_run_on_sampled_answers_is_one_run_in_two_processes(shared, tmp_path):
    """Each samples the rows of its own devices: their answers, the updates and the samples are those of one process."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Once there were {i}"}) + "\n" for i in range(24)))
    config = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {"train": str(prompts), "eval_fraction": 0.25, "max_length": 64, "workers": 1,
                 "store": str(tmp_path / "store")},
        "reward": {"function": "rewards:vowels"},
        "sampling": {"max_tokens": 8},
        "ppo": {"epochs": 2},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"prompts": 8},
        "run": {"dir": str(tmp_path / "two"), "steps": 3, "samples": 3, "progress": False, "report": False},
    }  # fmt: skip
    path = write_config(tmp_path / "config.yaml", config)
    with started_jointly(2, "ppo", path, folder=tmp_path) as processes:
        assert [process.code() for process in processes] == [0, 0], "\n".join(p.said() for p in processes)
    assert len(events(tmp_path / "two", "start")) == 1
    assert ended("ppo", path, "--run.dir", tmp_path / "one", devices=8, output=tmp_path / "said") == (0, "")
    ours, theirs = (read_json(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
        assert row.get("sampled_tokens") == expected.get("sampled_tokens")
    assert ours[-1]["eval_held_out_sampled_kl"] > 1e-3  # or equality would say little
    samples, expected = (read_json(tmp_path / name / "samples.jsonl") for name in ("two", "one"))
    assert len(samples) == 2 * 3
    assert samples == expected
