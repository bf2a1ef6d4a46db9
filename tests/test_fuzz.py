"""Whatever is in what comes from outside: it is read as the libraries that define it read it, or one line refuses it.

Each target draws inputs that begin as valid ones, and calls the product's own function for them. The default run is a
minute's work; ``-m weekly`` draws sixty times as many.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_data
import fuzz_models
import fuzz_runs
import pytest
from fuzzing import hunt

from dpo_jax import cli

ROOT = Path(__file__).parents[1]
WEEKLY = 60
# name -> (inputs of a default run, what draws them, what checks one)
TARGETS: dict[str, tuple[int, Callable[[], Any], Callable[[Any], bool]]] = {
    "rows": (400, fuzz_data.rows, fuzz_data.check_rows),
    "any rows": (200, lambda: fuzz_data.any_rows, fuzz_data.check_any_row),
    "data files": (300, fuzz_data.data_files, fuzz_data.check_data_file),
    "templates": (150, fuzz_data.templates, fuzz_data.check_template),
    "stores": (100, fuzz_data.store_damage, fuzz_data.check_store),
    "safetensors": (400, fuzz_models.safetensors_bytes, fuzz_models.check_safetensors),
    "index": (200, lambda: fuzz_models.indexed, fuzz_models.check_index),
    "config.json": (400, fuzz_models.hf_configs, fuzz_models.check_hf_config),
    "config.json bytes": (100, lambda: fuzz_models.hf_config_bytes, fuzz_models.check_hf_config_bytes),
    "adapter_config.json": (60, fuzz_models.adapter_configs, fuzz_models.check_adapter_config),
    "checkpoint manifests": (150, fuzz_runs.checkpoint_manifests, fuzz_runs.check_checkpoint_manifest),
    "restored steps": (10, fuzz_runs.checkpoint_manifests, fuzz_runs.check_restored),
    "reference caches": (100, fuzz_runs.reference_caches, fuzz_runs.check_reference_cache),
    "configs": (300, fuzz_runs.configs, fuzz_runs.check_config),
    "config bytes": (150, lambda: fuzz_runs.config_bytes, fuzz_runs.check_config_bytes),
    "YAML scalars": (150, lambda: fuzz_runs.plain_scalars, fuzz_runs.check_plain_scalar),
    "command lines": (60, lambda: fuzz_runs.command_lines, fuzz_runs.check_command_line),
    "overrides": (200, lambda: fuzz_runs.overrides, fuzz_runs.check_override),
}


@pytest.mark.parametrize("times", [1, pytest.param(WEEKLY, marks=pytest.mark.weekly)])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of keys that it does not know
def test_only_documented_outcomes(name, times, shared):
    examples, strategy, check = TARGETS[name]
    count, accepted = hunt(times * examples, strategy(), check)
    print(f"{name}: {count} inputs, {accepted} accepted")
    assert 0 < accepted < count
