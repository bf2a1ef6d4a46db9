"""Whatever is in what comes from outside: it is read as the libraries that define it read it, or one line refuses it.

Each target draws inputs that begin as valid ones, and calls the product's own function for them. The default run is
half a minute's work; ``-m weekly`` draws 120 times as many.
"""

import ast
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_data
import fuzz_models
import fuzz_runs
import pytest
from fuzzing import hunt
from small_tokenizer import CHAT_TEMPLATE

from dpo_jax import cli

ROOT = Path(__file__).parents[1]
WEEKLY = 120
# name -> (inputs of a default run, what draws them, what checks one)
TARGETS: dict[str, tuple[int, Callable[[], Any], Callable[[Any], bool]]] = {
    "rows": (100, fuzz_data.rows, fuzz_data.check_rows),
    "any rows": (75, lambda: fuzz_data.any_rows, fuzz_data.check_any_row),
    "data files": (100, fuzz_data.data_files, fuzz_data.check_data_file),
    "templates": (50, fuzz_data.templates, fuzz_data.check_template),
    "stores": (30, fuzz_data.stores, fuzz_data.check_store),
    "safetensors": (200, fuzz_models.safetensors_bytes, fuzz_models.check_safetensors),
    "index": (100, lambda: fuzz_models.indexed, fuzz_models.check_index),
    "config.json": (200, fuzz_models.hf_configs, fuzz_models.check_hf_config),
    "config.json bytes": (50, lambda: fuzz_models.hf_config_bytes, fuzz_models.check_hf_config_bytes),
    "adapter_config.json": (6, fuzz_models.adapters, fuzz_models.check_adapter_config),
    "checkpoint manifests": (75, fuzz_runs.manifests, fuzz_runs.check_checkpoint_manifest),
    "restored steps": (5, fuzz_runs.manifests, fuzz_runs.check_restored),
    "reference caches": (50, fuzz_runs.reference_caches, fuzz_runs.check_reference_cache),
    "configs": (75, fuzz_runs.configs, fuzz_runs.check_config),
    "config bytes": (75, lambda: fuzz_runs.config_bytes, fuzz_runs.check_config_bytes),
    "YAML scalars": (150, lambda: fuzz_runs.plain_scalars, fuzz_runs.check_plain_scalar),
    "command lines": (60, lambda: fuzz_runs.command_lines, fuzz_runs.check_command_line),
    "overrides": (50, lambda: fuzz_runs.overrides, fuzz_runs.check_override),
}


@pytest.mark.parametrize("times", [1, pytest.param(WEEKLY, marks=pytest.mark.weekly)])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of keys that it does not know
def test_only_documented_outcomes(name, times, shared, request):
    if name == "adapter_config.json":
        request.getfixturevalue("peft")
    examples, strategy, check = TARGETS[name]
    count, accepted = hunt(times * examples, strategy(), check)
    print(f"{name}: {count} inputs, {accepted} accepted")
    assert 0 < accepted < count


TOO_LARGE = {"a": {"dtype": "F64", "shape": [2**63, 0], "data_offsets": [0, 0]}}  # no elements, but dims
FOUND: list[tuple[str, Any, bool]] = [  # by the weekly runs: target, input, whether it is accepted
    ("safetensors", len(json.dumps(TOO_LARGE)).to_bytes(8, "little") + json.dumps(TOO_LARGE).encode(), False),
    ("config.json", fuzz_models.FAMILY_CONFIGS[0] | {"initializer_range": 160}, False),
    ("configs", ("train", {"model": {"path": math.inf}, "data": {"train": "x"}, "run": {"dir": "runs/x"}}), True),
    ("overrides", ("checkpoint.keep_best", "1"), False),
    ("overrides", ("mesh.data", "-1"), False),
]


@pytest.mark.parametrize(
    ("name", "value", "accepted"), FOUND, ids=[f"{name} {i}" for i, (name, *_) in enumerate(FOUND)]
)
def test_inputs_that_were_once_handled_wrongly(name, value, accepted):
    assert TARGETS[name][2](value) == accepted


# What refuses bad input must not hide this program's own faults.

PLANTED = {
    "options": ("dpo_jax.config.file", "_read"),
    "config.json": ("dpo_jax.models.families.config_file", "size"),
    "files": ("dpo_jax.data.files", "_parse_row"),
    "values": ("dpo_jax.data.values", "text"),
    "rows": ("dpo_jax.data.schemas", "_weight"),
    "templates": ("dpo_jax.data.template", "_require_template"),
    "tokens": ("dpo_jax.data.tokenize", "_truncate"),
    "stores": ("dpo_jax.data.store", "_arrays"),
    "manifests": ("dpo_jax.storage", "_checksum"),
}


@pytest.fixture(scope="module")
def data_command(shared, tmp_path_factory) -> list[str]:
    """A command that reads a model's config and tokenizer, rows with messages, and a template."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "t.jinja").write_text(CHAT_TEMPLATE)
    row = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "So.", "rejected": "No."}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    options = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {"train": str(folder / "rows.jsonl"), "chat_template": str(folder / "t.jinja"), "workers": 1},
        "run": {"dir": str(folder / "run")},
    }
    (folder / "c.yaml").write_text(json.dumps(options))
    return ["data", str(folder / "c.yaml"), "--data.store"]


def test_the_command_for_planted_faults_runs(data_command, tmp_path, capsys):
    assert cli.main([*data_command, str(tmp_path)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_shows_its_traceback(name, data_command, tmp_path, monkeypatch):
    def fault(*args, **kwargs):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(".".join(PLANTED[name]), fault)
    with pytest.raises(ZeroDivisionError, match="planted"):
        cli.main([*data_command, str(tmp_path)])


def nets(tree: ast.Module) -> Iterator[tuple[int, list[ast.AST]]]:
    """Line and content of every block whose exceptions are all caught: by from_outside, or by except Exception."""
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            if any(isinstance(call.func, ast.Name) and call.func.id == "from_outside" for call in calls):
                yield node.lineno, [*node.body, *(item for item in node.items if item.context_expr not in calls[:1])]
        elif isinstance(node, ast.Try):
            kept = [
                one for one in node.handlers if not (isinstance(one.body[-1], ast.Raise) and one.body[-1].exc is None)
            ]
            caught = {ast.unparse(handler.type) if handler.type else "" for handler in kept}
            if caught & {"Exception", "BaseException", ""}:
                yield node.lineno, [*node.body]


def own_names(tree: ast.Module) -> set[str]:
    """Functions and classes of a module, and what it imports from this program."""
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                for alias in node.names if (node.module or "").startswith("dpo_jax")}  # fmt: skip
    return defined | imported


# The template's clock and timer, which raise what the template makes them raise; the report, whose traceback is shown.
MAY_BE_CAUGHT = {
    ("data/template.py", "_time_limit"),
    ("data/template.py", "_set_clock"),
    ("reports/run.py", "write_report"),
    ("runs/checkpoint.py", "storage_faults"),  # it only raises again, as another type
    ("runs/restore.py", "storage_faults"),
}


def test_what_catches_everything_holds_calls_of_libraries_only():
    wrong = []
    for path in sorted((ROOT / "dpo_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        own, file = own_names(tree), str(path.relative_to(ROOT / "dpo_jax"))
        for line, content in nets(tree):
            called = {call.func.id for part in content for call in ast.walk(part)
                      if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}  # fmt: skip
            wrong += [f"{file}:{line}: {name}" for name in called & own if (file, name) not in MAY_BE_CAUGHT]
    assert not wrong, wrong
