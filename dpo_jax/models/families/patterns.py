"""Patterns of layers: full and sliding attention, from ``layer_types`` and other keys of ``config.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.models.families.family import flag, invalid, size
from dpo_jax.models.families.rope import rope
from dpo_jax.models.options import LayerKind, Rope

FULL, SLIDING = "full_attention", "sliding_attention"


def alike(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """Return the pattern of layers that are all alike, with full attention."""
    return (LayerKind(rope=rope(hf)),)


def shortest(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """Return the shortest pattern whose repetition gives these kinds, one for each layer."""
    period = next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))
    return tuple(kinds[:period])


def full_and_sliding(
    types: Sequence[str], sliding_window: int | None, full: Rope | None, sliding: Rope | None
) -> tuple[LayerKind, ...]:
    """Return the pattern of layers of these types; ``full`` and ``sliding``: their rotary embeddings."""
    kinds = {FULL: LayerKind(rope=full), SLIDING: LayerKind(window=sliding_window, rope=sliding)}
    return shortest([kinds[layer_type] for layer_type in types])


def layer_types(hf: Mapping[str, Any], layers: int, default: Sequence[str]) -> Sequence[str]:
    """Read ``layer_types``: full or sliding attention in each layer; null or missing means ``default``."""
    types = hf.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != layers:
        raise invalid("layer_types", types, f"it must be a list of {layers} names (num_hidden_layers)")
    if any(layer_type not in (FULL, SLIDING) for layer_type in types):
        raise invalid("layer_types", types, f"choose from {FULL} and {SLIDING}")
    return types


def every(period: int, layers: int) -> list[str]:
    """Return the types of layers: every ``period``-th has full attention, the others sliding attention."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def window(hf: Mapping[str, Any], default: int | None) -> int | None:
    """Read ``sliding_window``, in tokens; null means none."""
    if hf.get("sliding_window", default) is None:
        return None
    return size(hf, "sliding_window", default)


def switched_window(hf: Mapping[str, Any], default: int | None) -> int | None:
    """Read ``sliding_window``, in tokens, if ``use_sliding_window`` is true; None otherwise."""
    return window(hf, default) if flag(hf, "use_sliding_window") else None


def windowed_types(
    hf: Mapping[str, Any], layers: int, default: Sequence[str], sliding_window: int | None
) -> Sequence[str]:
    """Read ``layer_types``; sliding attention requires a window."""
    types = layer_types(hf, layers, default)
    if SLIDING in types and sliding_window is None:
        raise invalid("layer_types", types, "sliding attention needs use_sliding_window and a sliding_window")
    return types


def max_window_layers(hf: Mapping[str, Any]) -> int:
    """Read ``max_window_layers``, a number of layers that may be 0."""
    num_layers = hf.get("max_window_layers", 28)
    if type(num_layers) is not int or num_layers < 0:
        raise invalid("max_window_layers", num_layers, "it must be an integer, 0 or more")
    return num_layers
