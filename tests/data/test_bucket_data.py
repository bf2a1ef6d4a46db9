"""Data in a bucket: copied once for each generation, and the same store as from local files."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from small_tokenizer import make_tokenizer

from dpo_jax.bucket_cache import fetch_data
from dpo_jax.config import DataConfig, SourceConfig
from dpo_jax.data import store
from dpo_jax.data.sources import fingerprint, load_rows
from dpo_jax.data.store import build_or_open_store
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.errors import StorageUnreachable, UserError

TOKENIZER = make_tokenizer()
PAIRS = [{"prompt": f"Q{i}?", "chosen": f"yes {i}", "rejected": f"no, no {i}"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
pytestmark = pytest.mark.usefixtures("cache")


def rows_of(path: str, **options) -> list[dict]:
    return [dict(row) for row in load_rows(SourceConfig(path=path, **options))]


def built(folder: Path, path: str) -> store.Store:
    source = SourceConfig(path=path)
    return build_or_open_store(folder, (source,), DataConfig(train=(source,), max_length=64), TOKENIZER, "dpo", 1)


def num_reads(storage) -> int:
    return sum(request.kind == "read" for request in storage.requests)


@pytest.mark.parametrize("name", ["pairs.jsonl", "sets/a/pairs.jsonl.gz"])
def test_a_file_in_a_bucket_gives_the_store_of_a_local_one(storage, tmp_path, name):
    content = gzip.compress(LINES) if name.endswith(".gz") else LINES
    storage.put("bucket", name, content)
    (tmp_path / Path(name).name).write_bytes(content)
    local = built(tmp_path / "local", str(tmp_path / Path(name).name))
    remote = built(tmp_path / "remote", f"gs://bucket/{name}")
    assert remote.key == local.key
    assert remote.report == [{**local.report[0], "source": f"gs://bucket/{name}"}]
    for file in ("tokens.bin", "lengths.bin", "rows.bin", "prompts.bin"):
        assert (remote.path / file).read_bytes() == (local.path / file).read_bytes()
    assert num_reads(storage) == 1


def test_a_changed_object_is_a_changed_file(storage, tmp_path):
    storage.put("bucket", "pairs.jsonl", LINES)
    before = built(tmp_path, "gs://bucket/pairs.jsonl")
    storage.put("bucket", "pairs.jsonl", LINES)  # the same content
    assert built(tmp_path, "gs://bucket/pairs.jsonl").key == before.key
    storage.put("bucket", "pairs.jsonl", LINES.replace(b"yes", b"yea"))
    assert built(tmp_path, "gs://bucket/pairs.jsonl").key != before.key
    assert num_reads(storage) == 3


def test_an_object_that_changes_while_it_is_tokenized_leaves_no_store(storage, tmp_path, monkeypatch):
    storage.put("bucket", "pairs.jsonl", LINES)
    write = store._write
    change = lambda *given: (write(*given), storage.put("bucket", "pairs.jsonl", LINES + LINES))  # noqa: E731
    monkeypatch.setattr(store, "_write", change)
    with pytest.raises(UserError, match=r"gs://bucket/pairs\.jsonl: the data changed while it was tokenized"):
        built(tmp_path / "store", "gs://bucket/pairs.jsonl")
    assert list((tmp_path / "store").iterdir()) == []


def test_folders_of_files_and_saved_sets(storage, tmp_path):
    for index, row in enumerate(PAIRS):
        storage.put("bucket", f"files/data/train-{index}.jsonl", json.dumps(row).encode())
    storage.put("bucket", "files/", b"")
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        storage.put("bucket", f"saved/{path.name}", path.read_bytes())
    assert rows_of("gs://bucket/files") == PAIRS
    assert rows_of("gs://bucket/saved/") == PAIRS
    local = SourceConfig(path=str(tmp_path / "saved"))
    assert fingerprint(SourceConfig(path="gs://bucket/saved")) == fingerprint(local)


def test_a_copy_is_whole_or_not_there(storage, cache):
    storage.put("bucket", "files/a.jsonl", LINES)
    storage.put("bucket", "files/b.jsonl", LINES)
    storage.fail(503, kind="read", name="b.jsonl")
    with pytest.raises(StorageUnreachable, match=r"gs://bucket/files: cannot read b\.jsonl: storage does not answer"):
        rows_of("gs://bucket/files")
    assert list((cache / "dpo_jax" / "data").iterdir()) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [cut, Path.unlink])
@pytest.mark.parametrize("name", ["b.jsonl", ".sizes"])
def test_a_copy_that_was_damaged_is_made_again(storage, cache, harm, name):
    storage.put("bucket", "files/a.jsonl", LINES)
    storage.put("bucket", "files/b.jsonl", LINES)
    first = fetch_data("data", "gs://bucket/files")
    (harmed,) = cache.rglob(name)
    harm(harmed)
    assert fetch_data("data", "gs://bucket/files") == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {"a.jsonl": LINES, "b.jsonl": LINES}
    assert num_reads(storage) == 4


def test_a_template_in_a_bucket(storage, tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    storage.put("bucket", "chat.jinja", b"{{ messages }}")
    tokenizer = load_tokenizer(str(tmp_path), None, "gs://bucket/chat.jinja")
    assert tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "s3://bucket/pairs.jsonl"}, "s3://bucket/pairs.jsonl is neither a local path nor in a bucket"),
        ({"path": "https://x.org/pairs.jsonl"}, "https://x.org/pairs.jsonl is neither a local path nor in a bucket"),
        ({"path": "gs://bucket/none.jsonl"}, "gs://bucket/none.jsonl does not exist; check the path"),
        ({"path": "gs://bucket/rows.array_record"}, "gs://bucket/rows.array_record: unknown suffix '.array_record'"),
        ({"path": "tfds:set", "data_dir": "gs://bucket/tfds"}, "TFDS sets are read from a local disk; copy the dir"),
        ({"path": "gs://bucket/up"}, "gs://bucket/up/../../x.jsonl: this is not a valid file name on this machine"),
        ({"path": "gs://bucket/up/../../x.jsonl", "split": "test"}, "split: 'test' does not apply to a file of JSON"),
    ],
)
def test_what_cannot_be_read_is_named(storage, options, message):
    storage.put("bucket", "rows.array_record", b"of any size")
    storage.put("bucket", "up/../../x.jsonl", LINES)
    with pytest.raises(UserError, match=message) as refused:
        load_rows(SourceConfig(**options))
    assert "\n" not in str(refused.value)
    assert not [r for r in storage.requests if r.kind == "read" and r.name.endswith("array_record")]
