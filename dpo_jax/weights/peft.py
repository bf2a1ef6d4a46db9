"""Read and write adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import filterfalse
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import LoraConfig
from dpo_jax.errors import UserError, from_outside, shown
from dpo_jax.models.decoder import Model, Params
from dpo_jax.models.families import FAMILIES, is_expert_parameter, modules, target_name, target_names, tensor_name
from dpo_jax.models.flops import projections
from dpo_jax.models.options import DecoderConfig
from dpo_jax.models.projections import EXPERT_MODULE, layer_projections
from dpo_jax.weights.hub import read_json
from dpo_jax.weights.huggingface import fetch_tensors, load_tree
from dpo_jax.weights.output import export_directory
from dpo_jax.weights.safetensors import Tensor, read_header, write_file
from dpo_jax.weights.stored import Part, Stored, num_groups

CONFIG, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every tensor's name
_HEADS = ("classifier", "score")  # PEFT's ``modules_to_save`` for a sequence classifier; models here have ``score``

# _USED: keys of adapter_config.json that are read. _HARMLESS: keys that do not change what the adapters compute, as
# dropout is off here and the others are metadata. Any other key must have a value that PEFT ignores. PEFT tests most of
# them for null only, so an empty list or dictionary can have an effect.
_USED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "exclude_modules",
    "init_lora_weights", "bias",
}  # fmt: skip
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
# The remedy for adapters that this program does not support.
_MERGE = "merge these adapters into their model (PEFT's merge_and_unload), save it and set model.path to the result"
# Initializations that leave the base weights unchanged.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def _tensors(model: Model) -> dict[str, Stored]:
    """Return what each adapter tensor holds, by its stored name; leaves are layers/PROJECTION/a or b, or score.

    Projections in one module of the model share their A. Experts are one tensor: their A one below another, and of
    their B first the first column of each, then the second of each, and so on.
    """
    assert model.lora is not None
    config, shapes, sizes = model.config, model.adapter_shapes(), projections(model.config)

    def part(name: str, factor: str, rows: int, experts_last: bool = False) -> Part:
        shape = shapes["layers"][name][factor].shape[1:]
        return Part(leaf=f"layers/{name}/{factor}", index=(), shape=shape, rows=rows, experts_last=experts_last)

    tensors, wrappers = {}, _wrappers(model)
    for module, names in _adapted_modules(model).items():
        is_expert = is_expert_parameter(module)
        rank = model.lora.rank * (config.size("experts") if is_expert else 1)
        outputs = tuple(part(name, "b", sizes[name][1], experts_last=is_expert) for name in names)
        groups = num_groups(config, module if is_expert else f"{module}.weight")
        a = Stored(parts=(part(names[0], "a", rank),), inputs=(sizes[names[0]][0],))
        b = Stored(parts=outputs, inputs=(rank,), groups=groups)
        for letter, stored in (("A", a), ("B", b)):
            for layer in range(config.layers):
                tensors[f"{_PREFIX}{wrappers[module].format(layer)}.lora_{letter}.weight"] = stored.at((layer,))
    if "score" in shapes:
        num_scores, hidden = shapes["score"].shape
        head = Part(leaf="score", index=(), shape=(num_scores, hidden), rows=num_scores)
        tensors[_PREFIX + tensor_name(config, "score")] = Stored(parts=(head,), inputs=(hidden,))
    return tensors


def _adapted_modules(model: Model) -> dict[str, tuple[str, ...]]:
    """Return the `modules` that have an adapter."""
    assert model.lora is not None
    return {module: names for module, names in modules(model.config).items() if names[0] in model.lora.targets}


def _wrappers(model: Model) -> dict[str, str]:
    """Return, for each of the `modules`, the name of the module that holds its adapter in PEFT.

    PEFT wraps the module of all experts in one module for each of its adapted parameters, the last one outermost.
    """
    adapted = list(_adapted_modules(model))
    wrappers = {module: module for module in adapted}
    for depth, parameter in enumerate(reversed(list(filter(is_expert_parameter, adapted)))):
        wrappers[parameter] = EXPERT_MODULE + ".base_layer" * depth
    return wrappers


def _module_of(tensor: str, model: Model) -> str:
    """Return which of the `modules` an adapter tensor belongs to, or the module in its name if it is none of them."""
    module = re.sub(r"(?<=\.)\d+(?=\.)", "{}", tensor.removeprefix(_PREFIX).partition(".lora_")[0])
    return {wrapper: name for name, wrapper in _wrappers(model).items()}.get(module, module)


def load_adapters(folder: Path, model: Model, config: LoraConfig, shardings: Any) -> Params:
    """Load the adapters of a PEFT directory as the float32 adapter tree of ``model``, which ``config`` describes.

    Raises:
        UserError: the directory has no adapters, or they contradict ``config`` or need unsupported PEFT features.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"lora.path: {folder} contains no {CONFIG}; give a directory of adapters in PEFT's format")
    options = read_json(folder / CONFIG)
    _check_options(folder, options, config, model)
    if not (folder / TENSOR_FILE).is_file():
        raise UserError(f"lora.path: {folder} has no {TENSOR_FILE}; save the adapters with safe_serialization=True")
    tensors, expected = read_header(folder / TENSOR_FILE), _tensors(model)
    _check_tensors(folder, tensors, expected, model)
    _check_targets(folder, options, model)
    return load_tree(tensors, expected, model.adapter_shapes(), shardings)


def _check_options(folder: Path, options: Mapping[str, Any], config: LoraConfig, model: Model) -> None:
    bad_option = partial(_bad_option, folder / CONFIG, options)
    if options.get("peft_type") != "LORA":
        raise bad_option("peft_type", "only LORA adapters are supported")
    if options.get("bias", "none") != "none":
        raise bad_option("bias", f"training biases with adapters is not supported; {_MERGE}")
    if options.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise bad_option("init_lora_weights", "it changes the base weights; convert the adapters to plain LoRA first")
    if model.config.scores:
        saved = options.get("modules_to_save")
        if not isinstance(saved, list) or "score" not in saved or any(name not in _HEADS for name in saved):
            raise bad_option("modules_to_save", "a reward model's adapters must include its head; save score with them")
        options = {key: value for key, value in options.items() if key != "modules_to_save"}
    if FAMILIES[model.config.family].transposed:  # then PEFT sets it
        options = {key: value for key, value in options.items() if key != "fan_in_fan_out"}
    for key, value in options.items():
        is_inactive = value is None or (value == _IDLE[key] if key in _IDLE else value is False)
        if key not in _USED | _HARMLESS and not is_inactive:
            raise bad_option(key, f"this option is not supported; {_MERGE}")
    for key, option in (("r", "rank"), ("lora_alpha", "alpha"), ("use_rslora", "rslora")):
        if options.get(key, False) != getattr(config, option):
            raise bad_option(key, f"lora.{option} is {getattr(config, option)!r}; set both to the same value")
    _check_parameters(folder / CONFIG, options, model)


def _bad_option(path: Path, options: Mapping[str, Any], key: str, why: str) -> UserError:
    return UserError(f"lora.path: {path}: {key}", options.get(key), why)


def _check_parameters(path: Path, options: Mapping[str, Any], model: Model) -> None:
    """Refuse adapters of expert parameters other than those that ``lora.targets`` names."""
    bad_option = partial(_bad_option, path, options)
    chosen, adapted = options.get("target_parameters") or [], list(filter(is_expert_parameter, _adapted_modules(model)))
    if isinstance(chosen, str):  # PEFT has no patterns here
        raise bad_option("target_parameters", "give a list of names")
    all_parameters = _in_layers(filter(is_expert_parameter, modules(model.config)), model.config)
    chosen_parameters = _named(path, "target_parameters", chosen, all_parameters)
    for name in chosen:
        if not _named(path, "target_parameters", [name], all_parameters):
            raise bad_option("target_parameters", f"the model has no expert matrices named {name}; {_MERGE}")
    if chosen_parameters != _in_layers(adapted, model.config):
        names = ", ".join(map(target_name, adapted)) or "no expert parameters"
        raise bad_option("target_parameters", f"lora.targets has {names}; name the same in both")
    if adapted and options.get("lora_dropout"):
        raise bad_option("lora_dropout", "expert adapters do not support dropout; set it to 0")


def _in_layers(modules: Iterable[str], config: DecoderConfig) -> set[str]:
    """Return the names, in every layer, of modules or parameters given with {} in place of the layer."""
    return {module.format(layer) for module in modules for layer in range(config.layers)}


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Stored], model: Model) -> None:
    def bad_file(why: str) -> UserError:
        return UserError(f"lora.path: {folder / TENSOR_FILE} {why}")

    all_targets, adapted = target_names(model.config), [target_name(module) for module in _adapted_modules(model)]
    for name in (name for name in tensors if name not in expected):
        target = target_name(_module_of(name, model))
        if target not in all_targets:
            raise bad_file(f"contains {name}, which is not an adapter of {', '.join(all_targets)}: {_MERGE}")
        if target not in adapted:
            raise bad_file(f"contains {name}, which is not in lora.targets: add {target}, or use other adapters")
        raise bad_file(f"contains {name}, which has no counterpart in this model: use adapters of the same model")
    for name, stored in expected.items():
        if name not in tensors:
            raise bad_file(
                f"lacks {name}, which lora.targets requires: drop the target or, if only some layers have it, {_MERGE}"
            )
        actual, needed = list(tensors[name].shape), list(stored.shape)
        if actual != needed:
            raise bad_file(f"has {name} of shape {actual}, but this model needs {needed}: use adapters of this model")


def _check_targets(folder: Path, options: Mapping[str, Any], model: Model) -> None:
    """Refuse options that would make PEFT ignore some tensors of the file, or expect ones that are not in it."""
    path = folder / CONFIG
    targets, excluded = options.get("target_modules"), options.get("exclude_modules") or []
    if targets is None and options.get("target_parameters"):
        targets = []
    all_modules = _in_layers(filterfalse(is_expert_parameter, modules(model.config)), model.config)
    is_all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    target_modules = all_modules if is_all_linear else _named(path, "target_modules", targets, all_modules)
    target_modules = target_modules - _named(path, "exclude_modules", excluded, all_modules)
    stored_modules = _in_layers(filterfalse(is_expert_parameter, _adapted_modules(model)), model.config)
    if target_modules != stored_modules:
        module = min(target_modules ^ stored_modules)
        difference = f"{shown(targets)} and the tensors of {TENSOR_FILE} differ at {module}"
        raise UserError(f"lora.path: {path}: target_modules: {difference}; copy both files again")


def _named(path: Path, key: str, selector: Any, modules: set[str]) -> set[str]:
    """Return the modules that PEFT selects by a regular expression, or by a list of names or name suffixes."""
    if isinstance(selector, str):
        with from_outside(f"lora.path: {path}: {key}", "it must be a regular expression or a list of names"):
            pattern = re.compile(selector)
        return set(filter(pattern.fullmatch, modules))
    if not isinstance(selector, list) or not all(isinstance(name, str) for name in selector):
        raise UserError(f"lora.path: {path}: {key}", selector, "give a list of names")
    return {module for module in modules if any(f".{module}".endswith(f".{name}") for name in selector)}


def _target_modules(config: DecoderConfig, adapted: Sequence[str]) -> list[str]:
    """Return the names by which PEFT finds the ``adapted`` modules: whole names where other names end alike.

    Those others are routers, matrices of experts in files that have one for each, and whatever the parts that are not
    computed here may hold. Elsewhere the last parts of the names suffice.
    """
    family, names = FAMILIES[config.family], list(dict.fromkeys(map(target_name, adapted)))
    rows = layer_projections(config).values()
    others = (family.tensor(f"layers/{row.name}") for row in rows if row.stack or not row.adaptable)
    if family.carried or not {target_name(name.removesuffix(".weight")) for name in others}.isdisjoint(names):
        return [module.format(layer) for layer in range(config.layers) for module in adapted]
    return names


def export_adapters(adapters: Params, model: Model, config: LoraConfig, base: str, out_dir: str | Path) -> None:
    """Export the adapters of ``model``, which ``config`` describes, as a float32 directory that PEFT can load.

    ``base`` becomes ``base_model_name_or_path`` in adapter_config.json.

    Raises:
        UserError: ``out_dir`` is not empty or cannot be written.
    """
    tensors, adapted = _tensors(model), list(_adapted_modules(model))
    module_names = list(filterfalse(is_expert_parameter, adapted))
    parameters = [target_name(module) for module in adapted if is_expert_parameter(module)]
    transposed = FAMILIES[model.config.family].transposed
    options = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.config.scores else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": _target_modules(model.config, module_names),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(f"{module}.weight" in transposed for module in module_names),
        "inference_mode": True,
    }
    if parameters:
        options["target_parameters"] = parameters
    if model.config.scores:
        options["modules_to_save"] = list(_HEADS)
    with export_directory(out_dir, overwrite=False) as (staging, _):
        shapes, dtype = {name: stored.shape for name, stored in tensors.items()}, np.dtype(np.float32)
        write_file(staging / TENSOR_FILE, shapes, dtype, fetch_tensors(adapters, tensors, dtype))
        (staging / CONFIG).write_text(json.dumps(options, indent=2) + "\n")
