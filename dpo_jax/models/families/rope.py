"""Rotary options of ``config.json``: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.errors import shown
from dpo_jax.models.families.family import flag, invalid, number, one_of, size
from dpo_jax.models.families.keys import NEUTRAL_VALUES
from dpo_jax.models.options import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

ORIGINAL, PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"


class RopeOptions:
    """Rotary options of a model, or of one of its types of layers, with the names that they have in the file."""

    def __init__(self, hf: Mapping[str, Any], key: str, values: object):
        if not isinstance(values, dict):
            raise invalid(key, values, "it must be a dictionary")
        self.hf, self.key, self.values = hf, key, values
        self.keyed = {f"{key}.{name}": value for name, value in values.items()}

    def number(self, name: str, default: float | None = None) -> float:
        """Read a positive number."""
        return float(number(self.keyed, f"{self.key}.{name}", default))

    def original(self) -> int:
        """Read the length of the original context."""
        return size(self.keyed, f"{self.key}.{ORIGINAL}", self.hf.get("max_position_embeddings"))


def _linear(options: RopeOptions) -> LinearScaling:
    return LinearScaling(factor=options.number("factor"))


def _llama3(options: RopeOptions) -> Llama3Scaling:
    names = "factor", "low_freq_factor", "high_freq_factor"
    factors = {name: options.number(name) for name in names}
    scaling = Llama3Scaling(**factors, original_max_position_embeddings=options.original())
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise invalid(f"{options.key}.high_freq_factor", scaling.high_freq_factor, "it must exceed low_freq_factor")
    return scaling


def _yarn(options: RopeOptions) -> YarnScaling:
    values = options.values
    factor = options.number("factor")
    mscales = [options.number(name) if values.get(name) else 0.0 for name in ("mscale", "mscale_all_dim")]
    temperature = lambda mscale: 0.1 * mscale * math.log(max(factor, 1)) + 1  # noqa: E731
    attention_factor = temperature(mscales[0]) / temperature(mscales[1]) if all(mscales) else temperature(1)
    if values.get("attention_factor") is not None:
        attention_factor = options.number("attention_factor")
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=options.original(),
        attention_factor=attention_factor,
        beta_fast=options.number("beta_fast") if values.get("beta_fast") else 32.0,
        beta_slow=options.number("beta_slow") if values.get("beta_slow") else 1.0,
        truncate=flag({"truncate": True, **values}, "truncate"),
    )


def _longrope(options: RopeOptions) -> LongropeScaling:
    hf, values = options.hf, options.values
    original = size(hf, ORIGINAL) if hf.get(ORIGINAL) is not None else options.original()
    factors = values.get("short_factor")
    if not isinstance(factors, list) or not all(type(x) in (int, float) and 0 < x < 1e30 for x in factors):
        raise invalid(f"{options.key}.short_factor", factors, "it must be a list of positive numbers")
    if values.get("factor") is not None:
        factor = options.number("factor")
    else:
        factor = size(hf, "max_position_embeddings") / original
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if values.get("attention_factor") is not None:
        attention_factor = options.number("attention_factor")
    return LongropeScaling(
        factors=tuple(map(float, factors)), original_max_position_embeddings=original, attention_factor=attention_factor
    )


def _dynamic(options: RopeOptions) -> DynamicScaling:
    options.number("factor")
    return DynamicScaling(original_max_position_embeddings=size(options.hf, "max_position_embeddings"))


# name -> (reader, the options that it reads)
YARN = {"factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
KINDS: dict[str, tuple[Callable[[RopeOptions], Scaling | None], set[str]]] = {
    "default": (lambda options: None, set()),
    "linear": (_linear, {"factor"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}),
    "yarn": (_yarn, YARN),
    "longrope": (_longrope, {"factor", "short_factor", "long_factor", "attention_factor", ORIGINAL}),
    "dynamic": (_dynamic, {"factor", ORIGINAL}),
}


def _read(options: RopeOptions, default_theta: float, partial: bool = False) -> Rope:
    name = options.values.get("rope_type", options.values.get("type", "default"))
    if not isinstance(name, str) or name not in KINDS:
        raise invalid(options.key, options.values, f"choose the rope scaling from {', '.join(KINDS)}")
    read_scaling, names = KINDS[name]
    for extra in options.values.keys() - {"rope_theta", "rope_type", "type", *names, *[PARTIAL] * partial}:
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
    older, newer = (_read(options, default_theta, partial) if options.values else None for options in spellings)
    if older and newer and older != newer:
        why = f"rope_parameters, {shown(hf['rope_parameters'])}, disagrees; remove the wrong one from the file"
        raise invalid("rope_scaling", hf["rope_scaling"], why)
    return older or newer or Rope(theta=default_theta)


def rotary_dims(hf: Mapping[str, Any], default: float = 1.0, key: str = PARTIAL) -> int | None:
    """Read how many dims of a head rotate, a fraction of ``head_dim``; None if all do. ``key``: of older files."""
    options = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    fraction = (
        number(options, PARTIAL, most=1) if options.get(PARTIAL) is not None else number(hf, key, default, most=1)
    )
    dims = int(hf["head_dim"] * fraction)
    if dims % 2 or dims == 0:
        raise invalid(key, fraction, f"of {hf['head_dim']} dims it must leave an even number")
    return None if dims == hf["head_dim"] else dims


def ropes_by_type(hf: Mapping[str, Any], thetas: Mapping[str, float]) -> dict[str, Rope]:
    """Read the rotary options of each type of layer; ``rope_scaling`` is that of full attention.

    ``thetas``: base of each type where ``rope_parameters`` does not give it.
    """
    given = hf.get("rope_parameters") or {}
    if not isinstance(given, dict) or given.keys() - thetas.keys():
        raise invalid("rope_parameters", given, f"it must have the rotary options of {' and '.join(thetas)}, each")
    ropes = {}
    for layer_type, theta in thetas.items():
        key = f"rope_parameters.{layer_type}"
        options = RopeOptions(hf, key, given.get(layer_type) or {})
        if layer_type == "full_attention" and hf.get("rope_scaling"):
            scaling = RopeOptions(hf, "rope_scaling", hf["rope_scaling"]).values
            options = RopeOptions(hf, key, {**options.values, **scaling})
        ropes[layer_type] = _read(options, theta)
        if "truncate" in options.values and not options.values["truncate"]:
            raise invalid(f"{key}.truncate", False, "transformers rounds in models with several types of layers")
    return ropes
