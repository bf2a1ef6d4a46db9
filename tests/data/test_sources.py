"""The same rows from every kind of source; identities of content; what is said of sources that cannot be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.config import SourceConfig
from dpo_jax.data.sources import fingerprint, load_rows
from dpo_jax.errors import UserError

ROWS = [
    {"prompt": f"q{n} é", "chosen": [{"role": "assistant", "content": "a\n"}], "rejected": None, "weight": n / 4}
    for n in range(7)
]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_source(folder, kind: str) -> SourceConfig:
    """The rows as a source of this kind."""
    import datasets
    from pyarrow import Table, output_stream, parquet

    path, table = folder / kind, Table.from_pylist(ROWS)
    if kind in COMPRESSED:
        plain = Path(write_source(folder, Path(kind).stem).path)
        with output_stream(path, compression="detect") as file:
            file.write(plain.read_bytes())
        plain.unlink()
        return SourceConfig(path=str(path))
    if kind == "lines.jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS[:3]) + b"\n \r\n" + lines(ROWS[3:]).rstrip())
    elif kind == "lines.json":
        path.write_bytes(lines(ROWS))
    elif kind == "list.json":
        path.write_text("\n " + json.dumps(ROWS, indent=1))
    elif kind == "table.parquet":
        parquet.write_table(table, path, row_group_size=3)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "saved_splits":
        splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
        datasets.DatasetDict(splits).save_to_disk(path)
    else:
        path.mkdir()
        parquet.write_table(table, path / "train-0.parquet")
        parquet.write_table(table[:1], path / "test-0.parquet")
    return SourceConfig(path=str(path))


COMPRESSED = ["lines.jsonl.gz", "list.json.gz", "lines.jsonl.zst", "lines.jsonl.bz2"]
KINDS = [*COMPRESSED, "lines.jsonl", "lines.json", "list.json", "table.parquet", "saved", "saved_splits", "folder"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_give_the_same_rows(tmp_path, kind):
    source = write_source(tmp_path, kind)
    rows = load_rows(source)
    assert len(rows) == 7
    assert [rows[n] for n in (6, 0, 3)] == [ROWS[n] for n in (6, 0, 3)]
    assert list(rows) == rows[:] == ROWS
    assert rows[-2:] == ROWS[-2:]
    assert load_rows(source)[1]["prompt"] == "q1 é"
    assert fingerprint(source) == fingerprint(source)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_and_limit(tmp_path, kind):
    path = write_source(tmp_path, kind).path
    rows = load_rows(SourceConfig(path=path, columns={"chosen": "prompt", "answer": "chosen"}, limit=2))
    assert list(rows) == [
        {"chosen": row["prompt"], "answer": row["chosen"], "rejected": None, "weight": row["weight"]}
        for row in ROWS[:2]
    ]
    assert len(load_rows(SourceConfig(path=path, limit=100))) == 7
    with pytest.raises(UserError, match=r"columns: prompt: no column 'question'; available: \['prompt', 'ch"):
        load_rows(SourceConfig(path=path, columns={"prompt": "question"}))


def test_csv_is_text_in_every_cell(tmp_path):
    """Neither a word nor a number is taken for something else, and a cell may hold lines and be long."""
    cells = ["None", "NA", "1.50", 'say "a", b\nc', "é" * 200_000, ""]
    quoted = [cell.replace('"', '""') for cell in cells]
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffprompt,chosen\r\n" + "".join(f'q,"{cell}"\r\n' for cell in quoted), newline="")
    assert list(load_rows(SourceConfig(path=str(path)))) == [{"prompt": "q", "chosen": cell} for cell in cells]


def test_a_damaged_or_cut_compressed_file_is_never_a_shorter_one(tmp_path):
    source = write_source(tmp_path, "lines.jsonl.gz")
    Path(source.path).write_bytes(Path(source.path).read_bytes()[:-6])
    with pytest.raises(UserError, match="replace the file if it is damaged"):
        load_rows(source)


def test_what_a_library_raises_over_a_row_names_the_row(tmp_path):
    from pyarrow import array, int64, parquet, table, timestamp

    times = array([1, 2**55], int64()).cast(timestamp("ms"))  # no date that Python knows
    parquet.write_table(table({"prompt": ["a", "b"], "time": times}), tmp_path / "a.parquet")
    rows = load_rows(SourceConfig(path=str(tmp_path / "a.parquet")))
    with pytest.raises(UserError, match=r"a\.parquet, row 1: .*: fix or remove it"):
        list(rows)


def test_paths_that_no_file_can_have():
    for path in ("a/" * 3000, "a\0b", "\ud83d"):
        with pytest.raises(UserError, match="no such file or folder, and not the name of a hub dataset"):
            load_rows(SourceConfig(path=path))


def test_splits(tmp_path):
    for kind in ("saved_splits", "folder"):
        path = write_source(tmp_path, kind).path
        assert len(load_rows(SourceConfig(path=path, split="test"))) == 1
        assert fingerprint(SourceConfig(path=path, split="test")) != fingerprint(SourceConfig(path=path))
        with pytest.raises(UserError, match=r"no split 'val'; available: |Unknown split .val.. Should be one of"):
            load_rows(SourceConfig(path=path, split="val"))
    assert len(load_rows(SourceConfig(path=str(tmp_path / "folder"), split="train[:3]"))) == 3


def test_the_identity_is_that_of_the_content(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(lines(ROWS))
    (tmp_path / "c.jsonl").write_bytes(lines([*ROWS[:-1], ROWS[0]]))
    a, b, c = (SourceConfig(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert fingerprint(a) == fingerprint(b)
    cut = SourceConfig(path=a.path, limit=2)
    renamed = SourceConfig(path=a.path, columns={"answer": "chosen"})
    assert len({fingerprint(source) for source in (a, c, cut, renamed)}) == 4


def test_a_dataset_in_hand():
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    assert list(load_rows(rows)) == ROWS
    assert load_rows(rows.with_format("numpy"))[1] == ROWS[1]
    assert fingerprint(rows) == fingerprint(datasets.Dataset.from_list(ROWS))
    assert fingerprint(rows) != fingerprint(rows.select(range(3)))
    with pytest.raises(UserError, match="no rows"):
        load_rows(rows.select([]))
    with pytest.raises(UserError, match="DatasetDict cannot be used"):
        load_rows(datasets.DatasetDict({"train": rows}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file; the working directory is"),
        ("not/a/hub/name", None, "no such file or folder, and not the name of a hub dataset"),
        ("empty.jsonl", b"\n \n", "the source has no rows"),
        ("empty.json", b"", "the source has no rows"),
        ("empty_list.json", b"[]", "the source has no rows"),
        (
            "rows.tsv",
            b"a\tb\n",
            r"unknown suffix '.tsv'; use .json, .jsonl, .csv, .parquet, all but",
        ),
        ("rows.parquet.gz", b"x", "unknown suffix '.gz'"),
        ("rows.tar.gz", b"x", "unknown suffix '.tar'"),
        ("deep.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: .* more than 100 deep"),
        ("deep.json", b"[" * 100_000, "more than 100 deep"),
        ("digits.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "line 1: not JSON: Exceeds the limit"),
        ("broken.jsonl.gz", b"no gzip", "damaged, or free space in"),
        ("broken.jsonl.zst", b"no zstd", "damaged, or free space in"),
        ("names.csv", b"a,a\n1,2\n", r"two columns have the same name: \['a', 'a'\]"),
        ("cells.csv", b"a,b\n1,2\n\n3,4,5\n", "line 4: 3 cells, but the first line names 2 columns"),
        ("quotes.csv", b'a,b\n"1,2\n', "unexpected end of data"),
        ("latin.csv", b"a,b\n1,\xe9\n", "can't decode byte"),
        ("header.csv", b"a,b\n", "the source has no rows"),
        ("broken.jsonl", b'{"a": 1}\n\n{"a": \n{"a": 2}\n', "line 3: not JSON"),
        ("latin.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: not JSON"),
        ("numbers.jsonl", b'{"a": 1}\n2\n', "line 2: got int, expected a JSON object"),
        ("broken.json", b'[{"a": 1},', "not JSON"),
        ("numbers.json", b'[{"a": 1}, 2]', "item 1 of the list: got int, expected a JSON object"),
        ("broken.parquet", b"no table", "it must be a readable parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(load_rows(SourceConfig(path=str(path))))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [{"split": "test"}, {"name": "x"}, {"revision": "x"}, {"data_dir": "x"}])
def test_options_that_a_source_does_not_heed_are_refused(tmp_path, option):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(UserError, match=f"{next(iter(option))}: .* does not apply to a file of JSON lines"):
        load_rows(SourceConfig(path=str(tmp_path / "a.jsonl"), **option))
    with pytest.raises(UserError, match="revision: 'x' does not apply to a TFDS set"):
        load_rows(SourceConfig(path="tfds:pairs", revision="x"))


def test_a_saved_set_has_no_splits(tmp_path):
    with pytest.raises(UserError, match="split: 'test': this folder has no splits"):
        load_rows(SourceConfig(path=write_source(tmp_path, "saved").path, split="test"))


def run_python(code: str, **environment) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_plain_files_are_read_with_the_standard_library(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    out = run_python(
        "import sys; from dpo_jax.config import SourceConfig; from dpo_jax.data.sources import *;"
        f"source = SourceConfig(path={str(tmp_path / 'a.jsonl')!r}); print(len(list(load_rows(source))));"
        "fingerprint(source);"
        "print([m for m in ('jax', 'numpy', 'torch', 'datasets', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    assert out.split("\n")[:2] == ["7", "[]"]


def test_a_hub_set_that_cannot_be_reached():
    out = run_python(
        "from dpo_jax.config import SourceConfig; from dpo_jax.data.sources import *\n"
        "try: load_rows(SourceConfig(path='nobody/no-such-set'))\n"
        "except UserError as error: print(error)",
        HF_HUB_OFFLINE="1",
    )
    assert out.startswith("nobody/no-such-set: there is no such file or folder, and the hub dataset cannot be loaded: ")
    assert out.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A small set, prepared as ArrayRecord for real."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path_factory.mktemp("builder")

        def _info(self):
            turns = tfds.features.Sequence({"role": text, "content": text})
            weight = tfds.features.Scalar(dtype=np.float32)
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"prompt": text, "chosen": turns, "weight": weight})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(ROWS), "test": self._generate_examples(ROWS[:2])}

        def _generate_examples(self, rows):
            for row in rows:
                yield row["prompt"], {name: row[name] for name in ("prompt", "chosen", "weight")}

    folder = tmp_path_factory.mktemp("tfds")
    Pairs(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_dir):
    source = SourceConfig(path="tfds:pairs", data_dir=str(tfds_dir))
    rows = load_rows(source)
    expected = [{name: row[name] for name in ("prompt", "chosen", "weight")} for row in ROWS]
    assert sorted(rows, key=lambda row: row["weight"]) == expected
    assert type(rows[0]["weight"]) is float
    version = SourceConfig(path="tfds:pairs", data_dir=str(tfds_dir / "pairs" / "1.0.0"))
    assert list(load_rows(version)) == list(rows)
    assert fingerprint(version) == fingerprint(source)
    test = SourceConfig(path="tfds:pairs", data_dir=str(tfds_dir), split="test")
    assert len(load_rows(test)) == 2
    assert fingerprint(test) != fingerprint(source)
    assert len(load_rows(SourceConfig(path="tfds:pairs", data_dir=str(tfds_dir), split="train[:3]", limit=2))) == 2
    assert "tensorflow" not in sys.modules


def test_tfds_that_cannot_be_read(tfds_dir, tmp_path):
    with pytest.raises(UserError, match=r"split: 'val': Unknown split 'val'\. Should be one of"):
        load_rows(SourceConfig(path="tfds:pairs", data_dir=str(tfds_dir), split="val"))
    with pytest.raises(UserError, match="tfds:no_such_set: TFDS cannot open it: Dataset no_such_set not found"):
        load_rows(SourceConfig(path="tfds:no_such_set", data_dir=str(tfds_dir)))
    with pytest.raises(UserError, match="contains the data set 'pairs'"):
        load_rows(SourceConfig(path="tfds:other", data_dir=str(tfds_dir / "pairs" / "1.0.0")))
    with pytest.raises(UserError, match=r"tfds:mnist: the data set is not prepared in .*download_and_prepare\(\)"):
        load_rows(SourceConfig(path="tfds:mnist", data_dir=str(tmp_path)))


def test_tfds_prepared_as_tfrecord(tfds_dir, tmp_path):
    """A set is TFRecord by what its info and the names of its files say; only TensorFlow can write a real one."""
    folder = tmp_path / "pairs" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (tfds_dir / "pairs" / "1.0.0").iterdir():
        (folder / path.name.replace("array_record", "tfrecord")).write_bytes(
            path.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        )
    with pytest.raises(UserError, match=r"prepared as \['tfrecord'\].*file_format='array_record'\)") as caught:
        load_rows(SourceConfig(path="tfds:pairs", data_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_again_when_a_file_is_replaced_under_an_old_date(tmp_path):
    source, file = SourceConfig(path=str(tmp_path / "rows")), tmp_path / "rows" / "a.jsonl"
    file.parent.mkdir()
    seen = []
    for text in ("one", "two"):
        file.write_text(json.dumps({"text": text}) + "\n")
        os.utime(file, (1e9, 1e9))
        seen.append((fingerprint(source), load_rows(source)[0]["text"]))
    (first, one), (second, two) = seen
    assert first != second
    assert (one, two) == ("one", "two")
