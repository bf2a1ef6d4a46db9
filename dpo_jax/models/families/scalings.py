"""Readers of rotary scalings in ``config.json``, by the names that the file gives them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.models.families.family import flag, invalid, number, size
from dpo_jax.models.options import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    Scaling,
    YarnScaling,
)

ORIGINAL = "original_max_position_embeddings"


class RopeOptions:
    """Rotary options of a model, or of one of its layer types, under the names that the file gives them."""

    def __init__(self, hf: Mapping[str, Any], key: str, values: object):
        if not isinstance(values, dict):
            raise invalid(key, values, "it must be a dictionary")
        self.hf, self.key, self.values = hf, key, values
        self.keyed = {f"{key}.{name}": value for name, value in values.items()}

    def number(self, name: str, default: float | None = None) -> float:
        """Read the option ``name``, a positive number."""
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
    context = size(hf, ORIGINAL) if hf.get(ORIGINAL) is not None else options.original()
    if context < 2:
        raise invalid(f"{options.key}.{ORIGINAL}", context, "it must be at least 2")
    factors = values.get("short_factor")
    if not isinstance(factors, list) or not all(type(x) in (int, float) and 0 < x < 1e30 for x in factors):
        raise invalid(f"{options.key}.short_factor", factors, "it must be a list of positive numbers")
    if values.get("factor") is not None:
        factor = options.number("factor")
    else:
        factor = size(hf, "max_position_embeddings") / context
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    if values.get("attention_factor") is not None:
        attention_factor = options.number("attention_factor")
    return LongropeScaling(
        factors=tuple(map(float, factors)), original_max_position_embeddings=context, attention_factor=attention_factor
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
