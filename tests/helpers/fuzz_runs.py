"""Fuzzed manifests, reference caches, configs and command lines: taken as they were written, or refused in a line."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest import mock

import jax
import numpy as np
import small_cache
import yaml
from etils import epath
from fuzzing import ODD_NUMBERS, as_json, damaged, mutated, odd_values, refused
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from dpo_jax import cli
from dpo_jax.config import CheckpointConfig, DPOConfig, SFTConfig
from dpo_jax.config.file import CommandLineText, config_to_yaml, field_names, load_yaml, parse_config
from dpo_jax.inference.reference_cache import cached_logps
from dpo_jax.runs.checkpoint import Checkpoints
from dpo_jax.runs.manifest import make_manifest
from dpo_jax.runs.restore import Damaged, read_manifest, read_metrics, restore_part

LEAST = {"model": {"path": "m"}, "data": {"train": "pairs.jsonl"}, "run": {"dir": "runs/x"}}

# ---------------------------------------------------------------------------------------------------- checkpoints


@cache
def saved() -> Path:
    """Steps 1 and 2 of a run; never written to."""
    folder = Path(mkdtemp(prefix="fuzzed-checkpoints-")) / "checkpoints"
    manifest = make_manifest(asdict(parse_config(LEAST, {}, DPOConfig)), {"weights": "w"}, {"devices": 1})
    with Checkpoints(folder, CheckpointConfig(keep=2)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(
                step, {"w": jax.numpy.full(4, step)}, {**manifest, "offsets": {}, "extras": {}}, {"loss": step / 2}
            )
    return folder


@st.composite
def checkpoint_manifests(draw: st.DrawFn, good: bytes) -> bytes:
    """A manifest mutated as a tree, or its bytes damaged."""
    if draw(st.booleans()):
        return as_json(draw(mutated(st.just(json.loads(good))))).encode()
    return draw(damaged(st.just(good)))


def manifests() -> st.SearchStrategy:
    """Manifests made from one that is written here: a strategy may not."""
    return checkpoint_manifests((saved() / "2" / "manifest" / "metadata").read_bytes())


def check_checkpoint_manifest(data: bytes) -> bool:
    """A manifest is what was written, or its step is passed over and the older one taken."""
    good = read_manifest(epath.Path(saved()), 2)
    with TemporaryDirectory() as name:
        folder = epath.Path(name) / "checkpoints"
        for step in (1, 2):  # without arrays: they are not read here
            shutil.copytree(saved() / str(step) / "manifest", folder / str(step) / "manifest")
            shutil.copy(saved() / str(step) / "_CHECKPOINT_METADATA", folder / str(step))
        (folder / "2" / "manifest" / "metadata").write_bytes(data)
        try:
            found, was_refused = refused(lambda: read_manifest(folder, 2), str(folder))
        except Damaged as damage:
            found = None
            shown = str(damage)
            was_refused = False
        if was_refused:
            return False
        assert found == good or (found is None and len(shown.splitlines()) == 1)
        assert read_metrics(folder) == {1: {"loss": 0.5}} | ({} if found is None else {2: {"loss": 1.0}})
        return found is not None


def check_restored(data: bytes) -> bool:
    """The same through the whole of restoring, arrays too."""
    whole = jax.ShapeDtypeStruct((4,), np.int32, sharding=SingleDeviceSharding(jax.devices()[0]))
    with TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        shutil.copytree(saved(), folder)
        path = folder / "2" / "manifest" / "metadata"
        intact = json.loads(path.read_bytes())
        path.write_bytes(data)
        said: list[str] = []
        restored, was_refused = refused(lambda: restore_part(folder, "newest", {"w": whole}, said.append), str(folder))
        if was_refused:
            return False
        arrays, manifest = restored
        assert manifest["step"] == 2 - len(said)
        assert np.asarray(arrays["w"]).tolist() == [manifest["step"]] * 4
        assert said == [] or (len(said[0].splitlines()) == 1 and "step 2" in said[0])
        assert said or json.loads(data) == intact
        return not said


# ------------------------------------------------------------------------------------------------- reference cache


@cache
def cache_file() -> tuple[Any, Path]:
    """Batches, and their cache as it was written."""
    batches = small_cache.in_steps(small_cache.small_store(Path(mkdtemp(prefix="fuzzed-cache-"))), 23)
    small_cache.run(batches, small_cache.Computer())
    (path,) = small_cache.files(batches)
    path.rename(path.with_suffix(".good"))
    return batches, path


def reference_caches() -> st.SearchStrategy[bytes]:
    return damaged(st.just(cache_file()[1].with_suffix(".good").read_bytes()))


def check_reference_cache(data: bytes) -> bool:
    """Whatever the file holds, the log-probs are those that the reference has."""
    batches, path = cache_file()
    path.write_bytes(data)
    said: list[str] = []
    found = cached_logps(batches, small_cache.ALL, small_cache.MADE_BY, small_cache.Computer(), said.append)
    assert np.array_equal(found["sum"], small_cache.LOGPS)
    assert all(len(line.splitlines()) == 1 and str(path) in line for line in said)
    return not said


# ---------------------------------------------------------------------------------------------------- configs

KINDS = {"train": DPOConfig, "sft": SFTConfig}
VALID = [LEAST] + [load_yaml(path) for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))]
FULL = {name: yaml.safe_load(config_to_yaml(parse_config(LEAST, {}, kind))) for name, kind in KINDS.items()}


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, Any]:
    """A command and a config's tree: a shipped one, or with every option, mutated."""
    command = draw(st.sampled_from(["train", "train", "sft"]))
    return command, draw(
        mutated(st.sampled_from([*VALID, FULL[command]] if command == "train" else [LEAST, FULL["sft"]]))
    )


def same(actual: Any, given: Any) -> bool:
    """Whether a config's value is the one in the file: whole numbers may be held as floats, a list's only one alone."""
    if isinstance(actual, tuple | list):
        given = given if isinstance(given, list) else [given]
        return len(actual) == len(given) and all(map(same, actual, given))
    if isinstance(actual, dict) and isinstance(given, dict):
        return all(name in actual and same(actual[name], value) for name, value in given.items())
    if isinstance(actual, dict):  # the shorthand of a set
        return actual.get("path") == given
    numbers = type(actual) is float and type(given) in (int, float)
    return actual == given and (type(actual) is type(given) or numbers)


def check_config(value: tuple[str, Any]) -> bool:
    """JSON is YAML 1.2: what is taken from its text holds the values that the json library reads.

    The library also writes and reads Infinity and NaN, which are not JSON: YAML takes these words as text.
    """
    command, tree = value
    with TemporaryDirectory() as name:
        path = Path(name) / "c.yaml"
        path.write_text(as_json(tree))
        config, was_refused = refused(lambda: parse_config(path, {}, KINDS[command]))
        if was_refused:
            return False
        read = json.loads(path.read_text(), parse_constant=str)
        assert same(asdict(config), settled(read))
        assert parse_config(read, {}, KINDS[command]) == config
        path.write_text(config_to_yaml(config))
        assert parse_config(path, {}, KINDS[command]) == config
        return True


def settled(tree: dict) -> dict:
    """The tree without what a section settles by itself: a loss named by another library's name."""
    return {name: value for name, value in tree.items() if name != "loss"}


TEXT = "\n".join([
    "# a run", "model: {path: m, dtype: float32}", "data:", "  train:", "    - {path: a.jsonl, weight: 0.5}",
    "    - path: b.jsonl", "      weight: 5e-1", "  max_length: 64", "loss: {beta: .1}",
    "run: {dir: 'runs/x', steps: 012}",     "optimizer: {learning_rate: 5e-7}", "checkpoint: &a {every: 10}", "",
])  # fmt: skip
config_bytes = damaged(st.sampled_from([TEXT, TEXT.replace("012", "12")]).map(str.encode))


def check_config_bytes(data: bytes) -> bool:
    """Whatever the file holds: a config, or a line that names the file or the option."""
    with TemporaryDirectory() as name:
        path = Path(name) / "c.yaml"
        path.write_bytes(data)
        tree, was_refused = refused(lambda: load_yaml(path), str(path))
        if was_refused:
            return False
        assert isinstance(tree, dict)
        return not refused(lambda: parse_config(path, {}, DPOConfig))[1]


# YAML 1.2.2, chapter 10.3.2, core schema; what 1.1 reads otherwise is text here, as the configuration page says
CORE = [
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: float("nan")),
]
plain_scalars = st.one_of(
    st.text("0123456789+-.eE_xobafnINTRUyYsS~l", max_size=9),
    st.sampled_from(["yes", "no", "on", "off", "y", "1_000", "1:30", "0x1F", "0o14", "012", "-0", "+1", "1e5", "1.e5",
                     ".5"]),
    st.sampled_from(ODD_NUMBERS).map(str),
)  # fmt: skip


def core_schema(text: str) -> Any:
    return next((read(text) for pattern, read in CORE if pattern.fullmatch(text)), text)


def check_plain_scalar(text: str) -> bool:
    """A plain scalar is what version 1.2 says it is, or text where versions differ: a number with leading zeros."""
    with TemporaryDirectory() as name:
        path = Path(name) / "c.yaml"
        path.write_text(f"a: {text}\n")
        tree, was_refused = refused(lambda: load_yaml(path), str(path))
        if was_refused:
            assert "-" in text or len(text) > 4000, text  # `- x` and `---` are no scalars
            return False
        expected = text if re.match(r"[-+]?0[0-9]", text) else core_schema(text)
        assert repr(tree["a"]) == repr(expected)
        return True


# ---------------------------------------------------------------------------------------------------- command lines

NAMES = sorted(set(field_names(DPOConfig)) | set(field_names(SFTConfig)))
VALUES = ["1", "0", "-1", "x", "null", "true", "1e-3", "[1]", "{a: 1}", "[", "", "a\nb", "\x00", "\ud800",
          "9" * 5000, "[" * 5000, "é", "&a [*a]", "&a {x: *a}", "!!python/object:os.system x", "2" * 400,
          ".nan", "--", "~"]  # fmt: skip
ODD_NAMES = ["", "x", "data.train.0.path", "data.train.9", "data.eval.a.b", "data.train.-1.x", "data.train.\u0661",
             "run", ".", "..", "run..steps", "é", "loss.weights.0"]  # fmt: skip


@st.composite
def words(draw: st.DrawFn) -> str:
    """One word of a command line."""
    name = draw(st.sampled_from(NAMES) | st.sampled_from(ODD_NAMES))
    value = draw(st.sampled_from(VALUES) | odd_values.map(str))
    return draw(st.sampled_from([
        f"--{name}={value}", f"--{name}={value}", f"--{name}", value, "--output", "--output=x", "--for", "--step",
        "--step=0", "--which=best", "--help", "--config", "-h", "--betas=1,x", "--topology=v5e:4x4", "--slices=-1",
    ]))  # fmt: skip


command_lines = st.tuples(
    st.sampled_from([*cli.COMMANDS] * 3 + ["", "x", "trian", "--version", "-x", "\ud800"]),
    st.booleans(),
    st.lists(words(), max_size=4),
)


def exit_code(argv: list[str]) -> int | None:
    """None: --help or --version ended it."""
    try:
        return cli.main(argv)
    except SystemExit as ended:
        return ended.code or None


def check_command_line(value: tuple[str, bool, list[str]]) -> bool:
    """Arguments reach the command, or one line and code 2 come out."""
    name, with_config, rest = value
    ran: list[dict] = []
    commands = {name: replace(command, run=lambda **given: ran.append(given)) for name, command in cli.COMMANDS.items()}
    out, err = io.StringIO(), io.StringIO()
    with TemporaryDirectory() as folder, mock.patch.object(cli, "COMMANDS", commands):
        path = Path(folder) / "c.yaml"
        path.write_text(json.dumps(LEAST))
        argv = [name, *([str(path)] if with_config else []), *rest]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = exit_code(argv)
    if code is None:
        assert out.getvalue()
    elif code == 0:
        assert (len(ran), err.getvalue()) == (1, "")
    else:
        assert (code, len(ran)) == (2, 0)
        assert re.fullmatch("dpo-jax: error: [^\n]+\n", err.getvalue())
    return code == 0


overrides = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | st.integers().map(str) | st.floats().map(str))


def check_override(value: tuple[str, str]) -> bool:
    """An option on the command line is the option in the file: text as it stands, else YAML."""
    name, text = value
    judge = {"data.online.reward.path": "r"} if name.startswith("data.online.") else {}  # or that is what is missing
    overrides = judge | {name: CommandLineText(text)}
    config, was_refused = refused(lambda: parse_config(LEAST, overrides, DPOConfig), name)
    if was_refused:
        return False
    tree = asdict(config)
    for part in name.split("."):
        tree = tree[part]
    assert same(tree, text) or same(tree, yaml_1_2(text)) or name in ("loss.type", "data.eval", "data.train")
    return True


def yaml_1_2(text: str) -> Any:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(f"a: {text}\n")
        return load_yaml(path)["a"]
