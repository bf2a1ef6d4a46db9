"""What a checkpoint says about the run that wrote it, and which differences to the run that reads it matter.

Plain data, without jax. A manifest is a dictionary of JSON values:

    format      version of this layout
    config      the resolved options
    identity    what the options only point to, by name: the store's key, hashes of weights, tokenizer, template, ...
    place       versions, XLA flags, devices, processes: the same bits come back only where these are the same
    step, leaves, metrics       written by checkpoint.py: the step, its arrays with their checksums, its evaluation
    offsets, extras             lengths of the logs, counters of the trainer
"""

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError

FORMAT = 3  # since 2 a manifest is sealed, since 3 the state holds a reference that follows the policy
PACKAGES = ("dpo-jax", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")

# How a changed option is handled when a run resumes. The longest prefix that fits decides; no prefix: it matters.
#   free       the arithmetic does not see it
#   rounding   equal within the layout tolerance: allowed, so that a run can resume on other hardware, but mentioned
#   NAME       it points to something that identity NAME stands for: a moved directory is the same model, and a
#              changed one is refused under that name
#   length     see _length_matters
EFFECTS = {
    "model.path": "weights",
    "model.revision": "weights",
    "model.checkpoint": "weights",
    "model.tokenizer": "tokenizer",
    "model.attention": "rounding",
    "model.remat": "rounding",
    "model.scan": "rounding",
    "lora.path": "adapters",
    "reference.path": "reference",
    "reference.mode": "rounding",
    "data.train": "store",
    "data.chat_template": "template",
    "data.template_date": "store",
    "data.eval": "free",  # what is measured, not what is learned
    "data.store": "free",
    "data.workers": "free",
    "batch.row_length": "rounding",
    "batch.accumulation": "rounding",
    "batch.target_chunk": "rounding",
    "batch.layout": "rounding",
    "mesh": "rounding",
    "run.dir": "free",
    "run.steps": "length",
    "run.epochs": "length",
    "run.log_every": "free",
    "run.eval_every": "free",
    "run.token_stats": "free",
    "run.export": "free",
    "run.report": "free",
    "run.trackers": "free",
    "run.progress": "free",
    "run.profile_steps": "free",
    "run.compiler_flags": "rounding",
    "checkpoint": "free",
}
# The order in which sets are mixed is no part of the store.
MATTERS = ("weight",)


def make_manifest(config: Mapping[str, Any], identity: Mapping[str, Any], environment: Mapping[str, Any]) -> dict:
    """The part of a manifest that stays the same for a whole run.

    Args:
        config: the resolved options, as nested dictionaries.
        identity: names and hashes, with the names of ``EFFECTS``: weights, adapters, tokenizer, template, reference,
            store; more may be given, such as the compute dtype that ``auto`` chose, and are compared too.
        environment: devices, processes and the like; versions and XLA flags are added.
    """
    versions = {name: _version(name) for name in PACKAGES}
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    place = {**environment, **flags, **versions}
    return json.loads(json.dumps({"format": FORMAT, "config": config, "identity": identity, "place": place}))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source checkout
        return None


def compare_manifest(old: Mapping, new: Mapping) -> list[str]:
    """Differences that change the result, so that the run cannot resume. Each as ``field: was X, now Y``."""
    return [line for line, effect in _differences(old, new) if effect == "matters"]


def rounding_changes(old: Mapping, new: Mapping) -> list[str]:
    """Differences after which the run resumes within rounding, but no longer bit for bit."""
    lines = [line for line, effect in _differences(old, new) if effect == "rounding"]
    return lines + [_line(name, a, b) for name, a, b in _changed(old["place"], new["place"])]


def refuse_changed(old: Mapping, new: Mapping, where: str) -> None:
    """Raise one line with every difference that matters.

    Args:
        old: manifest of the checkpoint.
        new: manifest of this run.
        where: the run directory, for the message.

    Raises:
        UserError: there are such differences, or the checkpoint's layout is of another version.
    """
    if old["format"] != new["format"]:
        differs = f"was written in checkpoint format {old['format']}, this version reads {new['format']}"
        raise UserError(f"run.dir: {where} {differs}: use the version that wrote it")
    lines = compare_manifest(old, new)
    if lines:
        length = any(line.startswith(("run.steps:", "run.epochs:")) for line in lines)
        longer = " (only run.steps with optimizer.schedule constant may change: others spread over the length)" * length
        remedy = f"restore these, or choose a new run.dir{longer}"
        started = f"run.dir: {where} was started with different options that change the result"
        raise UserError(f"{started}: {'; '.join(lines)}: {remedy}")


def new_run(config: Mapping[str, Any], root: Path, keeps_reference: bool) -> str:
    """Command-line options of a new run that starts from the newest save of a run; all its other options are free.

    Args:
        config: its resolved options, as in the manifest.
        root: its directory.
        keeps_reference: name the old reference too; without a name the new start would be the reference.
    """
    model, options = config["model"], f"--run.dir NEW --model.path {root}"
    if keeps_reference:
        reference = config["reference"]["path"]
        pinned = reference is None and (model["revision"] is not None or model["checkpoint"] != "newest")
        copy = f"A_COPY_OF_{model['path']}_AT_{model['revision'] or model['checkpoint']}"
        options += f" --reference.path {copy if pinned else reference or model['path']}"
    of_the_start = {("model", "revision"): None, ("model", "checkpoint"): "newest", ("lora", "path"): None}
    for (section, name), plain in of_the_start.items():
        if config[section][name] != plain:
            options += f" --{section}.{name} {plain or 'null'}"
    return options


def _differences(old: Mapping, new: Mapping) -> list[tuple[str, str]]:
    """Changed identities and options with their effects: matters, rounding or free."""
    identities = _changed(old["identity"], new["identity"])
    changed = {name for name, _, _ in identities}
    differences = [(_line(*identity), "matters") for identity in identities]
    for name, a, b in _changed(old["config"], new["config"]):
        effect = _effect(name)
        if effect == "length":  # row shapes are chosen from the run's own steps
            effect = "matters" if _length_matters(old["config"], new["config"]) else "rounding"
        elif effect not in ("free", "rounding", "matters"):
            recorded = new["identity"].get(effect) is not None and old["identity"].get(effect) is not None
            effect = "free" if recorded and effect not in changed else "matters"
        differences.append((_line(name, a, b), effect))
    return differences


def _effect(name: str) -> str:
    if name.rpartition(".")[2] in MATTERS:
        return "matters"
    fits = [prefix for prefix in EFFECTS if name == prefix or name.startswith(prefix + ".")]
    return EFFECTS[max(fits, key=len)] if fits else "matters"


def _length_matters(old: Mapping, new: Mapping) -> bool:
    """Whether another length of the run changes its steps.

    Schedules other than constant spread over the whole length, and a run counted in epochs may end in a step with
    empty slots, which a longer one would have filled.
    """
    counted = old["run"]["steps"] is not None and new["run"]["steps"] is not None
    return not counted or new["optimizer"]["schedule"] != "constant"


def _changed(old: Mapping, new: Mapping) -> list[tuple[str, Any, Any]]:
    """Dotted names whose values differ; a name that one side lacks has the value None there."""
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
