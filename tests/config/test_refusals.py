"""What is wrong with data, model or run directory, as a user meets it: one line, the right exit code, nothing lost.

Wrong configs and usage are in test_config.py and test_cli.py.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from runs import ended, events, write_config

from dpo_jax import cli
from dpo_jax.storage import seal, unseal

PAIR = {"prompt": "Once", "chosen": " upon a time", "rejected": " no"}
ROWS = [{**PAIR, "prompt": f"Once {i}"} for i in range(8)]


def lines_of(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def config(shared, tmp_path, monkeypatch) -> Path:
    """A right config in its own working directory: a trained model, eight pairs, two steps."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(lines_of(ROWS))
    shutil.copytree(shared / "models" / "stories260K", "model", copy_function=shutil.copyfile)
    return write_config(
        Path("c.yaml"),
        {
            "model": {"path": "model"},
            "data": {"train": {"path": "pairs.jsonl"}, "max_length": 64, "workers": 1},
            "optimizer": {"schedule": "constant"},
            "batch": {"pairs": 4},
            "run": {"dir": "run", "steps": 2, "progress": False, "report": False},
        },
    )


def refused(capfd, *argv: str, notices: int = 0) -> tuple[int, str]:
    """Exit code and the one line on stderr; ``notices`` lines, one a damaged save, may come before it."""
    capfd.readouterr()
    code = cli.main(list(argv))
    said = capfd.readouterr()
    assert said.out == ""
    *before, line = said.err.splitlines()
    assert len(before) == notices, said.err
    assert line.startswith("dpo-jax: error: ")
    return code, line


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, but for a run's lock and its list of starts."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.lock", "events.jsonl"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def nothing() -> None:
    """Nothing is spoiled: the arguments are wrong."""


def write(name: str, content: str | bytes) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name: str, change: Callable[[bytes], bytes]) -> None:
    write(name, change(Path(name).read_bytes()))


def remove(pattern: str) -> None:
    for path in Path().glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def configure_model(**values) -> None:
    edit("model/config.json", lambda text: json.dumps(json.loads(text) | values).encode())


def rows(*more) -> None:
    write("pairs.jsonl", lines_of([*ROWS, *more]))


TALK = {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]}  # fmt: skip


def talk_with_template(template: str) -> None:
    write("pairs.jsonl", lines_of([TALK]))
    write("t.jinja", template)


# (name, what spoils the data, arguments, what the line holds)
BAD_DATA = [
    ("no file", partial(remove, "pairs.jsonl"), "", "pairs.jsonl: no such file; the working directory is "),
    (
        "suffix",
        partial(write, "pairs.tsv", "a"),
        "--data.train pairs.tsv",
        "pairs.tsv: unknown suffix '.tsv'; use",
    ),
    ("empty", partial(write, "pairs.jsonl", "\n"), "", "pairs.jsonl: the source has no rows; choose another"),
    (
        "not JSON",
        partial(write, "pairs.jsonl", lines_of(ROWS) + "{oops\n"),
        "",
        "pairs.jsonl, line 9: not JSON:  ... fix or remove this row",
    ),
    (
        "not UTF-8",
        partial(write, "pairs.jsonl", lines_of(ROWS).encode() + b'{"prompt": "\xff"}\n'),
        "",
        "pairs.jsonl, line 9: not JSON: ",
    ),
    ("no object", partial(rows, [1, 2]), "", "pairs.jsonl, line 9: got list, expected a JSON object"),
    (
        "list cut short",
        partial(write, "pairs.json", json.dumps(ROWS)[:-9]),
        "--data.train pairs.json",
        "pairs.json: not JSON:  ... fix the file",
    ),
    (
        "no parquet",
        partial(write, "pairs.parquet", "PAR"),
        "--data.train pairs.parquet",
        "pairs.parquet:  ... it must be a readable parquet file",
    ),
    (
        "unknown columns",
        partial(write, "pairs.jsonl", lines_of([{"question": "a", "good": "b"}])),
        "",
        "pairs.jsonl: columns ['good', 'question'] match no schema of dpo;  ... {chosen: COLUMN, prompt: question",
    ),
    (
        "no such column",
        nothing,
        "--data.train.columns.prompt question",
        "pairs.jsonl: columns: prompt: no column 'question'; available: ['prompt', 'chosen', 'rejected']",
    ),
    (
        "option of another kind",
        nothing,
        "--data.train.split test",
        "pairs.jsonl: split: 'test' does not apply to a file of JSON lines; remove the option",
    ),
    (
        "missing field",
        partial(rows, {**PAIR, "chosen": None}),
        "",
        "pairs.jsonl ... row 8 ... chosen is absent or null",
    ),
    (
        "nothing left",
        partial(write, "pairs.jsonl", lines_of([{**PAIR, "rejected": PAIR["chosen"]}])),
        "",
        "pairs.jsonl: none of its 1 rows are valid:  ... equal_answers",
    ),
    (
        "no chat template",
        partial(write, "pairs.jsonl", lines_of([TALK])),
        "",
        "pairs.jsonl, row 0: the row holds messages, but the tokenizer has no chat template; set data.chat_template to",
    ),
    (
        "no template file",
        nothing,
        "--data.chat_template t.jinja",
        "data.chat_template: 't.jinja' cannot be read: ",
    ),
    (
        "template refuses",
        partial(talk_with_template, "{{ raise_exception('no!') }}"),
        "--data.chat_template t.jinja",
        "pairs.jsonl ... row 0 ... no! ... template_refused",
    ),
    (
        "template with a fault",
        partial(talk_with_template, "{% if %}"),
        "--data.chat_template t.jinja",
        "pairs.jsonl, row 0: the chat template has a syntax error in line 1: ... data.chat_template",
    ),
    (
        "none held out",
        nothing,
        "--data.eval_fraction 0.01",
        "data.eval_fraction: 0.01 of 8 examples (8 prompts) holds out 0; change the fraction",
    ),
    ("evaluation set", nothing, "--data.eval.dev dev.jsonl", "dev.jsonl: no such file"),
    (
        "row too short",
        nothing,
        "--data.train.path long.jsonl --batch.row_length 64",
        "batch.row_length: 64 is shorter than a pair of  ... raise it, or lower data.max_length",
    ),
    ("no TFDS set", nothing, "--data.train tfds:no_such_set", "tfds:no_such_set: TFDS cannot open it: "),
]


@pytest.mark.parametrize(
    ("spoil", "arguments", "line"), [case[1:] for case in BAD_DATA], ids=[case[0] for case in BAD_DATA]
)
def test_bad_data(capfd, config, spoil, arguments, line):
    write("long.jsonl", lines_of({**row, "chosen": " upon a time" * 30} for row in ROWS))
    spoil()
    before = files(Path())
    code, said = refused(capfd, "train", str(config), *arguments.split())
    assert code == 2
    for part in line.split(" ... "):
        assert part in said
    assert files(Path("run")) == {}
    assert {name: content for name, content in files(Path()).items() if name in before} == before


def shallower_copy() -> None:
    shutil.copytree("model", "other")
    edit("other/config.json", lambda text: text.replace(b'"num_hidden_layers": 5', b'"num_hidden_layers": 4'))


BAD_MODELS = [
    ("no directory", nothing, "--model.path ./nope", "model.path: ./nope does not exist; give a directory"),
    (
        "a file",
        nothing,
        "--model.path model/model.safetensors",
        "model.path: model/model.safetensors is a file; give the directory",
    ),
    (
        "no config.json",
        partial(remove, "model/config.json"),
        "",
        "model.path: model holds neither config.json nor checkpoints/",
    ),
    (
        "config.json cut short",
        partial(edit, "model/config.json", lambda data: data[:40]),
        "",
        "model/config.json: not valid JSON:  ... copy or download it again",
    ),
    (
        "unknown type",
        partial(configure_model, model_type="mamba"),
        "",
        "model/config.json: model_type: 'mamba' cannot be used: ",
    ),
    (
        "not computed",
        partial(configure_model, logit_scale=3.0),
        "",
        "model/config.json: logit_scale: 3.0 cannot be used: ",
    ),
    (
        "no weights",
        partial(remove, "model/model.safetensors"),
        "",
        "model: contains neither model.safetensors nor model.safetensors.index.json",
    ),
    (
        "weights cut short",
        partial(edit, "model/model.safetensors", lambda data: data[:100_000]),
        "",
        "model/model.safetensors: this is not an intact safetensors file:  ... not fully covered: copy or download",
    ),
    (
        "fewer layers",
        partial(configure_model, num_hidden_layers=4),
        "",
        "model: the weights contain model.layers.4. ... which config.json does not define",
    ),
    (
        "another width",
        partial(configure_model, intermediate_size=256),
        "",
        "model: tensor model.layers.0.mlp. ... but config.json implies [",
    ),
    (
        "no tokenizer",
        partial(remove, "model/*token*"),
        "",
        "model: no tokenizer can be loaded:  ... set model.tokenizer to another",
    ),
    (
        "tokenizer cut short",
        partial(edit, "model/tokenizer.json", lambda data: data[:500]),
        "",
        "model: no tokenizer can be loaded: ",
    ),
    (
        "revision of a directory",
        nothing,
        "--model.revision main",
        "model.revision: 'main' cannot be used: model is a local directory",
    ),
    (
        "revision of a built-in model",
        nothing,
        "--model.path builtin:tiny --model.revision main",
        "model.revision: 'main' cannot be used: builtin:tiny is built in; remove this option",
    ),
    (
        "saved step of no run",
        nothing,
        "--model.checkpoint best",
        "model.checkpoint: 'best' cannot be used: model is not a run directory, so it has no saved steps; leave it at",
    ),
    (
        "empty value of a flag that is not set",
        nothing,
        "--run.compiler_flags.xla_foo=",
        "run.compiler_flags: xla_foo has an empty value, but it is not set by default: give it a value",
    ),
    (
        "no builtin",
        nothing,
        "--model.path builtin:huge",
        "model.path: 'builtin:huge' cannot be used: the built-in models are builtin:tiny",
    ),
    (
        "builtin without tokenizer",
        nothing,
        "--model.path builtin:tiny",
        "model.tokenizer: builtin:tiny has no tokenizer",
    ),
    ("no reference", nothing, "--reference.path ./other", "reference.path: ./other does not exist"),
    (
        "another reference",
        shallower_copy,
        "--reference.path other",
        "reference.path: other differs from model.path model in architecture or vocabulary",
    ),
    (
        "no adapters",
        nothing,
        "--lora.rank 4 --lora.path model",
        "lora.path: model contains no adapter_config.json; give a directory of adapters in PEFT's format",
    ),
    (
        "devices",
        nothing,
        "--mesh.fsdp 3",
        "mesh: data 1 x fsdp 3 x expert 1 x tensor 1 does not use 8 devices",
    ),
    ("experts", nothing, "--mesh.expert 2", "mesh.expert: 2 cannot be used: the model has no experts; use mesh.fsdp"),
]


@pytest.mark.parametrize(
    ("spoil", "arguments", "line"), [case[1:] for case in BAD_MODELS], ids=[case[0] for case in BAD_MODELS]
)
def test_bad_model_directories(capfd, config, spoil, arguments, line):
    spoil()
    before = files(Path("model"))
    code, said = refused(capfd, "train", str(config), *arguments.split())
    assert code == 2
    for part in line.split(" ... "):
        assert part in said
    assert files(Path("run")) == {}
    assert files(Path("model")) == before


@pytest.fixture(scope="module")
def made(shared, tmp_path_factory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(shared / "models" / "stories260K", folder / "model", copy_function=shutil.copyfile)
    (folder / "pairs.jsonl").write_text(lines_of(ROWS))
    options = {
        "model": {"path": "model"},
        "data": {"train": {"path": "pairs.jsonl"}, "max_length": 64, "workers": 1},
        "optimizer": {"schedule": "constant"},
        "batch": {"pairs": 4},
        "run": {"dir": "run", "steps": 2, "progress": False, "report": False, "eval_every": 1},
        "checkpoint": {"every": 1},
    }
    config = write_config(folder / "c.yaml", options)
    paths = {"model.path": "model", "data.train.path": "pairs.jsonl", "run.dir": "run"}
    there = [f"--{name}={folder / path}" for name, path in paths.items()]
    assert ended("train", config, *there, output=folder / "said") == (0, "")
    (data,) = events(folder / "run", "data")
    (note,) = data["notes"]
    assert note.startswith("run.eval_every is 1: there is no evaluation set")
    return folder


def damage() -> None:
    for step in Path("run/checkpoints").iterdir():
        for path in (step / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_format() -> None:
    for path in Path("run/checkpoints").glob("*/manifest/metadata"):
        path.write_text(json.dumps(seal({**unseal(path.read_bytes()), "format": 0})))


def other_weights() -> None:
    shutil.copytree("model", "other")
    write("other/model.safetensors", Path("model/model.safetensors").read_bytes()[:-4] + np.float32(0.5).tobytes())


BAD_RUNS = [
    (
        "other files",
        partial(write, "mine/notes.txt", "x"),
        "train c.yaml --run.dir mine",
        2,
        "run.dir: mine has other files but no run of this program: choose an empty directory",
    ),
    (
        "a file",
        nothing,
        "train c.yaml --run.dir pairs.jsonl",
        2,
        "run.dir: pairs.jsonl cannot be written or locked ( ... choose another directory",
    ),
    (
        "another store of objects",
        nothing,
        "train c.yaml --run.dir s3://b/run --data.store s",
        2,
        "run.dir: s3://b/run is neither a local path nor in a bucket of Google Cloud Storage, gs://...",
    ),
    (
        "other options",
        nothing,
        "train c.yaml --run.dir run --loss.beta 0.2 --run.seed 7",
        2,
        "with different options ... loss.beta: was 0.1, now 0.2 ... run.seed: was 0, now 7 ... restore these",
    ),
    (
        "other data",
        partial(rows, PAIR),
        "train c.yaml --run.dir run",
        2,
        "was started with different options ... store: was ",
    ),
    (
        "another model",
        other_weights,
        "train c.yaml --run.dir run --model.path other",
        2,
        "weights: was  ... reference: was ",
    ),
    (
        "another base of rotation",
        partial(configure_model, rope_theta=500.0),
        "train c.yaml --run.dir run",
        2,
        "decoder.pattern.0.rope.theta: was 10000.0, now 500.0",
    ),
    (
        "shorter",
        nothing,
        "train c.yaml --run.dir run --run.epochs 1 --run.steps null",
        2,
        "run.steps: was 2, now null",
    ),
    (
        "log cut",
        partial(write, "run/metrics.jsonl", ""),
        "train c.yaml --run.dir run",
        2,
        "run/metrics.jsonl: has 0 bytes, but  ... restore the file, or start in a new run.dir",
    ),
    (
        "log edited",
        partial(edit, "run/metrics.jsonl", lambda text: text.replace(b"\n", b" ") + b"  "),
        "train c.yaml --run.dir run",
        2,
        "run/metrics.jsonl: was edited: its first  ... bytes are not those of the save",
    ),
    (
        "saves damaged",
        damage,
        "train c.yaml --run.dir run",
        43,
        "checkpoints: no checkpoint in  ... is usable ( ... restore a good copy of a step, or choose a new run.dir",
    ),
    (
        "saves gone",
        partial(remove, "run/checkpoints"),
        "train c.yaml --run.dir run",
        2,
        "run.dir:  ... was saved before, but  ... has no checkpoint: restore the checkpoints",
    ),
    (
        "another version",
        other_format,
        "train c.yaml --run.dir run",
        2,
        "has format 0, but this version reads 5: use the version that wrote it",
    ),
    (
        "export of no run",
        nothing,
        "export model out",
        2,
        "run directory model has no events.jsonl, so it is not a run of this program: check the path",
    ),
    (
        "export onto something",
        nothing,
        "export run model",
        2,
        "model: it is not empty; name another directory to export to",
    ),
    (
        "export of no best",
        nothing,
        "export run out --which best",
        2,
        "the run has no checkpoint.best_metric, so no step is best; set checkpoint to newest",
    ),
    (
        "start from no best",
        nothing,
        "train c.yaml --run.dir next --model.path run --model.checkpoint best",
        2,
        "the run has no checkpoint.best_metric",
    ),
    (
        "revision of a run",
        nothing,
        "train c.yaml --run.dir next --model.path run --model.revision main",
        2,
        "model.revision: 'main' cannot be used: run is a run directory; choose its step with model.checkpoint; remove",
    ),
    (
        "plan with no reference",
        nothing,
        "plan c.yaml --topology v5e:2x2 --reference.path ./other",
        2,
        "reference.path: ./other does not exist",
    ),
    (
        "plan with another reference",
        shallower_copy,
        "plan c.yaml --topology v5e:2x2 --reference.path other",
        2,
        "reference.path: other differs from model.path model in architecture or vocabulary",
    ),
    (
        "start from no save",
        partial(remove, "run/checkpoints"),
        "train c.yaml --run.dir next --model.path run",
        2,
        "run/checkpoints: contains no saved step: check the path, or train first",
    ),
    (
        "start from no model",
        partial(remove, "run/model"),
        "train c.yaml --run.dir next --model.path run",
        2,
        "model.path: the run run stopped before it saved a model; choose another",
    ),
    (
        "nothing to evaluate on",
        nothing,
        "eval c.yaml --run.dir run --output o.jsonl",
        2,
        "data.eval: there is no evaluation set; add one or set data.eval_fraction",
    ),
    (
        "evaluated against another reference",
        other_weights,
        "eval c.yaml --run.dir run --output o.jsonl --data.eval.x pairs.jsonl --model.path other",
        2,
        "run.dir: ... cannot be used: it was trained against another reference",
    ),
    (
        "an output that is there",
        nothing,
        "eval c.yaml --run.dir run --output pairs.jsonl --data.eval.x pairs.jsonl",
        2,
        "--output: pairs.jsonl already exists; choose another name",
    ),
    (
        "nothing measured, so no best",
        nothing,
        "train c.yaml --run.dir next --checkpoint.keep_best 1 --checkpoint.best_metric eval_x_loss",
        2,
        "checkpoint.best_metric: 'eval_x_loss' is not an evaluation metric; there is no evaluation set: set data.eval",
    ),
    (
        "another metric for the best",
        nothing,
        "train c.yaml --run.dir next --data.eval.x pairs.jsonl --checkpoint.keep_best 1 --checkpoint.best_metric loss",
        2,
        "checkpoint.best_metric: 'loss' is not an evaluation metric; available:  ...  eval_x_loss, ",
    ),
    (
        "no place for the output",
        nothing,
        "eval c.yaml --run.dir run --output pairs.jsonl/o.jsonl --data.eval.x pairs.jsonl",
        2,
        "--output: pairs.jsonl/o.jsonl cannot be written: ",
    ),
]


@pytest.mark.parametrize(
    ("spoil", "argv", "code", "line"), [case[1:] for case in BAD_RUNS], ids=[case[0] for case in BAD_RUNS]
)
def test_bad_run_directories(capfd, made, tmp_path, monkeypatch, spoil, argv, code, line):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    Path("mine").mkdir()
    spoil()
    before = files(Path("run")) | files(Path("mine"))
    found, said = refused(capfd, *argv.split(), notices=2 if spoil is damage else 0)
    assert found == code
    for part in line.split(" ... "):
        assert part in said
    after = files(Path("run")) | files(Path("mine"))
    if spoil is damage:  # set aside, whole
        after = {name.replace(".damaged", ""): content for name, content in after.items()}
    assert after == before
    assert not Path("out").exists()


HOLDS = """
import sys
from dpo_jax.runs.directory import locked_run
with locked_run('run'):
    print('held', flush=True)
    sys.stdin.read()
"""


def test_a_run_in_use(capfd, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = files(Path("run"))
        code, said = refused(capfd, "train", "c.yaml")
        assert code == 2
        assert f"run.dir: run is in use by process {other.pid} on " in said
        assert files(Path("run")) == before
        other.kill()
