"""Adapters from and to directories in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import LoraConfig
from dpo_jax.errors import UserError, from_outside, shown
from dpo_jax.models.decoder import Model, Params
from dpo_jax.models.projections import BY_TARGET, LAYER, TENSORS
from dpo_jax.weights.hub import read_json
from dpo_jax.weights.huggingface import Slot, fetch_tensors, load_tree, whole_directory
from dpo_jax.weights.safetensors import Tensor, read_header, write_file

CONFIG, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every tensor's name


# Keys of adapter_config.json that are read here, and those that do not change what the adapters compute: dropout is off
# in this program, the rest concerns tools. Any other key must have a value by which PEFT does nothing: of most it asks
# whether they are null, so that an empty list or dictionary can act.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "init_lora_weights", "bias"}
_HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "layers_pattern", "ensure_weight_tying",
}  # fmt: skip
_IDLE = {
    "layers_to_transform": None,
    "modules_to_save": [],
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": {},
}
# What to do with adapters that this program cannot train on.
_MERGE = "merge these adapters into their model (PEFT's merge_and_unload) and give the result, saved, as model.path"
# Starts after which the weights under the adapters are still the model's own.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def _tensors(model: Model) -> dict[str, Slot]:
    """Every tensor of the model's adapters, by its name in the file; a leaf is layers/PROJECTION/a or b."""
    slots = {}
    for projection, pair in model.adapter_shapes()["layers"].items():
        for part, leaf in pair.items():
            num_layers, *dims = leaf.shape
            shape = (dims[0], math.prod(dims[1:])) if part == "a" else (math.prod(dims[:-1]), dims[-1])
            for layer in range(num_layers):
                name = f"{_PREFIX}{_module(projection, layer)}.lora_{part.upper()}.weight"
                slots[name] = Slot(f"layers/{projection}/{part}", layer, shape)
    return slots


def _module(projection: str, layer: int) -> str:
    return TENSORS[f"layers/{projection}"].removesuffix(".weight").format(layer)


def load_adapters(folder: Path, model: Model, config: LoraConfig, shardings: Any) -> Params:
    """The adapters of a PEFT directory, as the tree of ``model``, whose adapters are those of ``config``; float32.

    Raises:
        UserError: there are none, they are not what the options say, or they ask for what is not computed here.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"lora.path: {folder} holds no {CONFIG}; give a directory of adapters in PEFT's format")
    options = read_json(folder / CONFIG)
    _check_options(folder, options, config)
    if not (folder / TENSOR_FILE).is_file():
        raise UserError(f"lora.path: {folder} has no {TENSOR_FILE}; save the adapters with safe_serialization=True")
    tensors, expected = read_header(folder / TENSOR_FILE), _tensors(model)
    _check_tensors(folder, tensors, expected)
    _check_targets(folder, options, model, expected)
    return load_tree(tensors, expected, model.adapter_shapes(), shardings)


def _check_options(folder: Path, options: Mapping[str, Any], config: LoraConfig) -> None:
    def refuse(key: str, why: str) -> UserError:
        return UserError(f"lora.path: {folder / CONFIG}: {key}", options.get(key), why)

    if options.get("peft_type") != "LORA":
        raise refuse("peft_type", "adapters can be LORA only")
    if options.get("bias", "none") != "none":
        raise refuse("bias", f"biases are not trained with adapters; {_MERGE}")
    if options.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise refuse("init_lora_weights", "it changes the weights under the adapters; convert them to plain LoRA first")
    for key, value in options.items():
        idle = value is None or (value == _IDLE[key] if key in _IDLE else value is False)
        if key not in _READ | _HARMLESS and not idle:
            raise refuse(key, f"this option is not computed here; {_MERGE}")
    for key, option in (("r", "rank"), ("lora_alpha", "alpha"), ("use_rslora", "rslora")):
        if options.get(key, False) != getattr(config, option):
            raise refuse(key, f"lora.{option} is {getattr(config, option)!r}; set both alike")


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Slot]) -> None:
    def refuse(why: str) -> UserError:
        return UserError(f"lora.path: {folder / TENSOR_FILE} {why}")

    targets = {slot.leaf.split("/")[1] for slot in expected.values()}
    for name in tensors:
        module = name.split(".lora_")[0].rpartition(".")[2]
        if module not in BY_TARGET:
            raise refuse(f"holds {name}, which is no adapter of {', '.join(BY_TARGET)}: {_MERGE}")
        if BY_TARGET[module].name not in targets:
            raise refuse(f"holds {name}, which belongs to none of lora.targets: add {module}, or use other adapters")
        if name not in expected:
            raise refuse(f"holds {name}, which has no counterpart in this model: use adapters of the same model")
    for name, slot in expected.items():
        if name not in tensors:
            raise refuse(
                f"lacks {name}, which lora.targets ask for: leave it out, or if only some layers have it, {_MERGE}"
            )
        given, wanted = list(tensors[name].shape), list(slot.shape)
        if given != wanted:
            raise refuse(f"holds {name} of shape {given}, this model's is {wanted}: use adapters of the same model")


def _check_targets(folder: Path, options: Mapping[str, Any], model: Model, expected: Mapping[str, Slot]) -> None:
    """Refuse options by which PEFT would ignore some of the file's tensors, or create others."""
    path = folder / CONFIG
    targets, excluded = options.get("target_modules"), options.get("exclude_modules") or []
    modules = {_module(name, layer) for name in LAYER for layer in range(model.config.layers)}
    every = isinstance(targets, str) and targets.lower() == "all-linear"
    chosen = modules if every else _named(path, "target_modules", targets, modules)
    chosen = chosen - _named(path, "exclude_modules", excluded, modules)
    stored = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in expected}
    if chosen != stored:
        difference = f"{shown(targets)} and the tensors of {TENSOR_FILE} differ at {min(chosen ^ stored)}"
        raise UserError(f"lora.path: {path}: target_modules: {difference}; copy both files again")


def _named(path: Path, key: str, given: Any, modules: set[str]) -> set[str]:
    """The modules that match a pattern, or a list of names and ends of names, as PEFT matches them."""
    if isinstance(given, str):
        with from_outside(f"lora.path: {path}: {key}", "it must be a regular expression or a list of names"):
            pattern = re.compile(given)
        return set(filter(pattern.fullmatch, modules))
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise UserError(f"lora.path: {path}: {key}", given, "give a list of names")
    return {module for module in modules if any(f".{module}".endswith(f".{name}") for name in given)}


def export_adapters(adapters: Params, model: Model, config: LoraConfig, base: str, out_dir: Path) -> None:
    """Write the adapters of ``model``, made with ``config``, as a directory that PEFT loads, in float32.

    ``base`` is what the directory says of the model under them.

    Raises:
        UserError: ``out_dir`` is not free or cannot be written.
    """
    slots = _tensors(model)
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": list(config.projections),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_directory(out_dir, overwrite=False) as unfinished:
        shapes, dtype = {name: slot.shape for name, slot in slots.items()}, np.dtype(np.float32)
        write_file(unfinished / TENSOR_FILE, shapes, dtype, fetch_tensors(adapters, slots, dtype))
        (unfinished / CONFIG).write_text(json.dumps(options, indent=2) + "\n")
