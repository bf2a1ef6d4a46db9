"""Exports to a bucket: byte for byte those to a disk, and what makes them readable is written last."""

from pathlib import Path

import jax
import pytest
from small_tokenizer import make_tokenizer

from dpo_jax.bucket import Bucket
from dpo_jax.config import LoraConfig, ModelConfig
from dpo_jax.errors import StorageUnreachable, UserError
from dpo_jax.models.adapters import start_adapters
from dpo_jax.runs.bucket_lock import locked
from dpo_jax.weights import output
from dpo_jax.weights.huggingface import export_params
from dpo_jax.weights.known import builtin_model
from dpo_jax.weights.open import build_model, find_model
from dpo_jax.weights.output import export_target, exported_sizes
from dpo_jax.weights.peft import export_adapters
from dpo_jax.weights.safetensors import INDEX

URL, FOLDER = "gs://bucket/out/tiny", "out/tiny"
LORA = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def model():
    return build_model(find_model("builtin:tiny", None), ModelConfig(path="builtin:tiny"), "cpu", LORA)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Files that go with a model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return folder


def export(params, model, out_dir: str | Path, source_dir: Path | None = None, max_shard_bytes: int = 50_000) -> None:
    options = {"hf_config": builtin_model("builtin:tiny"), "dtype": "float32", "overwrite": False}
    export_params(params, model, out_dir=out_dir, source_dir=source_dir, max_shard_bytes=max_shard_bytes, **options)


def files_of(storage, folder: str = FOLDER) -> dict[str, bytes]:
    return {name.removeprefix(f"{folder}/"): storage.data("bucket", name) for name in storage.names("bucket", folder)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(storage) -> list[str]:
    """The names of the files that were written, in order."""
    names = [request.name.removeprefix(f"{FOLDER}/") for request in storage.requests if request.kind == "write"]
    return [name for name in dict.fromkeys(names) if not name.startswith((".probe-", "export."))]


@pytest.mark.parametrize("size", [50_000, 2**30], ids=["several files", "one file"])
def test_an_export_to_a_bucket_is_that_to_a_disk_index_last(storage, model, params, tokenizer, tmp_path, cache, size):
    export(params, model, tmp_path / "local", tokenizer, size)
    storage.requests.clear()
    export(params, model, URL, tokenizer, size)
    assert files_of(storage) == contents(tmp_path / "local")
    assert sorted(exported_sizes(URL)) == sorted(map(len, files_of(storage).values()))
    names = written(storage)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert names[: len(shards)] == sorted(shards)
    last = ["config.json", INDEX] if len(shards) > 1 else ["config.json"]
    assert names[-len(last) :] == last
    assert contents(cache) == {}


def test_a_disk_holds_one_file_of_weights_at_a_time(storage, model, params, cache, monkeypatch):
    counts = []
    upload = Bucket.upload

    def count(bucket, path, name):
        counts.append(len(list(cache.rglob("*.safetensors"))))
        upload(bucket, path, name)

    monkeypatch.setattr(Bucket, "upload", count)
    export(params, model, URL)
    assert set(counts[:-2]) == {1}
    assert len(counts) > 4


def test_adapters_are_exported_to_a_bucket(storage, model, tmp_path):
    adapters = start_adapters(model, jax.random.key(2), "gaussian")
    for target in (tmp_path / "local", URL):
        export_adapters(adapters, model, LORA, "base", target)
    assert files_of(storage) == contents(tmp_path / "local")
    assert written(storage) == ["adapter_model.safetensors", "adapter_config.json"]


def test_an_export_that_storage_broke_off_is_written_again(storage, model, params, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(output, "LAST_SECONDS", 30.0)
    storage.fail(503, kind="write", name="model-00003-of")
    with pytest.raises(StorageUnreachable, match=r"cannot write model-00003-of-.*: try again later"):
        export(params, model, URL)
    assert INDEX not in files_of(storage)
    assert "config.json" not in files_of(storage)
    assert contents(cache) == {}
    storage.faults.clear()
    assert export_target(URL) == URL
    export(params, model, URL, None, 2**30)
    export(params, model, tmp_path / "local", None, 2**30)
    assert files_of(storage) == contents(tmp_path / "local")


def test_what_lies_there_is_not_overwritten(storage, model, params):
    storage.put("bucket", f"{FOLDER}/notes/mine.txt", b"mine")
    for refused in (lambda: export_target(URL), lambda: export(params, model, URL)):
        with pytest.raises(UserError, match=f"{URL}: it is not empty; name another folder to export to"):
            refused()
    assert files_of(storage) == {"notes/mine.txt": b"mine"}


def test_two_exports_at_once(storage, model, params):
    running = f"{URL}: another export to it is running, process .*; wait for it"
    held = locked(Bucket.named("export", URL), output.LOCK, 0.0, pytest.fail)
    with held, pytest.raises(UserError, match=running):
        export(params, model, URL)
    export(params, model, URL)


@pytest.mark.parametrize(
    ("out_dir", "message"),
    [("s3://bucket/out", "export: s3://bucket/out is neither a local path nor in"), ("gs://bucket", "names no folder")],
)
def test_other_storage_is_refused_by_name(out_dir, message):
    with pytest.raises(UserError, match=message):
        export_target(out_dir)


def test_a_right_that_is_missing_is_named_before_anything_is_loaded(storage):
    storage.fail(403, kind="delete")
    with pytest.raises(UserError, match=r"^export: missing rights: storage\.objects\.delete: "):
        export_target(URL)
