"""Weights from and to Hugging Face directories: exact, streamed, and refused with one clear line."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import transformers
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from dpo_jax.errors import UserError
from dpo_jax.models.decoder import Model, Params, plain_batch
from dpo_jax.models.families import decoder_config
from dpo_jax.runs.checksums import weights_id
from dpo_jax.weights.hub import check_vocabulary, read_hf_config, resolve_model
from dpo_jax.weights.huggingface import export_params, load_params
from dpo_jax.weights.known import builtin_model
from dpo_jax.weights.output import atomic_directory
from dpo_jax.weights.safetensors import INDEX, WEIGHTS, find_tensors

TINY = builtin_model("builtin:tiny")
QWEN3 = TINY | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24, "attention_bias": True,
                "tie_word_embeddings": False}  # fmt: skip


def make(hf: dict) -> tuple[Model, Params]:
    """A model, and parameters that are all different from those that it starts with."""
    model = Model(config=decoder_config(hf), attention="xla")
    shapes = model.param_shapes()
    generator = np.random.default_rng(0)
    return model, jax.tree.map(lambda s: jnp.asarray(generator.normal(0, 0.3, s.shape).astype(np.float32)), shapes)


def export(folder: Path, hf: dict, **options) -> tuple[Model, Params]:
    model, params = make(hf)
    defaults = {"dtype": "float32", "source_dir": None, "max_shard_bytes": 2**30, "overwrite": False}
    export_params(params, model, hf_config=hf, out_dir=folder, **(defaults | options))
    return model, params


def load(folder: Path) -> Params:
    model = Model(config=decoder_config(read_hf_config(folder)))
    return load_params(folder, model, shardings=None, dtype="float32")


def equal(tree: Params, other: Params) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), tree, other)
    return all(jax.tree.leaves(same))


def spread(model: Model) -> Params:
    """Shardings of every kind: heads, features and vocabulary over one axis, the model dim over the other."""
    mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))
    axis = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
    spec = lambda names: NamedSharding(mesh, PartitionSpec(*(axis.get(name) for name in names)))  # noqa: E731
    return jax.tree.map(spec, model.param_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))


@pytest.mark.parametrize("hf", [TINY, QWEN3], ids=["tied", "untied"])
def test_export_loads_bit_equal_on_one_device_and_on_eight(tmp_path, hf):
    model, params = export(tmp_path / "out", hf)
    loaded = load(tmp_path / "out")
    assert equal(loaded, params)
    on_eight = load_params(tmp_path / "out", model, shardings=spread(model), dtype="float32")
    assert equal(on_eight, params)
    assert on_eight["layers"]["gate"].sharding == spread(model)["layers"]["gate"]
    assert on_eight["layers"]["gate"].addressable_shards[0].data.size * 8 == params["layers"]["gate"].size
    assert weights_id(on_eight) == weights_id(loaded) == weights_id(params)

    again = {"hf_config": hf, "dtype": "float32", "source_dir": None, "max_shard_bytes": 2**30, "overwrite": False}
    export_params(on_eight, model, out_dir=tmp_path / "again", **again)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_transformers_loads_an_export_in_several_files(torch, tmp_path):
    model, params = export(tmp_path, QWEN3, max_shard_bytes=100_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * x.size for x in jax.tree.leaves(params))
    for name in files:  # the library's own reader agrees with the index
        with safetensors.safe_open(tmp_path / name, "np") as file:
            assert sorted(file.keys()) == sorted(key for key, where in index["weight_map"].items() if where == name)

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())  # no tensor missing, unexpected or of another shape
    tokens = np.random.default_rng(1).integers(0, 512, (2, 30), dtype=np.int32)
    batch = plain_batch(jnp.asarray(tokens), jnp.full(2, 30))
    got = jax.jit(model.hidden)(params, batch) @ model.unembedding(params).T
    with torch.no_grad():
        want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_bfloat16_export_is_the_rounded_weights_and_says_so(torch, tmp_path):
    model, params = export(tmp_path, TINY, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert equal(load(tmp_path), rounded)
    kept = load_params(tmp_path, model, shardings=None, dtype="bfloat16")
    assert equal(kept, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_export_of_a_trained_model_is_the_model_with_its_tokenizer(shared, tmp_path):
    source = shared / "models" / "stories260K"
    hf = read_hf_config(source)
    model = Model(config=decoder_config(hf))
    params = load_params(source, model, shardings=None, dtype="float32")
    export_params(params, model, hf_config=hf, out_dir=tmp_path / "out", dtype="float32", source_dir=source,
                  max_shard_bytes=2**30, overwrite=False)  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == hf
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(source / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    text = "Once upon a time"
    ids = [transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (source, tmp_path / "out")]
    assert ids[0] == ids[1]


def test_companions_are_copied_and_other_files_are_not(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    names = ["chat_template.jinja", "generation_config.json", "additional_chat_templates/tools.jinja"]
    for name in [*names, "optimizer.pt", "model-00001-of-00002.safetensors"]:
        (source / name).write_text(name)
    export(tmp_path / "out", TINY, source_dir=source)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*names, "config.json", WEIGHTS}
    assert all((tmp_path / "out" / name).read_text() == name for name in names)


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        export(out, TINY)
    model, _ = make(TINY)
    with pytest.raises(TypeError, match="slice_sizes"):  # another model's parameters: fails while files are written
        export_params(make(TINY | {"hidden_size": 32})[1], model, hf_config=TINY, out_dir=out, dtype="float32",
                      source_dir=None, max_shard_bytes=2**30, overwrite=True)  # fmt: skip
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    export(out, TINY, overwrite=True, max_shard_bytes=100_000)
    assert (out / INDEX).is_file()
    (tmp_path / ".out.partial").mkdir()  # of one that was killed
    export(out, TINY, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "mine.txt", WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_goes_where_it_is_sent_or_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "real").mkdir()
    (tmp_path / "here").mkdir()
    for link, to in (("link", "real"), ("dangling", "later"), ("loop", "loop"), ("to_file", "file")):
        (tmp_path / link).symlink_to(tmp_path / to)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path / "here")
    refused = {
        ".": "this is the current directory",
        "..": "it is not empty",
        "../file": "this is a file",
        "../to_file": "this is a file",
        "../file/out": "cannot be written (",
        "../loop": "cannot be written (",
        "../" + "x" * 300: "cannot be written (",
        "gs:/bucket/out": "not a local path",
    }
    for out, line in refused.items():
        with pytest.raises(UserError) as error:
            export(Path(out), TINY)
        assert line in str(error.value), out
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    params = export(Path("../link"), TINY)[1]
    export(Path("../dangling"), TINY)
    export(Path("../new/and/deeper"), TINY)
    for out in ("real", "link", "later", "dangling", "new/and/deeper"):
        assert equal(load(tmp_path / out), params), out
    assert (tmp_path / "link").is_symlink()


def test_an_export_that_does_not_fit_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a disk that is full: write() fails midway
    try:
        with pytest.raises(UserError, match=f"^{tmp_path / 'out'}: the export cannot be written .*; free space"):
            export(tmp_path / "out", TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_of_two_exports_at_once_the_first_is_whole(tmp_path):
    out = tmp_path / "out"
    with atomic_directory(out, overwrite=False) as unfinished:
        (unfinished / "first").write_text("")
        with pytest.raises(UserError, match="another export to"), atomic_directory(out, overwrite=False):
            pass
    assert [path.name for path in out.iterdir()] == ["first"]
    with (
        pytest.raises(UserError, match="cannot be written"),
        atomic_directory(tmp_path / "late", overwrite=False) as it,
    ):
        shutil.copytree(it, tmp_path / "late" / "other")  # something has come there meanwhile
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "out"]


def test_hash_is_of_paths_shapes_types_and_bytes():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.float32(1)}}
    same = {"b": {"c": np.float32(1)}, "a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert weights_id(tree) == weights_id(same)
    others = [
        tree | {"a": tree["a"].at[1, 2].set(5.0000005)},
        tree | {"a": tree["a"].reshape(3, 2)},
        tree | {"a": tree["a"].view(jnp.int32)},
        {"a": tree["a"], "c": {"b": tree["b"]["c"]}},
    ]
    assert len({weights_id(x) for x in (tree, *others)}) == 5


def test_a_stored_unembedding_of_a_tied_model_repeats_or_is_the_embedding(tmp_path):
    params = export(tmp_path, TINY)[1]
    tensors = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in tensors
    embed = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed}, tmp_path / WEIGHTS)
    assert equal(load(tmp_path), params)
    save_file(tensors | {"lm_head.weight": embed + 1e-6}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load(tmp_path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed}, tmp_path / WEIGHTS)
    assert equal(load(tmp_path), params)


def edit_tensors(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def edit_bytes(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def shards(file: object = "a.safetensors", twice: bool = False, **more: object):
    """Makes the single file ``a.safetensors`` with an index."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        tensors = load_file(folder / "a.safetensors")
        names = {**dict.fromkeys(tensors, file), **more}
        if twice:
            save_file({NORM: tensors[NORM] * 2}, folder / "b.safetensors")
            names |= {GATE: "b.safetensors"}
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return damage


def index(text: str):
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)

    return damage


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
DAMAGED = {
    "missing tensor": (edit_tensors(lambda t: t.pop(GATE)), f"{GATE}, which the weights do not contain"),
    "unknown tensor": (edit_tensors(lambda t: t.update({"model.layers.0.mlp.router": t[NORM]})), "mlp.router"),
    "wrong shape": (edit_tensors(lambda t: t.update({GATE: t[GATE][:-1]})), r"\[191, 64\], but .* \[192, 64\]"),
    "quantized": (edit_tensors(lambda t: t.update({GATE: t[GATE].astype(np.int8)})), "type I8"),
    "cut short": (edit_bytes(lambda data: data[:-100]), "not an intact safetensors file.*not fully covered"),
    "cut in its header": (edit_bytes(lambda data: data[:100]), "not an intact safetensors file"),
    "garbage": (edit_bytes(lambda data: data[:8] + b"\xff" * (len(data) - 8)), "not an intact safetensors file"),
    "header of another kind": (edit_bytes(lambda data: data.replace(b'"shape"', b'"shapo"')), "missing field `shape`"),
    "header that lies": (edit_bytes(lambda data: data.replace(b"[192, 64]", b"[192, 63]")), "intact .* invalid shape"),
    "empty": (edit_bytes(lambda data: b""), "not an intact safetensors file"),
    "pickles only": (only_pickles, "save_pretrained"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor"),
    "missing file": (shards("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors'?, which"),
    "index of other files": (shards(**{"model.more.weight": "a.safetensors"}), "model.more.weight in a.safetensors"),
    "index that leaves": (shards("../a.safetensors"), "weight_map.*: '../a.safetensors' cannot be used"),
    "index that leaves for good": (shards("/a.safetensors"), "'/a.safetensors' cannot be used"),
    "index of a number": (shards(3), "weight_map.*: 3 cannot be used"),
    "index of an impossible name": (shards("a" * 3000), "is missing"),
    "tensor in two files": (shards(twice=True), "a.safetensors and b.safetensors both contain model.norm.weight"),
    "unreadable index": (index("{"), "index.json: not valid JSON"),
    "index of a list": (index("[]"), "must be a JSON object, got list"),
    "index of nothing": (index("{}"), "weight_map: None cannot be used"),
    "deep index": (index("[" * 100_000), "index.json: not valid JSON: RecursionError"),
    "unreadable config": (lambda folder: (folder / "config.json").write_text("{,}"), "not valid JSON"),
    "config of another kind": (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "other config": (
        lambda folder: (folder / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 1})),
        "model.layers.1.input_layernorm.weight",
    ),
}  # fmt: skip


# Headers of a file with 16 bytes of tensors.
WHOLE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
FIRST, LAST = {**WHOLE, "shape": [2], "data_offsets": [0, 8]}, {**WHOLE, "shape": [2], "data_offsets": [8, 16]}
TEXT = json.dumps(WHOLE)
HEADERS = {
    "whole": {"a": WHOLE},
    "unsorted": {"b": LAST, "a": FIRST},
    "overlapping": {"a": WHOLE, "b": LAST},
    "with a hole": {"a": {**WHOLE, "shape": [1], "data_offsets": [0, 4]}, "b": LAST},
    "not covering": {"a": FIRST},
    "beyond the file": {"a": {**WHOLE, "shape": [5], "data_offsets": [0, 20]}},
    "negative offset": {"a": {**WHOLE, "shape": [5], "data_offsets": [-4, 16]}},
    "reversed": {"a": {**WHOLE, "data_offsets": [16, 0]}},
    "fractions": {"a": {**WHOLE, "data_offsets": [0.0, 16.0]}},
    "texts": {"a": {**WHOLE, "data_offsets": ["0", "16"]}},
    "three offsets": {"a": {**WHOLE, "data_offsets": [0, 16, 16]}},
    "negative shape": {"a": {**WHOLE, "shape": [-2, -2]}},
    "shape of truths": {"a": {**WHOLE, "shape": [True, 4]}},
    "shape that wraps": {"a": {**WHOLE, "shape": [2**63, 2, 4]}},
    "unknown type": {"a": {**WHOLE, "dtype": "X32"}},
    "type of a list": {"a": {**WHOLE, "dtype": ["F32"]}},
    "half a byte": {"a": {**WHOLE, "dtype": "F4", "shape": [31]}},
    "more keys": {"a": {**WHOLE, "more": 1}},
    "no tensor": {"a": WHOLE, "b": None},
    "metadata": {"__metadata__": {"format": "pt"}, "a": WHOLE},
    "metadata of numbers": {"__metadata__": {"format": 1}, "a": WHOLE},
    "a scalar and an empty one": {
        "a": {**WHOLE, "shape": [], "data_offsets": [0, 4]}, "b": {**WHOLE, "shape": [0, 9], "data_offsets": [4, 4]},
        "c": {**WHOLE, "shape": [3], "data_offsets": [4, 16]},
    },
    "duplicate": f'{{"a": {TEXT}, "a": {TEXT}}}',
    "duplicate key": f'{{"a": {TEXT[:-1]}, "dtype": "F32"}}}}',
    "duplicate metadata": f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {TEXT}}}',
    "padded": f'  {{"a": {TEXT}}}   ',
    "padded with zeros": f'{{"a": {TEXT}}}\0\0',
    "not a number": f'{{"a": {TEXT[:-1]}, "x": NaN}}}}',
    "lone surrogate": f'{{"\\ud800": {TEXT}}}',
    "byte order mark": f'\ufeff{{"a": {TEXT}}}',
    "deep": '{"a": ' + "[" * 100_000,
    "a list": "[]",
    "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_read_or_refused_as_by_its_library(tmp_path, case):
    header = HEADERS[case]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    data = np.arange(4, dtype=np.float32).tobytes()
    file = tmp_path / WEIGHTS
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    try:
        expected = {name: (x["dtype"], tuple(x["shape"]), bytes(x["data"]))
                    for name, x in safetensors.deserialize(file.read_bytes())}  # fmt: skip
    except safetensors.SafetensorError:
        with pytest.raises(UserError, match="not an intact safetensors file") as refused:
            find_tensors(tmp_path)
        assert str(file) in str(refused.value)
        assert "\n" not in str(refused.value)
        return
    whole = file.read_bytes()
    actual = {x.name: (x.code, x.shape, whole[x.start : x.end]) for x in find_tensors(tmp_path).values()}
    assert actual == expected


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**63])
def test_a_header_of_another_length_is_refused(tmp_path, length):
    (tmp_path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="not an intact safetensors file"):
        find_tensors(tmp_path)


def test_the_single_file_wins_over_an_index_as_in_transformers(tmp_path, torch):
    """Its own saves leave the old index where a sharded save is followed by one in a single file."""
    params = export(tmp_path, TINY)[1]
    old = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": old}))
    assert equal(load(tmp_path), params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.model.norm.weight.detach().numpy(), params["final_norm"])


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_directory_is_refused_in_one_line(tmp_path, case):
    damage, message = DAMAGED[case]
    export(tmp_path, TINY)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_path_that_is_none_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_text("")
    cases = {
        str(tmp_path / "empty"): "neither config.json nor checkpoints/",
        str(tmp_path / "none"): "does not exist",
        str(tmp_path / "model.gguf"): "is a file",
        "nobody/no-such-model": "is not a directory, and its download failed",
        "not a name": "is not a directory, and its download failed",
        "builtin:huge": "built-in models are builtin:tiny",
        "builtin:tiny": "has no directory",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            resolve_model(path, None)
        assert path in str(error.value)
        assert "\n" not in str(error.value)
    export(tmp_path / "tiny", TINY)
    assert resolve_model(str(tmp_path / "tiny"), None) == tmp_path / "tiny"
    with pytest.raises(UserError, match=r"model\.revision"):
        resolve_model(str(tmp_path / "tiny"), "main")


def test_a_hub_model_that_was_downloaded_before_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--someone--tiny"
    export(folder / "snapshots" / commit, TINY)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert resolve_model("someone/tiny", None) == folder / "snapshots" / commit


def test_weights_are_downloaded_only_where_they_are_asked_for(tmp_path, monkeypatch):
    export(tmp_path, TINY)
    files = ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "original/model.safetensors"]
    taken = []

    def download(name, *, allow_patterns, ignore_patterns, **_):
        taken.append(list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve_model("someone/tiny", None)
    resolve_model("someone/tiny", None, weights=False)
    assert taken == [files[:3], files[:2]]


def test_a_tokenizer_larger_than_the_model_is_refused():
    config = decoder_config(TINY)
    check_vocabulary(512, config, "some/tokenizer")
    with pytest.raises(UserError, match="some/tokenizer: the tokenizer has 513 tokens and the model 512"):
        check_vocabulary(513, config, "some/tokenizer")


def test_every_type_of_a_file_is_read(tmp_path):
    export(tmp_path, TINY)
    tensors = load_file(tmp_path / WEIGHTS)
    types = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
    mixed = {name: tensor.astype(types[i % 4]) for i, (name, tensor) in enumerate(tensors.items())}
    save_file(mixed, tmp_path / WEIGHTS)
    assert {tensor.code for tensor in find_tensors(tmp_path).values()} == {"F64", "F32", "F16", "BF16"}
    params = load(tmp_path)
    np.testing.assert_array_equal(params["embed"], mixed["model.embed_tokens.weight"].astype(np.float32))
    gates = [mixed[f"model.layers.{layer}.mlp.gate_proj.weight"].astype(np.float32) for layer in range(2)]
    np.testing.assert_array_equal(params["layers"]["gate"], np.stack(gates).swapaxes(1, 2))


LOAD_AND_MEASURE = """
    import re, sys
    from pathlib import Path
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from dpo_jax.models.decoder import Model
    from dpo_jax.models.families import decoder_config
    from dpo_jax.weights.hub import read_hf_config
    from dpo_jax.weights.huggingface import load_params

    folder = Path(sys.argv[1])
    model = Model(config=decoder_config(read_hf_config(folder)))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shard = lambda axes: NamedSharding(mesh, PartitionSpec(*("fsdp" if a == "embed" else None for a in axes)))
    shardings = jax.tree.map(shard, model.param_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    params = load_params(folder, model, shardings=shardings, dtype="float32")
    # not getrusage: what a process is forked from counts in its ru_maxrss
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    print(sum(x.nbytes for x in jax.tree.leaves(params)), peak * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc, which only Linux has")
def test_loading_a_gigabyte_onto_eight_devices_holds_it_once(tmp_path):
    hf = TINY | {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 16,
                 "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
    model = Model(config=decoder_config(hf))
    export_params(jax.jit(model.init)(jax.random.key(0)), model, hf_config=hf, out_dir=tmp_path, dtype="float32",
                  source_dir=None, max_shard_bytes=140 * 2**20, overwrite=False)  # fmt: skip
    assert len(list(tmp_path.glob("*.safetensors"))) == 8
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(LOAD_AND_MEASURE), str(tmp_path)],
                            env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    size, peak = map(int, result.stdout.split())
    largest = max(4 * math.prod(tensor.shape) for tensor in find_tensors(tmp_path).values())
    assert size > 1e9
    assert peak <= size + largest + 300e6, f"peak {peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of parameters"
