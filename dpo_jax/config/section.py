"""What every section of a config has: ranges next to its fields, and one line for each value that is refused."""

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


BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {  # words, and whether a number keeps the bound
    "above": ("above", operator.gt),
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
    "multiple_of": ("a multiple of", lambda number, unit: number % unit == 0),
}


class Range:
    """The numbers that keep all of some ``BOUNDS``, and ``also`` one other."""

    def __init__(self, also: int | None = None, **bounds: float):
        self.also, self.bounds = also, [(*BOUNDS[name], bound) for name, bound in bounds.items()]

    def __contains__(self, number: float) -> bool:
        return number == self.also or all(keeps(number, bound) for _, keeps, bound in self.bounds)

    def __str__(self) -> str:
        text = " and ".join(f"{words} {bound}" for words, _, bound in self.bounds).replace("above 0", "positive")
        return text if self.also is None else f"{self.also} or {text}"


def ranged(default: Value, also: int | None = None, **bounds: float) -> Value:
    """A field with a default and the bounds of a `Range`, which hold for its numbers, also inside a list."""
    return field(default=default, metadata={"range": Range(also, **bounds)})  # type: ignore[bad-return]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section, whose class gives its dotted name; without a name, a whole config or an entry of a list.

    Raises:
        UserError: a number is not finite or out of its range; named in full, but for an entry of a list.
    """

    section: ClassVar[str] = ""

    def __init_subclass__(cls, name: str | None = None):
        cls.section = cls.section if name is None else name

    def __post_init__(self):
        for option in fields(self):
            value, allowed = getattr(self, option.name), option.metadata.get("range")
            null = "null or " if NoneType in get_args(option.type) else ""
            for index, entry in enumerate(value) if isinstance(value, tuple) else [("", value)]:
                name = self._dotted(option.name, str(index))
                if isinstance(entry, float) and not math.isfinite(entry):
                    raise must_be(name, "finite", entry)
                if isinstance(entry, int) and entry.bit_length() > 63:
                    raise must_be(name, "a 64-bit integer", entry)
                if allowed is not None and isinstance(entry, int | float) and entry not in allowed:
                    raise must_be(name, f"{null}{allowed}", entry)

    def refuse(self, option: str, when: object, remedy: str) -> None:
        """Refuse the value of an option, named from this section on, if ``when``."""
        if when:
            raise UserError(self._dotted(option), reduce(getattr, option.split("."), self), remedy)

    def refuse_idle(self, option: str, when: object, why: str) -> None:
        """Refuse any value of an option but its default if ``when``: it would have no effect."""
        *path, name = option.split(".")
        owner: Any = reduce(getattr, path, self)
        default = getattr(type(owner), name)
        remedy = "leave it out" if default is None or isinstance(default, tuple) else f"leave it at {written(default)}"
        self.refuse(option, when and getattr(owner, name) != default, f"{why}; {remedy}")

    def _dotted(self, *names: str) -> str:
        return ".".join(filter(None, (self.section, *names)))


def written(value: Any) -> str:
    """A default as in YAML."""
    return value if isinstance(value, str) else json.dumps(value)
