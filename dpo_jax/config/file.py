"""Configs as text: YAML in, checked against the types of config/; YAML out, every default spelled out.

YAML is read by the rules of version 1.2: ``5e-7`` is a number and ``yes`` is a string. What versions read differently,
such as ``012``, is a string. A key that appears twice is an error. Types are strict: ``"8"`` is not a number, ``1.0``
not an integer, ``1`` not a boolean.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dpo_jax.config import DPOConfig, SFTConfig, SourceConfig, TrainConfig
from dpo_jax.config.elsewhere import ELSEWHERE
from dpo_jax.config.loss import ALSO_CALLED
from dpo_jax.config.section import Section
from dpo_jax.errors import UserError, from_outside, must_be, reason, shown

Config = TypeVar("Config", bound=TrainConfig)
Kind = TypeVar("Kind", bound=Section)

COMMAND_OF: dict[type[TrainConfig], str] = {DPOConfig: "train", SFTConfig: "sft"}
SHORTHAND = {SourceConfig: "path"}  # a string in place of one of these is its field
SCALARS = {int: (int,), float: (int, float), bool: (bool,), str: (str,), NoneType: (NoneType,)}
SCALAR_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}


class CommandLineText(str):
    """Text of an override, read as the type of its field asks."""


def parse_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], kind: type[Config]) -> Config:
    """Read and check a whole config.

    Args:
        source: path of a YAML file, or the mapping that such a file would hold.
        overrides: values by dotted name, also inside lists: ``{"run.steps": 5, "data.train.0.limit": 100}``; they
            replace those of the source, in order. The index of a list's only entry may be left out:
            ``data.train.limit``.
        kind: DPOConfig or SFTConfig.

    Raises:
        UserError: the file cannot be read, or a name, type or value is wrong; names the option, value and remedy.
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        raise UserError("the config", source, "give the path of a YAML file, or a mapping of sections")
    tree = source if isinstance(source, Mapping) else load_yaml(Path(source))
    for name, value in overrides.items():
        tree = _put(kind, tree, (), name.split("."), value)
    return _read(kind, tree, "", kind)


def read_section(kind: type[Kind], value: Any, name: str) -> Kind:
    """One section of a config, such as ``lora``, from what a YAML file holds under its name.

    Raises:
        UserError: a name, type or value in it is wrong.
    """
    return _read(kind, value, name, DPOConfig)


def config_to_yaml(config: TrainConfig) -> str:
    """The config with every default spelled out; `parse_config` gives back an equal one."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a directory: give a config file, such as {path / 'config.yaml'}")
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: config file not found: check the path, relative to {Path.cwd()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the config file as UTF-8 text") from None
    except (OSError, ValueError) as error:  # a path that the system does not take is one or the other
        cause = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{shown(str(path))}: the config file cannot be read: {cause}: check the path") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        content = {list: "a list", NoneType: "nothing"}.get(type(tree), shown(tree))
        raise UserError(f"{path}: holds {content}, not sections: see docs/configuration.md")
    return tree


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Type of each field of a section, by name, in order."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def field_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and fields, in order."""
    for name, field_type in field_types(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(field_type):
            yield from field_names(field_type, f"{prefix}{name}.")


def type_words(kind: Any) -> str:
    """The values of a type, in words."""
    if get_origin(kind) is tuple:
        return f"{type_words(get_args(kind)[0])}, or several as a list"
    if get_origin(kind) is dict:
        return f"{type_words(get_args(kind)[1])} per name"
    choices = _choices(kind)
    return ", ".join(choices[:-1]) + " or " * (len(choices) > 1) + choices[-1]


def _choices(kind: Any) -> list[str]:
    """The words for each alternative of a type."""
    if get_origin(kind) in (Union, UnionType):
        return [word for option in get_args(kind) for word in _choices(option)]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return ["a data set" if kind is SourceConfig else SCALAR_WORDS[kind]]


# Reading a tree of plain values as typed dataclasses. `name` is the dotted name of the value; `root`, the class of the
# whole config, has the names among which an unknown one is looked for.


def _read(kind: Any, value: Any, name: str, root: type) -> Any:
    if isinstance(value, CommandLineText):
        value = _from_command_line(kind, value, name)
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, name, root)
    if get_origin(kind) is tuple:
        return _read_list(get_args(kind)[0], value, name, root)
    if get_origin(kind) is dict:
        return _read_names(get_args(kind)[1], value, name, root)
    if not _accepts(kind, value):
        listed = isinstance(value, list | tuple) or (isinstance(value, str) and "," in value)
        if listed and f"{name}s" in field_names(root):
            raise UserError(name, value, f"several are given as {name}s")
        raise must_be(name, type_words(kind), value, _hint(kind, value))
    return float(value) if type(value) is int and int not in (kind, *get_args(kind)) else value


def _read_list(kind: Any, value: Any, name: str, root: type) -> tuple[Any, ...]:
    entries = value.split(",") if isinstance(value, str) else []
    if len(entries) > 1 and all(_accepts(kind, entry.strip()) for entry in entries):
        raise UserError(name, value, f"a list is written [{value}]")
    if not isinstance(value, list | tuple):  # one entry may stand for a list of it
        return (_read(kind, value, name, root),)
    return tuple(_read(kind, entry, f"{name}.{index}", root) for index, entry in enumerate(value))


def _read_names(kind: Any, value: Any, name: str, root: type) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(name, value, f"give names with their values, such as {_example(value)}")
    for key in value:
        if not _accepts(str, key):
            raise must_be(f"{name}: a name", "a string", key)
    return {key: _read(kind, entry, f"{name}.{key}", root) for key, entry in value.items()}


def _read_section(kind: type[Section], value: Any, name: str, root: type) -> Section:
    if kind in SHORTHAND and isinstance(value, str):
        value = {SHORTHAND[kind]: str(value)}
    types = field_types(kind)
    if not isinstance(value, Mapping):
        raise UserError(name, value, f"it is a section; set its options by name, such as {name}.{next(iter(types))}")
    prefix = f"{name}." if name else ""
    _refuse_unknown(value, types, prefix, root)
    arguments = {}
    for field in dataclasses.fields(kind):
        option = prefix + field.name
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in value:
            arguments[field.name] = _read(types[field.name], value[field.name], option, root)
            if arguments[field.name] == "":
                raise UserError(option, "", "the string is empty; give a value, or leave it out")
        elif required and dataclasses.is_dataclass(types[field.name]):
            arguments[field.name] = _read(types[field.name], {}, option, root)
        elif required:
            raise UserError(f"{option} is required: set it in the config or with --{option}")
    try:
        return kind(**arguments)
    except UserError as error:  # an entry of a list does not know its own name
        raise error if kind.section else UserError(prefix + str(error)) from None


def _refuse_unknown(keys: Collection[Any], options: Collection[str], prefix: str, root: type) -> None:
    """Refuse a key that is none of the options of the section with this prefix, and say which was probably meant."""
    unknown = next((key for key in keys if key not in options), None)
    if unknown is None:
        return
    key, names = str(unknown), list(field_names(root))
    for kind, command in COMMAND_OF.items():
        if kind is not root and prefix + key in field_names(kind):
            here = COMMAND_OF[root]
            raise UserError(f"{prefix}{key}: belongs to `dpo-jax {command}`, not to `dpo-jax {here}`: remove it")
    near = [ELSEWHERE[key]] if any(f"{name}.".startswith(f"{ELSEWHERE.get(key)}.") for name in names) else []
    near += [prefix + match for match in difflib.get_close_matches(key, options, 1, cutoff=0.7)]
    near += [name for name in names if name.endswith(f".{key}")]
    near += [name for name in difflib.get_close_matches(prefix + key, names, 1, cutoff=0.8) if "." in name]
    remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(options)}"
    raise UserError(f"{prefix}{key}: unknown option: {remedy}")


def _from_command_line(kind: Any, text: CommandLineText, name: str) -> Any:
    """Text for a string field as it is; else YAML. A bracket begins a list or mapping."""
    plain = str(text)
    if plain == "null" and _accepts(kind, None):
        return None
    if dataclasses.is_dataclass(kind) and kind not in SHORTHAND:
        return text  # a whole section would drop what the file says in it
    if dataclasses.is_dataclass(kind) or get_origin(kind) in (tuple, dict):
        return _parse_yaml(plain, name) if plain.startswith(("[", "{")) else text
    return plain if _accepts(kind, plain) else _parse_yaml(plain, name)


def _example(value: Any) -> str:
    """A mapping as it was probably meant: of ``name:value``, ``--name=value`` or a value alone."""
    if not isinstance(value, str):
        return "{name: value}"
    pair = re.fullmatch(r"-*([\w.]+) ?[:=] ?(\S+)", value)
    return f"{{{pair[1]}: {pair[2]}}}" if pair else f"{{name: {value}}}"


def _accepts(kind: Any, value: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_accepts(option, value) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    return type(value) in SCALARS.get(kind, ()) and _is_usable(kind, value)


def _is_usable(kind: Any, value: Any) -> bool:
    """Numbers are finite, integers fit in 64 bits; strings can be written as UTF-8 and be a path."""
    if isinstance(value, str):
        return re.search("[\0\ud800-\udfff]", value) is None
    most = 2**63 - 1 if kind is int else sys.float_info.max
    return type(value) not in (int, float) or abs(value) <= most


def _hint(kind: Any, value: Any) -> str:
    """How to write a value of the wrong type; "" if nothing is known."""
    scalars = (kind, *get_args(kind))
    if type(value) is str and str in scalars and not _is_usable(kind, value):
        return "write UTF-8 without NUL characters"
    if type(value) is int and (int in scalars or float in scalars):
        return "it is out of range"
    if type(value) is float and value.is_integer() and _accepts(kind, int(value)):
        return f"write {int(value)}"
    if isinstance(value, str):
        choices = _choices(kind)
        near = [ALSO_CALLED[value.lower()]] if "sigmoid" in choices and value.lower() in ALSO_CALLED else []
        near += difflib.get_close_matches(value, choices, 1, cutoff=0.7)
        near += ["null"] if value.lower() == "none" and _accepts(kind, None) else []
        if near:
            return f"did you mean {near[0]}?"
        with suppress(UserError):
            if _accepts(kind, _parse_yaml(value, "")):
                return "remove the quotes"
    return "put it in quotes" if _accepts(kind, str(value)) else ""


# Overrides: a value put into a tree of plain values by its dotted name.


def _put(kind: Any, node: Any, where: tuple[str, ...], rest: Sequence[str], value: Any) -> Any:
    """The node with a value put in at the path ``rest``; the caller's tree stays as it is.

    ``kind`` is the node's type; None: its name is unknown, which is refused later. ``where`` is the path to the node.
    """
    if not rest or kind is None:
        return value
    dotted, name = ".".join(where), ".".join((*where, *rest))
    if isinstance(node, CommandLineText):
        node = _from_command_line(kind, node, dotted)
    if get_origin(kind) is tuple:
        return _put_in_list(get_args(kind)[0], node, where, rest, value)
    if kind in SHORTHAND and isinstance(node, str):
        node = {SHORTHAND[kind]: node}
    named = dataclasses.is_dataclass(kind) or get_origin(kind) is dict
    if not isinstance(node, Mapping) and (node is not None or not named):
        raise UserError(f"{name}: {dotted} is {shown(node)}, which has no options: set {dotted} itself")
    node = node or {}
    key, inside = rest[0], None
    if dataclasses.is_dataclass(kind):
        inside = field_types(kind).get(key)
    elif get_origin(kind) is dict:
        inside = get_args(kind)[1]
    return {**node, key: _put(inside, node.get(key), (*where, key), rest[1:], value)}


def _put_in_list(kind: Any, node: Any, where: tuple[str, ...], rest: Sequence[str], value: Any) -> list[Any]:
    """As `_put`, for a list of ``kind``. One data set may stand for a list of it, so its index may be left out."""
    dotted, name = ".".join(where), ".".join((*where, *rest))
    alone = [] if node is None and kind not in SHORTHAND else [node]
    entries = list(node) if isinstance(node, list | tuple) else alone
    if kind in SHORTHAND and not rest[0].isdecimal():
        if len(entries) != 1:
            choice = " to ".join(".".join((dotted, str(index), *rest)) for index in (0, len(entries) - 1))
            raise UserError(f"{name}: {dotted} has {len(entries)} data sets: choose one, {choice}")
        rest = ["0", *rest]
    if rest[0] not in map(str, range(len(entries))):
        raise UserError(f"{name}: {dotted} has no entry {rest[0]!r}: it has {len(entries)}, counted from 0")
    index = int(rest[0])
    entries[index] = _put(kind, entries[index], (*where, rest[0]), rest[1:], value)
    return entries


# The core schema of YAML 1.2, on PyYAML, whose own is that of 1.1.

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(~|null|Null|NULL|)$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (none of 1.1; PyYAML has it as a class attribute too)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = "appears twice" if isinstance(key, str) else "is not a string"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} {problem}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as a string."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        with from_outside(f"{origin}: invalid YAML", "correct it, or write it more simply"):
            return yaml.load(text, Loader=_Loader)
    except UserError as refused:
        error = refused.__cause__
        if not isinstance(error, yaml.MarkedYAMLError):
            raise
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise UserError(f"{origin}: {where}: invalid YAML: {error.problem or error.context}") from None
