"""What every section of a config has: ranges next to its fields, and one line for each value that is refused."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args

from dpo_jax.errors import UserError, must_be

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field may hold; None: no bound."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    also: int | None = None  # one number outside the bounds

    def __contains__(self, number: float) -> bool:
        return number == self.also or (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
            and (self.multiple_of is None or number % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        bounds = {name.replace("_", " "): bound for name, bound in asdict(self).items() if bound is not None}
        also = f"{bounds.pop('also')} or " if "also" in bounds else ""
        text = " and ".join(f"{words} {bound}" for words, bound in bounds.items())
        return also + text.replace("above 0", "positive").replace("multiple", "a multiple")


def ranged(default: Value, **bounds: float) -> Value:
    """A field with a default and the bounds of a `Range`, which hold for its numbers, also inside a list."""
    return field(default=default, metadata={"range": Range(**bounds)})  # type: ignore[bad-return, bad-argument-type]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section, or a whole config; made only of values that pass its checks."""

    section: ClassVar[str] = ""  # its dotted name; of a whole config and of entries of a list: ""

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
