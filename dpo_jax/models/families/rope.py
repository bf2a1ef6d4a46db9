"""Rotary options of ``config.json``: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.errors import shown
from dpo_jax.models.families.family import invalid, number, one_of
from dpo_jax.models.families.keys import NEUTRAL_VALUES
from dpo_jax.models.families.scalings import KINDS, RopeOptions
from dpo_jax.models.options import Rope

PARTIAL_KEY = "partial_rotary_factor"


def _read(options: RopeOptions, default_theta: float, partial: bool = False) -> Rope:
    name = options.values.get("rope_type", options.values.get("type", "default"))
    if not isinstance(name, str) or name not in KINDS:
        raise invalid(options.key, options.values, f"choose the rope scaling from {', '.join(KINDS)}")
    read_scaling, names = KINDS[name]
    for extra in options.values.keys() - {"rope_theta", "rope_type", "type", *names, *[PARTIAL_KEY] * partial}:
        value = options.values[extra]
        if not one_of(value, NEUTRAL_VALUES.get(extra, (None,))):
            raise invalid(f"{options.key}.{extra}", value, f"rope scaling {name} has no such option; remove it")
    return Rope(theta=options.number("rope_theta", default_theta), scaling=read_scaling(options))


def rope(hf: Mapping[str, Any], theta: str = "rope_theta", partial: bool = False) -> Rope:
    """Read the rotary options of all layers.

    Two spellings must agree: transformers uses only the older one, base included, and other programs the newer.
    ``theta``: key of the base; ``partial``: the options may say how many dims of a head rotate.
    """
    default_theta = float(number(hf, theta, 10_000.0))
    spellings = (
        RopeOptions(hf, key, {} if hf.get(key) is None else hf[key]) for key in ("rope_scaling", "rope_parameters")
    )
    old_rope, new_rope = (_read(options, default_theta, partial) if options.values else None for options in spellings)
    if old_rope and new_rope and old_rope != new_rope:
        conflict = f"rope_parameters, {shown(hf['rope_parameters'])}, differs; remove the wrong one from the file"
        raise invalid("rope_scaling", hf["rope_scaling"], conflict)
    return old_rope or new_rope or Rope(theta=default_theta)


def rotary_dims(hf: Mapping[str, Any], default: float = 1.0, key: str = PARTIAL_KEY) -> int | None:
    """Read how many dims of a head rotate, None if all, from their fraction, which old files give as ``key``."""
    options = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    fraction = (
        number(options, PARTIAL_KEY, most=1) if options.get(PARTIAL_KEY) is not None else number(hf, key, default, 1)
    )
    dims = int(hf["head_dim"] * fraction)
    if dims % 2 or dims == 0:
        raise invalid(key, fraction, f"of a head's {hf['head_dim']} dims, an even number must rotate, at least 2")
    return None if dims == hf["head_dim"] else dims


def ropes_by_type(hf: Mapping[str, Any], thetas: Mapping[str, float]) -> dict[str, Rope]:
    """Read the rotary options of each layer type; ``rope_scaling`` is that of full attention.

    ``thetas``: base of each type where ``rope_parameters`` does not give it.
    """
    options_by_type = hf.get("rope_parameters") or {}
    if not isinstance(options_by_type, dict) or options_by_type.keys() - thetas.keys():
        raise invalid("rope_parameters", options_by_type, f"it must map {' and '.join(thetas)} to their rotary options")
    ropes = {}
    for layer_type, theta in thetas.items():
        key = f"rope_parameters.{layer_type}"
        options = RopeOptions(hf, key, options_by_type.get(layer_type) or {})
        if layer_type == "full_attention" and hf.get("rope_scaling"):
            scaling = RopeOptions(hf, "rope_scaling", hf["rope_scaling"]).values
            options = RopeOptions(hf, key, {**options.values, **scaling})
        ropes[layer_type] = _read(options, theta)
        if "truncate" in options.values and not options.values["truncate"]:
            raise invalid(f"{key}.truncate", False, "transformers ignores it with several layer types; remove it")
    return ropes
