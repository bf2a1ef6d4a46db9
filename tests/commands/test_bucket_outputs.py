"""Outputs of generate and eval in a bucket: the bytes of local ones, and what a stopped command left is continued."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small import HF_CONFIG, random_params
from small_tokenizer import make_tokenizer

from dpo_jax import cli
from dpo_jax.errors import StorageUnreachable, UserError
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.runs import answer_file, output_file
from dpo_jax.runs.answer_file import AnswerFile
from dpo_jax.weights.huggingface import export_params

SIZES = HF_CONFIG | {"vocab_size": 264}
PAIRS = [{"prompt": f"{'so ' * (5 + i % 4)}{i}", "chosen": f"yes {i}", "rejected": "no, no"} for i in range(10)]
URL = "gs://bucket/out/answers.jsonl"
MANIFEST = {"config": {}, "identity": {}, "place": {}}
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, pairs, and a config for each of the commands."""
    folder = tmp_path_factory.mktemp("made")
    model = Model(config=decoder_config(SIZES), attention="xla")
    params = jax.tree.map(jnp.asarray, random_params(model, 14))
    target = {"out_dir": folder / "policy", "source_dir": None, "overwrite": False}
    export_params(params, model, hf_config=SIZES, dtype="float32", **target)
    make_tokenizer().save_pretrained(folder / "policy")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    common = {"model": {"path": str(folder / "policy")}}
    generate = common | {
        "prompts": str(folder / "pairs.jsonl"),
        "sampling": {"max_tokens": 12},
        "batch": {"size": 4},
        "run": {"progress": False},
    }
    evaluation = common | {
        "data": {"train": str(folder / "pairs.jsonl"), "eval": {"dev": str(folder / "pairs.jsonl")}, "workers": 1},
        "batch": {"pairs": 8},
        "run": {"dir": str(folder / "none"), "steps": 1, "progress": False},
    }
    (folder / "generate.yaml").write_text(json.dumps(generate))
    (folder / "eval.yaml").write_text(json.dumps(evaluation))
    return folder


def run(made: Path, command: str, output: str) -> None:
    assert cli.main([command, str(made / f"{command}.yaml"), "--output", output]) == 0


def writes(storage, name: str) -> int:
    return sum(request.kind == "write" and request.name == name for request in storage.requests)


def test_answers_are_those_of_a_local_file_and_a_stopped_command_continues(storage, made, tmp_path, monkeypatch):
    run(made, "generate", str(tmp_path / "answers.jsonl"))
    files = {name: (tmp_path / name).read_bytes() for name in ("answers.jsonl", "answers.manifest.json")}
    storage.put("bucket", "out/other.jsonl", b"mine")
    run(made, "generate", URL)
    assert {name: storage.data("bucket", f"out/{name}") for name in files} == files
    assert storage.names("bucket") == ["out/answers.jsonl", "out/answers.manifest.json", "out/other.jsonl"]
    lines = files["answers.jsonl"].splitlines(keepends=True)
    storage.put("bucket", "out/answers.jsonl", b"".join(lines[:5]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another disk"))
    monkeypatch.setattr(answer_file, "PUSH_INTERVAL", 0.0)
    storage.requests.clear()
    run(made, "generate", URL)
    assert storage.data("bucket", "out/answers.jsonl") == files["answers.jsonl"]
    assert writes(storage, "out/answers.jsonl") == 2  # one for each block of 4 prompts, from the fifth prompt on
    assert writes(storage, "out/answers.manifest.json") == 0


def test_pairs_of_an_evaluation_are_those_of_a_local_file(storage, made, tmp_path, capfd):
    run(made, "eval", str(tmp_path / "pairs.jsonl"))
    run(made, "eval", "gs://bucket/pairs.jsonl")
    assert storage.data("bucket", "pairs.jsonl") == (tmp_path / "pairs.jsonl").read_bytes()
    assert cli.main(["eval", str(made / "eval.yaml"), "--output", "gs://bucket/pairs.jsonl"]) == 2
    assert "--output: gs://bucket/pairs.jsonl already exists; choose another name" in capfd.readouterr().err


def test_an_output_that_cannot_be_uploaded_is_kept(storage, monkeypatch):
    monkeypatch.setattr(output_file, "LAST_SECONDS", 30.0)
    storage.fail(503, kind="write")
    with pytest.raises(StorageUnreachable, match=r"storage does not answer .*; the file is kept at (.*)") as failed:
        output_file.write_output("gs://bucket/pairs.jsonl", "pairs")
    assert Path(str(failed.value).rpartition(" ")[2]).read_text() == "pairs"


def opened(act=lambda file: None) -> int:
    """Open the file of answers, do something, and return how many rows it had."""
    file = AnswerFile.named(URL)
    with file.locked():
        num_rows = file.resume(MANIFEST, 9)[0]
        act(file)
    return num_rows


def test_rows_are_uploaded_before_the_end_and_whatever_ends_it(storage, monkeypatch):
    def stop(file: AnswerFile) -> None:
        file.append([{"row": 0}])
        assert "out/answers.jsonl" not in storage.names("bucket")
        monkeypatch.setattr(answer_file, "PUSH_INTERVAL", 0.0)
        storage.requests.clear()
        file.append([{"row": 1}])
        assert storage.data("bucket", "out/answers.jsonl") == b'{"row": 0}\n{"row": 1}\n'
        names = [request.name for request in storage.requests if request.kind == "write"]
        assert names == ["out/answers.lock", "out/answers.manifest.json", "out/answers.jsonl"]
        monkeypatch.setattr(answer_file, "PUSH_INTERVAL", 120.0)
        file.append([{"row": 2}])
        file.beside(".best.jsonl").write_text("best")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opened(stop)
    assert storage.names("bucket") == [f"out/answers.{end}" for end in ("best.jsonl", "jsonl", "manifest.json")]
    assert opened() == 3


def test_the_disk_is_not_trusted(storage, cache):
    opened(lambda file: file.append([{"row": 0}]))
    (local,) = cache.rglob("answers.jsonl")
    local.write_text('{"row": 0}\n{"row": 1}\n')
    assert opened() == 1


def test_storage_that_does_not_answer_delays_an_upload(storage, monkeypatch, capfd):
    monkeypatch.setattr(answer_file, "PUSH_INTERVAL", 0.0)

    def append(file: AnswerFile) -> None:
        storage.fail(503, kind="write", name="answers.jsonl", times=100)
        file.append([{"row": 0}])
        storage.faults.clear()
        file.append([{"row": 1}])

    opened(append)
    assert "--output: upload failed, will be retried: " in capfd.readouterr().err
    assert opened() == 2


@pytest.mark.usefixtures("storage")
def test_two_commands_do_not_write_one_file():
    def second(file: AnswerFile) -> None:
        with pytest.raises(UserError, match=f"--output: {URL} is being written by process"):
            opened()

    opened(second)


def test_a_file_of_another_command_is_refused_by_its_url(storage):
    storage.put("bucket", "out/answers.jsonl", b"")
    with pytest.raises(UserError, match=f"--output: {URL} exists, but answers.manifest.json does not"):
        opened()
    assert storage.names("bucket") == ["out/answers.jsonl"]


@pytest.mark.parametrize(
    "command",
    [
        ["quickstart", "--dir", "gs://bucket/run"],
        ["compare", "--dir", "gs://bucket/run"],
        ["plan", "configs/tiny_cpu.yaml", "--topology", "v5e:4x4", "--output", "gs://bucket/plan.json"],
        ["train", "gs://bucket/config.yaml"],
        ["export", "s3://bucket/run", "out"],
        ["export", "gs://bucket/none", "out"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("storage")
def test_paths_that_cannot_be_in_a_bucket_are_refused_in_one_line(command, capfd, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert cli.main(command) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "://bucket/" in said
    assert not Path("gs:").exists()
