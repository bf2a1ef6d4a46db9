"""Base class of config sections: ranges declared next to the fields, and a one-line error for each invalid value."""

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


BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {  # name -> words, test of (number, bound)
    "above": ("above", operator.gt),
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
    "multiple_of": ("a multiple of", lambda number, unit: number % unit == 0),
}


class Range:
    """Numbers that satisfy all given ``BOUNDS``, plus the single value ``also``."""

    def __init__(self, also: int | None = None, **bounds: float):
        self.also, self.bounds = also, [(*BOUNDS[name], bound) for name, bound in bounds.items()]

    def __contains__(self, number: float) -> bool:
        return number == self.also or all(keeps(number, bound) for _, keeps, bound in self.bounds)

    def __str__(self) -> str:
        text = " and ".join(f"{words} {bound}" for words, _, bound in self.bounds).replace("above 0", "positive")
        return text if self.also is None else f"{self.also} or {text}"


def ranged(default: Value, also: int | None = None, **bounds: float) -> Value:
    """Return a dataclass field with a default and a `Range` that applies to its number, or to each one in a list."""
    return field(default=default, metadata={"range": Range(also, **bounds)})  # type: ignore[bad-return]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of config sections; the subclass sets the dotted name (none for a whole config or an entry of a list).

    Raises:
        UserError: a number is not finite or out of range; names the option in full, except for an entry of a list.
    """

    section: ClassVar[str] = ""

    def __init_subclass__(cls, name: str | None = None):
        cls.section = cls.section if name is None else name

    def __post_init__(self):
        for option in fields(self):
            value, allowed = getattr(self, option.name), option.metadata.get("range")
            null_prefix = "null or " if NoneType in get_args(option.type) else ""
            for index, entry in enumerate(value) if isinstance(value, tuple) else [("", value)]:
                name = self._dotted(option.name, str(index))
                if isinstance(entry, float) and not math.isfinite(entry):
                    raise must_be(name, "finite", entry)
                if isinstance(entry, int) and entry.bit_length() > 63:
                    raise must_be(name, "a 64-bit integer", entry)
                if allowed is not None and isinstance(entry, int | float) and entry not in allowed:
                    raise must_be(name, f"{null_prefix}{allowed}", entry)

    def refuse(self, option: str, when: object, remedy: str) -> None:
        """Raise ``UserError`` for an option, named relative to this section, if ``when`` holds."""
        if when:
            raise UserError(self._dotted(option), reduce(getattr, option.split("."), self), remedy)

    def refuse_idle(self, option: str, when: object, why: str) -> None:
        """Refuse every value of an option but its default if ``when`` holds, because it would have no effect."""
        *path, name = option.split(".")
        owner: Any = reduce(getattr, path, self)
        default = getattr(type(owner), name)
        remedy = "leave it out" if default is None or isinstance(default, tuple) else f"leave it at {written(default)}"
        self.refuse(option, when and getattr(owner, name) != default, f"{why}; {remedy}")

    def _dotted(self, *names: str) -> str:
        return ".".join(filter(None, (self.section, *names)))


def written(value: Any) -> str:
    """Return a default value as YAML text."""
    return value if isinstance(value, str) else json.dumps(value)
