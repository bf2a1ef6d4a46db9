"""Building blocks of model families: the `Family` class, and readers for values of ``config.json``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_jax.errors import UserError
from dpo_jax.models.options import LayerKind
from dpo_jax.models.projections import TENSORS


@dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type``: the keys of its ``config.json``, their defaults, and what the decoder computes."""

    architecture: str
    reward: str | None = ""  # class of its reward models; empty: named after ``architecture``; None: there is none
    names: Mapping[str, str] = field(default_factory=dict)  # shared keys of config.json that have other names
    unused: frozenset[str] = frozenset()  # shared keys that transformers ignores in models of this type
    wraps: str | None = None  # key with the config.json of a text model, of which this one adds other parts
    keys: frozenset[str] = frozenset()  # additional keys of config.json, beyond those shared by all families
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys, as in transformers
    derived: frozenset[str] = frozenset()  # sizes derived from others if null; null is refused for all other sizes
    pattern: Callable[[Mapping[str, Any], int], tuple[LayerKind, ...]]  # (config.json, number of layers) -> layer kinds
    options: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: {}  # other fields of `DecoderConfig`
    tensors: Mapping[str, str] = field(default_factory=dict)  # parameters named otherwise than in `projections.TENSORS`
    grouped: Mapping[str, str] = field(default_factory=dict)  # tensor of several parameters -> axis of its groups
    transposed: frozenset[str] = frozenset()  # tensors with their inputs first
    renamed: Mapping[str, str] = field(default_factory=dict)  # prefix in other files -> prefix here
    ignored: frozenset[str] = frozenset()  # suffixes of buffers, which are computed from the config
    carried: frozenset[str] = frozenset()  # prefixes of tensors that are exported as loaded

    @property
    def reward_architecture(self) -> str | None:
        """Name of the transformers class of this family's reward models, if there is one."""
        return (
            self.architecture.replace("ForCausalLM", "ForSequenceClassification") if self.reward == "" else self.reward
        )

    def key(self, name: str) -> str:
        """Return the name that the shared key ``name`` of config.json has in this family."""
        return self.names.get(name, name)

    def tensor(self, leaf: str) -> str:
        """Return the tensor name of the parameter ``leaf``, given as its path in the tree; {} stands for the layer."""
        return self.tensors[leaf] if leaf in self.tensors else TENSORS[leaf]


def tensors_of(prefix: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the weight and bias tensors of a layer's parameters, given their module names."""
    weights = {f"layers/{name}": f"{prefix}{module}.weight" for name, module in modules.items()}
    return weights | {f"layers/{name}_bias": f"{prefix}{module}.bias" for name, module in modules.items()}


def attention_biases(hf: Mapping[str, Any]) -> dict[str, bool]:
    """Read ``attention_bias``, which all four projections of attention share, as fields of `DecoderConfig`."""
    return dict.fromkeys(("qkv_bias", "out_bias"), flag(hf, "attention_bias"))


MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1  # larger numbers are mistakes: no memory holds such arrays


def invalid(key: str, value: object, why: str) -> UserError:
    """Return the error for a key of ``config.json``: its name, its value, and the reason or remedy."""
    return UserError(f"config.json: {key}", value, why)


def one_of(value: object, options: Sequence[object]) -> bool:
    """Return whether the options contain a value of any kind; types must be equal, too (1 is not True)."""
    return any(value is option or (type(value) is type(option) and value == option) for option in options)


def number(hf: Mapping[str, Any], key: str, default: float | None = None, most: float = 1e30) -> Any:
    """Read a positive number; a missing key takes the default."""
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise invalid(key, value, f"it must be a positive number, at most {most:g}")
    return value


def size(hf: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
    """Read a positive integer; a missing key takes the default."""
    value = number(hf, key, default, most)
    if not isinstance(value, int):
        raise invalid(key, value, "it must be an integer")
    return value


def flag(hf: Mapping[str, Any], key: str) -> bool:
    """Read a Boolean; a missing key is False."""
    value = hf.get(key, False)
    if not isinstance(value, bool):
        raise invalid(key, value, "it must be true or false")
    return value
