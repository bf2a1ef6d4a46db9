"""Read configs from YAML, check them against the types in config/, and write them with every default spelled out.

YAML follows version 1.2: ``5e-7`` is a number and ``yes`` is a string. Values that YAML versions read differently, such
as ``012``, are strings. A duplicate key is an error. Types are strict: ``"8"`` is not a number, ``1.0`` not an integer,
``1`` not a boolean.
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

from dpo_jax.config import DPOConfig, GenerateConfig, JudgeConfig, PPOConfig, RewardConfig, SFTConfig, SourceConfig
from dpo_jax.config.compare import CompareConfig, ComparedJudgeConfig, ComparedMethodConfig
from dpo_jax.config.elsewhere import NOT_OFFERED, OPTION_ALIASES
from dpo_jax.config.generate import ComparedRewardConfig, RewardModelConfig
from dpo_jax.config.loss import LOSS_ALIASES
from dpo_jax.config.online import PairJudgeConfig
from dpo_jax.config.section import Section
from dpo_jax.errors import UserError, from_outside, must_be, reason, shown

Kind = TypeVar("Kind", bound=Section)

COMMAND_OF: dict[type[Section], str] = {  # class of a whole config -> command
    DPOConfig: "train",
    SFTConfig: "sft",
    RewardConfig: "reward",
    PPOConfig: "ppo",
    GenerateConfig: "generate",
    CompareConfig: "compare --config",
}
SHORTHAND = {
    SourceConfig: "path",
    RewardModelConfig: "path",
    ComparedRewardConfig: "path",
    JudgeConfig: "path",
    PairJudgeConfig: "path",
    ComparedJudgeConfig: "path",
}  # section that a string may replace -> the field it sets
ENTRY_WORDS = {SourceConfig: "a data set", ComparedMethodConfig: "a method"}  # section that is an entry of a mapping
SCALARS = {int: (int,), float: (int, float), bool: (bool,), str: (str,), NoneType: (NoneType,)}
SCALAR_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}


class CommandLineText(str):
    """Text of an override, to be parsed according to the type of its field."""


def parse_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], kind: type[Kind]) -> Kind:
    """Read a config from a YAML file or a mapping, apply the overrides and check the result.

    Args:
        source: path of a YAML file, or a mapping with the same content.
        overrides: values by dotted name, also inside lists: ``{"run.steps": 5, "data.train.0.limit": 100}``; applied
            to the source in order. The index of a list's only entry may be omitted: ``data.train.limit``.
        kind: class of the config.

    Raises:
        UserError: the file cannot be read, or a name, type or value is wrong; the text names option, value and remedy.
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        raise UserError("the config", source, "give the path of a YAML file, or a mapping of sections")
    tree = source if isinstance(source, Mapping) else load_yaml(Path(source))
    for name, value in overrides.items():
        tree = _set_option(kind, tree, (), name.split("."), value)
    return _read(kind, tree, "", kind)


def read_section(kind: type[Kind], value: Any, name: str) -> Kind:
    """Read and check one config section, such as ``lora``, from its parsed YAML value.

    Raises:
        UserError: a name, type or value in the section is wrong.
    """
    return _read(kind, value, name, DPOConfig)


def config_to_yaml(config: Section) -> str:
    """Return the config as YAML with every default spelled out; `parse_config` reads back an equal config."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML config file, whose top level must be a mapping."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a directory: give a config file, such as {path / 'config.yaml'}")
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: config file not found: check the path, relative to {Path.cwd()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the config file as UTF-8 text") from None
    except (OSError, ValueError) as error:  # a path invalid on this system raises either
        cause = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{shown(str(path))}: the config file cannot be read: {cause}: check the path") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        content_text = {list: "a list", NoneType: "nothing"}.get(type(tree), shown(tree))
        raise UserError(f"{path}: must contain config sections, got {content_text}: see docs/configuration.md")
    return tree


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the type of each field of a section by name, in order of definition; of a union, its first section."""
    hints = get_type_hints(kind)
    return {field.name: _section_type(hints[field.name]) for field in dataclasses.fields(kind)}


def _section_type(kind: Any) -> Any:
    alternatives = get_args(kind) if get_origin(kind) is UnionType else ()
    return next(filter(dataclasses.is_dataclass, alternatives), kind)


def field_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all sections and fields, in order of definition."""
    for name, field_type in field_types(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(field_type):
            yield from field_names(field_type, f"{prefix}{name}.")


def type_words(kind: Any) -> str:
    """Describe in words the values that a type allows."""
    if get_origin(kind) is tuple:
        return f"{type_words(get_args(kind)[0])}, or several as a list"
    if get_origin(kind) is dict:
        return f"{type_words(get_args(kind)[1])} per name"
    choices = _choices(kind)
    return ", ".join(choices[:-1]) + " or " * (len(choices) > 1) + choices[-1]


def _choices(kind: Any) -> list[str]:
    """Describe in words each alternative of a type."""
    if get_origin(kind) in (Union, UnionType):
        return [word for option in get_args(kind) for word in _choices(option)]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [ENTRY_WORDS[kind] if kind in ENTRY_WORDS else SCALAR_WORDS[kind]]


# Conversion of plain values to typed dataclasses. `name` is the dotted name of the value; `root` is the class of the
# whole config, whose option names are searched for a suggestion when a name is unknown.


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
        is_list = isinstance(value, list | tuple) or (isinstance(value, str) and "," in value)
        if is_list and f"{name}s" in field_names(root):
            raise UserError(name, value, f"to give several values, set {name}s")
        raise must_be(name, type_words(kind), value, _hint(kind, value))
    return float(value) if type(value) is int and int not in (kind, *get_args(kind)) else value


def _read_list(kind: Any, value: Any, name: str, root: type) -> tuple[Any, ...]:
    entries = value.split(",") if isinstance(value, str) else []
    if len(entries) > 1 and all(_accepts(kind, entry.strip()) for entry in entries):
        raise UserError(name, value, f"write a list as [{value}]")
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
    options = {}
    for field in dataclasses.fields(kind):
        option = prefix + field.name
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in value and not _is_no_section(field, types[field.name], value[field.name]):
            options[field.name] = _read(types[field.name], value[field.name], option, root)
            if options[field.name] == "":
                raise UserError(option, "", "the string is empty; give a value, or remove the option")
        elif is_required and dataclasses.is_dataclass(types[field.name]):
            options[field.name] = _read(types[field.name], {}, option, root)
        elif is_required:
            raise UserError(f"{option} is required: set it in the config or with --{option}")
    try:
        return kind(**options)
    except UserError as error:  # an entry of a list or mapping does not know its own name, nor does a section in it
        outer = prefix if not kind.section else name.removesuffix(kind.section) if name.endswith(kind.section) else ""
        raise UserError(outer + str(error)) if outer else error from None


def _is_no_section(field: dataclasses.Field[Any], kind: Any, value: Any) -> bool:
    """Return whether the value is null in place of an optional section."""
    is_null = value is None or (isinstance(value, CommandLineText) and value == "null")
    return is_null and dataclasses.is_dataclass(kind) and field.default is None


def _refuse_unknown(keys: Collection[Any], options: Collection[str], prefix: str, root: type) -> None:
    """Refuse a key that is not an option of the section with this prefix, and suggest the option probably meant."""
    unknown_key = next((key for key in keys if key not in options), None)
    if unknown_key is None:
        return
    key, names = str(unknown_key), list(field_names(root))
    if prefix + key in NOT_OFFERED:
        raise UserError(f"{prefix}{key}: unknown option: {NOT_OFFERED[prefix + key]}; remove it")
    for kind, command in COMMAND_OF.items():
        if kind is not root and prefix + key in field_names(kind):
            problem = f"belongs to `dpo-jax {command}`, not to `dpo-jax {COMMAND_OF[root]}`"
            raise UserError(f"{prefix}{key}: {problem}: remove it")
    candidates = (
        [OPTION_ALIASES[key]] if any(f"{name}.".startswith(f"{OPTION_ALIASES.get(key)}.") for name in names) else []
    )
    candidates += [prefix + match for match in difflib.get_close_matches(key, options, 1, cutoff=0.7)]
    candidates += [name for name in names if name.endswith(f".{key}")]
    candidates += [name for name in difflib.get_close_matches(prefix + key, names, 1, cutoff=0.8) if "." in name]
    remedy = f"did you mean {candidates[0]}?" if candidates else f"choose from {', '.join(options)}"
    raise UserError(f"{prefix}{key}: unknown option: {remedy}")


def _from_command_line(kind: Any, text: CommandLineText, name: str) -> Any:
    """Return the text for a string field, or else its value as YAML; a leading bracket marks a list or mapping."""
    plain_text = str(text)
    if plain_text == "null" and _accepts(kind, None):
        return None
    if dataclasses.is_dataclass(kind) and kind not in SHORTHAND:
        return text  # refused later: a whole section would replace the one in the file
    if dataclasses.is_dataclass(kind) or get_origin(kind) in (tuple, dict):
        return _parse_yaml(plain_text, name) if plain_text.startswith(("[", "{")) else text
    return plain_text if _accepts(kind, plain_text) else _parse_yaml(plain_text, name)


def _example(value: Any) -> str:
    """Return the mapping probably meant by ``name:value``, ``--name=value`` or a bare value."""
    if not isinstance(value, str):
        return "{name: value}"
    match = re.fullmatch(r"-*([\w.]+) ?[:=] ?(\S+)", value)
    return f"{{{match[1]}: {match[2]}}}" if match else f"{{name: {value}}}"


def _accepts(kind: Any, value: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_accepts(option, value) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    return type(value) in SCALARS.get(kind, ()) and _is_usable(kind, value)


def _is_usable(kind: Any, value: Any) -> bool:
    """Return whether numbers are finite, integers fit in 64 bits, and strings are valid UTF-8 without NUL."""
    if isinstance(value, str):
        return re.search("[\0\ud800-\udfff]", value) is None
    limit = 2**63 - 1 if kind is int else sys.float_info.max
    return type(value) not in (int, float) or abs(value) <= limit


def _hint(kind: Any, value: Any) -> str:
    """Return a hint on how to write a value of the wrong type, or "" if there is none."""
    scalars = (kind, *get_args(kind))
    if type(value) is str and str in scalars and not _is_usable(kind, value):
        return "write UTF-8 without NUL characters"
    if type(value) is int and (int in scalars or float in scalars):
        return "it is out of range"
    if type(value) is float and value.is_integer() and _accepts(kind, int(value)):
        return f"write {int(value)}"
    if isinstance(value, str):
        choices = _choices(kind)
        candidates = [LOSS_ALIASES[value.lower()]] if "sigmoid" in choices and value.lower() in LOSS_ALIASES else []
        candidates += difflib.get_close_matches(value, choices, 1, cutoff=0.7)
        candidates += ["null"] if value.lower() == "none" and _accepts(kind, None) else []
        if candidates:
            return f"did you mean {candidates[0]}?"
        with suppress(UserError):
            if _accepts(kind, _parse_yaml(value, "")):
                return "remove the quotes"
    return "put it in quotes" if _accepts(kind, str(value)) else ""


# Overrides: insertion of a value into a tree of plain values by its dotted name.


def _set_option(kind: Any, node: Any, path: tuple[str, ...], subpath: Sequence[str], value: Any) -> Any:
    """Return a copy of the node with a value set at the path ``subpath``; the caller's tree is not modified.

    ``kind`` is the node's type, None for an unknown name, which is refused later. ``path`` leads to the node.
    """
    if not subpath or kind is None:
        return value
    node_name, name = ".".join(path), ".".join((*path, *subpath))
    if isinstance(node, CommandLineText):
        node = _from_command_line(kind, node, node_name)
    if get_origin(kind) is tuple:
        return _set_in_list(get_args(kind)[0], node, path, subpath, value)
    if kind in SHORTHAND and isinstance(node, str):
        node = {SHORTHAND[kind]: node}
    is_mapping = dataclasses.is_dataclass(kind) or get_origin(kind) is dict
    if not isinstance(node, Mapping) and (node is not None or not is_mapping):
        raise UserError(f"{name}: {node_name} is {shown(node)}, which has no options: set {node_name} itself")
    node = node or {}
    key, value_type = subpath[0], None
    if dataclasses.is_dataclass(kind):
        value_type = field_types(kind).get(key)
    elif get_origin(kind) is dict:
        value_type = get_args(kind)[1]
    return {**node, key: _set_option(value_type, node.get(key), (*path, key), subpath[1:], value)}


def _set_in_list(kind: Any, node: Any, path: tuple[str, ...], subpath: Sequence[str], value: Any) -> list[Any]:
    """Set a value as `_set_option` does, in a list of ``kind``; the index of a single data set may be omitted."""
    list_name, name = ".".join(path), ".".join((*path, *subpath))
    single_entry = [] if node is None and kind not in SHORTHAND else [node]
    entries = list(node) if isinstance(node, list | tuple) else single_entry
    if kind in SHORTHAND and not subpath[0].isdecimal():
        if len(entries) != 1:
            range_text = " to ".join(".".join((list_name, str(index), *subpath)) for index in (0, len(entries) - 1))
            raise UserError(f"{name}: {list_name} has {len(entries)} data sets: choose one, {range_text}")
        subpath = ["0", *subpath]
    if subpath[0] not in map(str, range(len(entries))):
        raise UserError(f"{name}: {list_name} has no entry {subpath[0]!r}: it has {len(entries)}, counted from 0")
    index = int(subpath[0])
    entries[index] = _set_option(kind, entries[index], (*path, subpath[0]), subpath[1:], value)
    return entries


# The core schema of YAML 1.2 on top of PyYAML, which implements 1.1.

_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (drops those of 1.1; a class attribute in PyYAML too)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in keys:
                problem = "appears twice" if isinstance(key, str) else "is not a string"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} {problem}", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes strings which YAML 1.1 or 1.2 would read as another type."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
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
        position = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown position"
        raise UserError(f"{origin}: {position}: invalid YAML: {error.problem or error.context}") from None
