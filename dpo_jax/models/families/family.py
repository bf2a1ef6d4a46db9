"""What a family's file says of its ``model_type``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.models.options import LayerKind

Pattern = Callable[[Mapping[str, Any], int], tuple[LayerKind, ...]]


def alike(hf: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    """The pattern of layers that are all the same and have no window."""
    return (LayerKind(),)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one ``model_type`` means where its config.json is silent."""

    architecture: str
    keys: frozenset[str] = frozenset()  # of config.json that it has beyond those that all families have
    pattern: Pattern = alike  # the kinds of its layers, of config.json and the number of layers
    derived: frozenset[str] = frozenset()  # sizes that follow from the others if null; elsewhere null is refused
    kv_heads: int | None = None  # default; None: as many as query heads
    head_dim: int | None = None  # default; None: hidden / heads
    qkv_bias: bool = False  # always; else attention_bias, if that is one of its keys, says
    qk_norm: bool = False
