"""What a family's file is made of: the table that it fills, and the reading of values of its ``config.json``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.options import LayerKind

Pattern = Callable[[Mapping[str, Any], int], tuple[LayerKind, ...]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one ``model_type`` means where its config.json is silent."""

    architecture: str
    keys: frozenset[str] = frozenset()  # of config.json that it has beyond those that all families have
    # the kinds of its layers, of config.json and the number of layers; the default: all are alike, without a window
    pattern: Pattern = lambda hf, layers: (LayerKind(),)
    derived: frozenset[str] = frozenset()  # sizes that follow from the others if null; elsewhere null is refused
    kv_heads: int | None = None  # default; None: as many as query heads
    head_dim: int | None = None  # default; None: hidden / heads
    qkv_bias: bool = False  # always; else attention_bias, if that is one of its keys, says
    qk_norm: bool = False


MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1  # larger numbers are mistakes, and their arrays would fit nowhere


def refuse(key: str, value: object, why: str) -> UserError:
    """The error that names a key of the file, its value and what is wrong with it."""
    return UserError(f"config.json: {key}", value, why)


def one_of(value: object, options: Sequence[object]) -> bool:
    """As ``in``, but also for what is read from a file and cannot be compared or hashed; 1 is not True here."""
    return any(value is option or (type(value) is type(option) and value == option) for option in options)


def number(hf: Mapping[str, Any], key: str, default: float | None = None, most: float = 1e30) -> Any:
    """A positive number; an absent key takes the default."""
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise refuse(key, value, f"a positive number is needed, at most {most:g}")
    return value


def size(hf: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
    """A positive whole number; an absent key takes the default."""
    value = number(hf, key, default, most)
    if not isinstance(value, int):
        raise refuse(key, value, "a whole number is needed")
    return value


def flag(hf: Mapping[str, Any], key: str) -> bool:
    """True or false; an absent key is false."""
    value = hf.get(key, False)
    if not isinstance(value, bool):
        raise refuse(key, value, "true or false is needed")
    return value
