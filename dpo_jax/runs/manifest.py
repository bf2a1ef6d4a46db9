"""The manifest of a checkpoint, and the rules by which differences between manifests prevent a run from resuming.

Plain data, without jax. A manifest is a dictionary of JSON values:

    format      version of this layout
    config      the resolved options
    identity    contents of what the options point to: the store's key, hashes of weights, tokenizer, template, ...
    place       versions, XLA flags, devices, processes: results are bit-identical only if these are the same
    step, leaves, metrics       written by checkpoint.py: the step, its arrays with their checksums, its evaluation
    offsets, extras             lengths and checksums of the logs, counters of the trainer
"""

import json
import os
from collections.abc import Mapping
from types import NoneType
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.parallel.versions import installed_version
from dpo_jax.storage import check_entries, check_fields

# Since 2 a manifest is sealed, since 3 the state holds a reference that follows the policy, since 4 a decoder has kinds
# of layers, since 5 the logs have checksums.
FORMAT = 5
FIELDS = {
    "config": dict,
    "identity": dict,
    "place": dict,
    "step": int,
    "leaves": dict,
    "metrics": (dict, NoneType),
    "offsets": dict,
    "extras": dict,
}
LEAF_FIELDS = {"shape": list, "dtype": str, "checksum": int}  # of each entry of leaves
OFFSET_FIELDS = {"size": int, "digest": str}  # of each entry of offsets
PACKAGES = ("dpo-jax", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")

# How a changed option is handled when a run resumes, by the longest matching prefix. Without a match, it is refused.
#   free       does not affect the arithmetic
#   rounding   changes results within the layout tolerance: allowed with a notice, so that other hardware can resume
#   NAME       points to something that is compared through identity NAME: a moved directory is the same model, and
#              changed contents are refused under that name
#   length     see _length_matters
#   sampling   refused if answers are sampled to train on or as output, else free: it affects run.samples alone
_OPTIONS = {
    "weights": "model.path model.revision model.checkpoint",
    "tokenizer": "model.tokenizer",
    "adapters": "lora.path",
    "reference": "reference.path",
    "eval_reward": "eval.reward",
    "store": "data.train data.template_date",
    "prompts": "prompts",
    "reward": "reward data.online.reward",
    "template": "data.chat_template",
    "length": "run.steps run.epochs",
    "sampling": "sampling",
    "rounding": "model.attention model.remat model.scan reference.mode batch.row_length batch.accumulation "
    "batch.target_chunk batch.layout batch.size mesh run.compiler_flags",
    "free": "data.eval eval data.store data.workers run.dir run.log_every run.eval_every run.samples run.token_stats "
    "run.export run.report run.trackers run.progress run.profile_steps checkpoint pairs",
}
EFFECTS = {option: effect for effect, options in _OPTIONS.items() for option in options.split()}
# Mixing weights of data sets always matter, as the store's key does not include them.
ALWAYS_MATTERS = ("weight",)


def make_manifest(config: Mapping[str, Any], identity: Mapping[str, Any], environment: Mapping[str, Any]) -> dict:
    """Build the part of a manifest that stays the same for the whole run.

    Args:
        config: the resolved options, as nested dictionaries.
        identity: hashes under the names used in ``EFFECTS``: weights, adapters, tokenizer, template, reference, store.
            Additional entries, such as the compute dtype that ``auto`` chose, are compared too.
        environment: devices, processes and the like; versions and XLA flags are added.
    """
    versions = {name: installed_version(name) for name in PACKAGES}
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    environment = {**environment, **flags, **versions}
    return json.loads(json.dumps({"format": FORMAT, "config": config, "identity": identity, "place": environment}))


def check_shape(manifest: Mapping[str, Any]) -> None:
    """Check that the manifest of a step has every field, of its type.

    Raises:
        ValueError: it does not.
    """
    check_fields(manifest, FIELDS)
    check_entries(manifest["leaves"], LEAF_FIELDS)
    check_entries(manifest["offsets"], OFFSET_FIELDS)


def compare_manifest(old: Mapping, new: Mapping) -> list[str]:
    """Return the differences that change the result and so prevent resuming, each as ``field: was X, now Y``."""
    return [line for line, effect in _differences(old, new) if effect == "matters"]


def rounding_changes(old: Mapping, new: Mapping) -> list[str]:
    """Return the differences that let a run resume but make its results equal only within rounding."""
    lines = [line for line, effect in _differences(old, new) if effect == "rounding"]
    return lines + [_line(*change) for change in _changed(old["place"], new["place"])]


def refuse_changed(old: Mapping, new: Mapping, where: str) -> None:
    """Raise a `UserError` that lists each difference from the checkpoint's manifest that changes the result.

    ``where``: the run directory, for the message. A checkpoint of another manifest format is refused too.
    """
    if old["format"] != new["format"]:
        mismatch = f"was written in checkpoint format {old['format']}, but this version reads {new['format']}"
        raise UserError(f"run.dir: {where} {mismatch}: use the version that wrote it")
    lines = compare_manifest(old, new)
    if lines:
        length_changed = any(line.startswith(("run.steps:", "run.epochs:")) for line in lines)
        hint = " (run.steps may change only with optimizer.schedule constant)" if length_changed else ""
        remedy = f"restore these, or choose a new run.dir{hint}"
        summary = f"run.dir: {where} was started with different options that change the result"
        raise UserError(f"{summary}: {'; '.join(lines)}: {remedy}")


def new_run(config: Mapping[str, Any], root: str, keeps_reference: bool) -> str:
    """Return the command-line options with which a new run starts from an old run's newest step.

    ``config``: the old run's resolved options; those not returned may be changed. ``keeps_reference``: add the old
    reference; otherwise the new run's start would become the reference.
    """
    model, options = config["model"], f"--run.dir NEW --model.path {root}"
    if keeps_reference:
        reference = config["reference"]["path"]
        is_pinned = reference is None and (model["revision"] is not None or model["checkpoint"] != "newest")
        placeholder = f"A_COPY_OF_{model['path']}_AT_{model['revision'] or model['checkpoint']}"
        options += f" --reference.path {placeholder if is_pinned else reference or model['path']}"
    defaults = {("model", "revision"): None, ("model", "checkpoint"): "newest", ("lora", "path"): None}
    for (section, name), default in defaults.items():
        if config[section][name] != default:
            options += f" --{section}.{name} {default or 'null'}"
    return options


def _differences(old: Mapping, new: Mapping) -> list[tuple[str, str]]:
    """Return a line for each changed identity and option, with its effect: matters, rounding or free."""
    identities = _changed(old["identity"], new["identity"])
    changed_names = {name for name, _, _ in identities}
    differences = [(_line(*identity), "matters") for identity in identities]
    for name, old_value, new_value in _changed(old["config"], new["config"]):
        effect = _effect(name)
        if effect == "length":  # row shapes are chosen from the run's own steps
            effect = "matters" if _length_matters(old["config"], new["config"]) else "rounding"
        elif effect == "sampling":
            effect = "matters" if "ends" in new["identity"] else "free"
        elif effect not in ("free", "rounding", "matters"):
            is_recorded = new["identity"].get(effect) is not None and old["identity"].get(effect) is not None
            effect = "free" if is_recorded and effect not in changed_names else "matters"
        differences.append((_line(name, old_value, new_value), effect))
    return differences


def _effect(name: str) -> str:
    if name.rpartition(".")[2] in ALWAYS_MATTERS:
        return "matters"
    prefixes = [prefix for prefix in EFFECTS if name == prefix or name.startswith(prefix + ".")]
    return EFFECTS[max(prefixes, key=len)] if prefixes else "matters"


def _length_matters(old: Mapping, new: Mapping) -> bool:
    """Return whether changing the length of the run changes its steps.

    Schedules other than constant depend on the length, and the last step of a run given in epochs may have padding
    where a longer run has examples.
    """
    in_steps = old["run"]["steps"] is not None and new["run"]["steps"] is not None
    return not in_steps or new["optimizer"]["schedule"] != "constant"


def _changed(old: Mapping, new: Mapping) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, old value, new value) for every difference, with None for a missing value."""
    old, new = _flat(old), _flat(new)
    return [(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            leaves.update(_flat(dict(enumerate(value)), f"{prefix}{name}."))
        elif isinstance(value, Mapping):
            leaves.update(_flat(value, f"{prefix}{name}."))
        else:
            leaves[prefix + str(name)] = value
    return leaves


def _line(name: str, old: Any, new: Any) -> str:
    return f"{name}: was {json.dumps(old)}, now {json.dumps(new)}"
