"""Models and adapters in a bucket: equal to local ones, and their weight files are read in ranges."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from small_tokenizer import make_tokenizer

from dpo_jax.bucket import storage_error
from dpo_jax.config import DPOConfig, LoraConfig, MeshConfig, ModelConfig
from dpo_jax.config.file import parse_config
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.errors import StorageDenied, StorageUnreachable, UserError
from dpo_jax.methods.dpo import find_reference
from dpo_jax.models.adapters import start_adapters
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.weights.huggingface import export_params
from dpo_jax.weights.known import builtin_model
from dpo_jax.weights.open import find_model, load_start, open_model
from dpo_jax.weights.peft import export_adapters

TINY = builtin_model("builtin:tiny")
URL, FOLDER = "gs://bucket/models/tiny", "models/tiny"
LORA = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
pytestmark = pytest.mark.usefixtures("cache")


def put(storage, folder: Path, name: str = FOLDER) -> None:
    """Copy a folder to the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put("bucket", f"{name}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A model in several files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("local") / "tiny"
    model = open_model(ModelConfig(path="builtin:tiny"), "cpu").model
    params = jax.jit(model.init)(jax.random.key(1))
    options = {"dtype": "float32", "source_dir": None, "overwrite": False, "max_shard_bytes": 50_000}
    export_params(params, model, hf_config=TINY, out_dir=folder, **options)
    make_tokenizer().save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def stored(storage, local):
    """The storage with that model, and things that are no part of it."""
    put(storage, local)
    for name in ("", "pytorch_model.bin", "original/consolidated.safetensors"):
        storage.put("bucket", f"{FOLDER}/{name}", b"{}")
    storage.requests.clear()
    return storage


def equal(tree, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), tree, other)))


def read(storage) -> dict[str, list[str | None]]:
    """The ranges that were read of each object, by its name in the model's folder."""
    spans = {}
    for request in storage.requests:
        if request.kind == "read":
            spans.setdefault(request.name.removeprefix(f"{FOLDER}/"), []).append(request.span)
    return spans


def size_of(span: str) -> int:
    first, last = map(int, span.split("-"))
    return last + 1 - first


def test_weights_are_equal_to_local_ones_and_never_copied_to_the_disk(stored, local, cache):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    opened = open_model(ModelConfig(path=URL), "cpu")
    assert equal(opened.load(mesh), open_model(ModelConfig(path=str(local)), "cpu").load(mesh))
    spans = read(stored)
    files = {path.name for path in local.glob("*.safetensors")}
    assert len(files) > 2
    assert not {"pytorch_model.bin", "original/consolidated.safetensors"} & spans.keys()
    for name in files:
        assert None not in spans[name]
        size = (local / name).stat().st_size
        assert sum(map(size_of, spans[name])) == 8 + size  # each byte once, but for the length of the header
        assert max(map(size_of, spans[name])) < size
    for name in spans.keys() - files:
        assert spans[name] == [None]
    assert sum(path.stat().st_size for path in cache.rglob("*.safetensors")) < 200 * len(files)


def test_what_needs_no_weights_reads_none(stored, local):
    opened = open_model(ModelConfig(path=URL), "cpu")
    expected = open_model(ModelConfig(path=str(local)), "cpu")
    assert opened.model == expected.model
    assert tokenizer_hash(opened.tokenizer()) == tokenizer_hash(expected.tokenizer())
    assert opened.tokenizer("rag").chat_template == "{{ messages }}"
    assert not [name for name in read(stored) if name.endswith(".safetensors")]


def test_a_second_start_copies_nothing_until_something_changes(stored, local):
    first = open_model(ModelConfig(path=URL), "cpu").source.folder
    assert first.name == "tiny"
    stored.requests.clear()
    assert open_model(ModelConfig(path=f"{URL}/"), "cpu").source.folder == first
    assert read(stored) == {}
    stored.put("bucket", f"{FOLDER}/config.json", (local / "config.json").read_bytes())
    assert open_model(ModelConfig(path=URL), "cpu").source.folder != first


def test_what_changes_while_it_is_read_is_refused(stored, local):
    opened = open_model(ModelConfig(path=URL), "cpu")
    name = min(path.name for path in local.glob("*.safetensors"))
    stored.put("bucket", f"{FOLDER}/{name}", (local / name).read_bytes())
    with pytest.raises(UserError, match=f"{URL}/{name}: changed while it was being read; run again once"):
        opened.load(make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("length", [4, 100])
def test_a_weight_file_that_is_cut_is_refused(stored, local, length):
    name = min(path.name for path in local.glob("*.safetensors"))
    stored.put("bucket", f"{FOLDER}/{name}", (local / name).read_bytes()[:length])
    with pytest.raises(UserError, match=f"{name}: this is not an intact safetensors file"):
        open_model(ModelConfig(path=URL), "cpu").load(make_mesh(MeshConfig(), jax.devices()[:1]))


def test_storage_that_does_not_answer_at_once_is_asked_again(stored, local):
    stored.fail(503, kind="read list get", times=4)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    opened = open_model(ModelConfig(path=URL), "cpu")
    stored.fail(0, kind="read", name="safetensors", times=4)
    assert equal(opened.load(mesh), open_model(ModelConfig(path=str(local)), "cpu").load(mesh))


def test_a_right_that_is_missing_is_named(stored):
    stored.fail(403, kind="read", name="config.json")
    with pytest.raises(UserError, match=f"^model.path: {URL}: cannot read config.json: access is denied"):
        open_model(ModelConfig(path=URL), "cpu")


def test_a_local_file_that_refers_to_a_bucket_is_no_weight_file(stored, local, tmp_path):
    folder = open_model(ModelConfig(path=URL), "cpu").source.folder
    assert folder is not None
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (copied / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="this is not an intact safetensors file"):
        open_model(ModelConfig(path=str(copied)), "cpu").load(make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.usefixtures("stored")
def test_adapters_and_tokenizers_are_taken_from_a_bucket(storage, tmp_path):
    opened = open_model(ModelConfig(path="builtin:tiny", tokenizer=URL), "cpu", LORA)
    adapters = start_adapters(opened.model, jax.random.key(2), "gaussian")
    export_adapters(adapters, opened.model, LORA, "base", tmp_path / "adapters")
    put(storage, tmp_path / "adapters", "adapters")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = LoraConfig(rank=2, targets=LORA.targets, path="gs://bucket/adapters")
    assert equal(load_start(config, opened.model, opened.load(mesh), 0, mesh), adapters)
    assert opened.tokenizer().eos_token_id == 1


def test_a_reference_that_is_not_answered_for_asks_for_another_start(stored):
    run = {"dir": "none", "steps": 1}
    config = parse_config({"model": {"path": URL}, "data": {"train": "none.jsonl"}, "run": run}, {}, DPOConfig)
    model = open_model(ModelConfig(path=URL), "cpu").model
    stored.fail(503, kind="list")
    with pytest.raises(StorageUnreachable, match=f"^{URL}: cannot list: storage does not") as failed:
        find_reference(config, URL, model, "cpu", partial(find_model, revision=None, section="reference"))
    assert failed.value.exit_code == 1


def test_requests_are_billed_to_the_project_that_a_variable_names(stored, monkeypatch):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for project in ("payer", None):
        if project is None:
            monkeypatch.delenv("DPO_JAX_GCS_USER_PROJECT")
        else:
            monkeypatch.setenv("DPO_JAX_GCS_USER_PROJECT", project)
        stored.requests.clear()
        open_model(ModelConfig(path=URL), "cpu").load(mesh)
        assert {request.params.get("userProject") for request in stored.requests} == {project}


def test_a_bucket_whose_requesters_pay_says_what_to_set():
    error = ValueError("400 GET https://...: Bucket is a requester pays bucket but no user project provided.")
    told = storage_error("gs://bucket/model: cannot list", error)
    assert isinstance(told, StorageDenied)
    assert str(told).endswith("set DPO_JAX_GCS_USER_PROJECT to the project to bill")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(path="s3://bucket/model"), "model.path: s3://bucket/model is neither a local path nor in a"),
        (ModelConfig(path="gs://bucket"), "model.path: gs://bucket names no folder in a bucket"),
        (ModelConfig(path="gs://bucket/none"), "model.path: gs://bucket/none has no files of a model"),
        (ModelConfig(path=URL, revision="main"), f"model.revision: 'main' cannot be used: {URL} is in a bucket"),
        (ModelConfig(path=URL, checkpoint="best"), f"model.checkpoint: 'best' cannot be used: {URL} is not a run"),
    ],
)
@pytest.mark.usefixtures("stored")
def test_what_is_no_model_is_named(config, message):
    with pytest.raises(UserError, match=message):
        open_model(config, "cpu")
