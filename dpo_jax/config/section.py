"""Base class of config sections, which checks the range declared with each field and reports errors in one line."""

import json
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import reduce
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args

from dpo_jax.errors import UserError, must_be

Value = TypeVar("Value")

BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {  # name -> words, check of (number, bound)
    "above": ("above", operator.gt),
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
    "multiple_of": ("a multiple of", lambda number, unit: number % unit == 0),
}


class Range:
    """Range of the numbers that satisfy all given ``BOUNDS``, plus the single value ``special``."""

    def __init__(self, special: int | None = None, **bounds: float):
        self.special, self.bounds = special, [(*BOUNDS[name], bound) for name, bound in bounds.items()]

    def __contains__(self, number: float) -> bool:
        return number == self.special or all(check(number, bound) for _, check, bound in self.bounds)

    def __str__(self) -> str:
        bounds_text = " and ".join(f"{words} {bound}" for words, _, bound in self.bounds).replace("above 0", "positive")
        return bounds_text if self.special is None else f"{self.special} or {bounds_text}"


def ranged(default: Value, special: int | None = None, **bounds: float) -> Value:
    """Return a dataclass field with a default and a `Range` for its number, or for each number in a list."""
    return field(default=default, metadata={"range": Range(special, **bounds)})  # type: ignore[bad-return]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of config sections; each subclass sets its dotted name (none for a whole config or an entry of a list).

    Raises:
        UserError: a number is not finite or out of range; names the option in full, except for an entry of a list.
    """

    section: ClassVar[str] = ""

    def __init_subclass__(cls, name: str | None = None):
        cls.section = cls.section if name is None else name

    def __post_init__(self):
        for option in fields(self):
            value, allowed_range = getattr(self, option.name), option.metadata.get("range")
            if isinstance(value, list):  # given in Python; sections are hashable
                value = tuple(value)
                object.__setattr__(self, option.name, value)
            null_prefix = "null or " if NoneType in get_args(option.type) else ""
            for index, entry in enumerate(value) if isinstance(value, tuple) else [("", value)]:
                name = self._dotted(option.name, str(index))
                if isinstance(entry, float) and not math.isfinite(entry):
                    raise must_be(name, "finite", entry)
                if isinstance(entry, int) and entry.bit_length() > 63:
                    raise must_be(name, "a 64-bit integer", entry)
                if allowed_range is not None and isinstance(entry, int | float) and entry not in allowed_range:
                    raise must_be(name, f"{null_prefix}{allowed_range}", entry)

    def refuse(self, option: str, condition: object, remedy: str) -> None:
        """Raise ``UserError`` for an option, named relative to this section, if ``condition`` holds."""
        if condition:
            raise UserError(self._dotted(option), reduce(getattr, option.split("."), self), remedy)

    def refuse_idle(self, option: str, condition: object, reason: str) -> None:
        """Raise ``UserError`` if an option is not at its default and has no effect because ``condition`` holds."""
        *path, name = option.split(".")
        owner: Any = reduce(getattr, path, self)
        default = getattr(type(owner), name)
        remedy = "leave it out" if default is None or isinstance(default, tuple) else f"leave it at {as_yaml(default)}"
        self.refuse(option, condition and getattr(owner, name) != default, f"{reason}; {remedy}")

    def _dotted(self, *names: str) -> str:
        return ".".join(filter(None, (self.section, *names)))


def as_yaml(value: Any) -> str:
    """Return a default value as YAML text."""
    return value if isinstance(value, str) else json.dumps(value)
