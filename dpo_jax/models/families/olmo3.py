"""OLMo 3: OLMo 2 with a sliding window in three of four layers; only the fourth uses rotary scaling."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.models.families import olmo2
from dpo_jax.models.families.family import Family, invalid
from dpo_jax.models.families.patterns import FULL, SLIDING, every, full_and_sliding, layer_types, window
from dpo_jax.models.families.rope import ropes_by_type
from dpo_jax.models.options import LayerKind

THETA = 500_000.0


def pattern(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the pattern of three layers with a window and one without, unless ``layer_types`` says otherwise."""
    if hf.get("rope_theta", THETA) != THETA:  # transformers would use it in one type of layers only
        raise invalid("rope_theta", hf["rope_theta"], "give it for each layer type, in rope_parameters")
    ropes = ropes_by_type(hf, {FULL: THETA, SLIDING: THETA})
    types = layer_types(hf, layers, every(4, layers))
    return full_and_sliding(types, window(hf, 4096), ropes[FULL], ropes[SLIDING])


FAMILY = Family(
    architecture="Olmo3ForCausalLM",
    keys=olmo2.FAMILY.keys | {"sliding_window", "layer_types"},
    defaults=olmo2.FAMILY.defaults,
    derived=olmo2.FAMILY.derived,
    pattern=pattern,
    options=olmo2.FAMILY.options,
    tensors=olmo2.TENSORS,
)
