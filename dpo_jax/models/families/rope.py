"""Rotary options of ``config.json``: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dpo_jax.errors import shown
from dpo_jax.models.families.family import invalid, number, one_of, size
from dpo_jax.models.families.keys import NEUTRAL_VALUES
from dpo_jax.models.options import LinearScaling, Llama3Scaling

Scaling = LinearScaling | Llama3Scaling | None
KINDS = {"default": None, "linear": LinearScaling, "llama3": Llama3Scaling}


def rope(hf: Mapping[str, Any]) -> tuple[float, Scaling]:
    """Read the rotary base and scaling.

    Two spellings must agree: transformers uses only the older one, base included, and other programs the newer.
    """
    older_rope, newer_rope = (_read(hf, key) for key in ("rope_scaling", "rope_parameters"))
    if older_rope and newer_rope and older_rope != newer_rope:
        why = f"rope_parameters, {shown(hf['rope_parameters'])}, disagrees; remove the wrong one from the file"
        raise invalid("rope_scaling", hf["rope_scaling"], why)
    return older_rope or newer_rope or (float(number(hf, "rope_theta", 10000.0)), None)


def _read(hf: Mapping[str, Any], key: str) -> tuple[float, Scaling] | None:
    """Read base and scaling from one of the two keys; None if it is missing or empty."""
    options = hf.get(key)
    if options is not None and not isinstance(options, dict):
        raise invalid(key, options, "it must be a dictionary")
    if not options:
        return None
    keyed_options = {f"{key}.{name}": value for name, value in options.items()}
    theta = float(number(keyed_options, f"{key}.rope_theta", number(hf, "rope_theta", 10000.0)))
    name = options.get("rope_type", options.get("type", "default"))
    if not isinstance(name, str) or name not in KINDS:
        raise invalid(key, options, f"choose the rope scaling from {', '.join(KINDS)}")
    kind = KINDS[name]
    names = [] if kind is None else [field.name for field in fields(kind)]
    for extra in options.keys() - {"rope_theta", "rope_type", "type", *names}:
        if not one_of(options[extra], NEUTRAL_VALUES.get(extra, (None,))):
            raise invalid(f"{key}.{extra}", options[extra], f"rope scaling {name} has no such option; remove it")
    if kind is None:
        return theta, None

    def value(name: str) -> Any:
        if name == "original_max_position_embeddings":
            return size(keyed_options, f"{key}.{name}", hf.get("max_position_embeddings"))
        return float(number(keyed_options, f"{key}.{name}"))

    scaling = kind(**{name: value(name) for name in names})
    if isinstance(scaling, Llama3Scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise invalid(f"{key}.high_freq_factor", scaling.high_freq_factor, "it must exceed low_freq_factor")
    return theta, scaling
