"""Configs as text: YAML in, checked against the types of config/; YAML out, every default spelled out.

YAML is read by the rules of version 1.2: ``5e-7`` is a number and ``yes`` is text. What versions read differently, such
as ``012``, is text. A name given twice is an error. Types are strict: ``"8"`` is no number, ``1.0`` no whole number,
``1`` no truth value.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dpo_jax.config import DPOConfig, SFTConfig, SourceConfig, TrainConfig
from dpo_jax.config.elsewhere import ELSEWHERE
from dpo_jax.config.loss import ALSO_CALLED
from dpo_jax.errors import UserError, from_outside, reason, shown, unusable

Config = TypeVar("Config", bound=TrainConfig)
Section = TypeVar("Section")

COMMAND_OF: dict[type[TrainConfig], str] = {DPOConfig: "train", SFTConfig: "sft"}
SHORTHAND = {SourceConfig: "path"}  # text in place of one of these is its field
CLASS_WORDS = {SourceConfig: "a set"}
SCALARS = {int: (int,), float: (int, float), bool: (bool,), str: (str,), NoneType: (NoneType,)}
SCALAR_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


class CommandLineText(str):
    """Text of an override whose type is decided by the field that it is for."""


def parse_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], kind: type[Config]) -> Config:
    """Read a config and check it wholly.

    Args:
        source: path of a YAML file, or what such a file would hold.
        overrides: value by dotted name, into lists too: ``{"run.steps": 5, "data.train.0.limit": 100}``; put on top of
            the source in their order. `CommandLineText` values are read as the field's type asks. The index of a
            list's only set may be left out, ``data.train.limit``.
        kind: DPOConfig or SFTConfig.

    Raises:
        UserError: the file cannot be read, or a name, type or value is wrong; names the field, value and remedy.
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        _refuse("", source, "give the path of a YAML file, or a mapping of sections")
    tree = source if isinstance(source, Mapping) else load_yaml(Path(source))
    for name, value in overrides.items():
        tree = _put(kind, tree, (), name.split("."), value)
    return _read(kind, tree, "", kind)


def read_section(kind: type[Section], value: Any, name: str) -> Section:
    """One section of a config, such as ``lora``, out of what a YAML file holds under its name.

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
            raise UserError(f"{path}: this is a directory: give a config file, such as {path / 'config.yaml'}")
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file: check the path, seen from {Path.cwd()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the config file as UTF-8 text") from None
    except (OSError, ValueError) as error:  # a path that the system does not take is one or the other
        said = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{shown(str(path))}: the config file cannot be read: {said}: check the path") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: it holds {_words(tree)}, not sections: see docs/configuration.md")
    return tree


def type_words(kind: Any) -> str:
    """What a value of this type is, in words."""
    options = _options(kind)
    origin = get_origin(kind)
    if origin is tuple:
        return f"{type_words(get_args(kind)[0])}, or a list of such"
    if origin is dict:
        return f"{type_words(get_args(kind)[1])} for each name"
    if dataclasses.is_dataclass(kind):
        return CLASS_WORDS[kind]
    return ", ".join(options[:-1]) + " or " * (len(options) > 1) + options[-1]


def field_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and fields, in order."""
    for name, field_type in get_type_hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(field_type):
            yield from field_names(field_type, f"{prefix}{name}.")


# Reading a tree of plain values as typed dataclasses. `name` is the dotted name of the value, `root` the whole config's
# class, which the nearest name is looked for in.


def _read(kind: Any, value: Any, name: str, root: type) -> Any:
    if isinstance(value, CommandLineText):
        value = _from_command_line(kind, value, name)
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, name, root)
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        entries = value.split(",") if isinstance(value, str) else []
        if len(entries) > 1 and all(_accepts(element, entry.strip()) for entry in entries):
            _refuse(name, value, f"a list is written [{value}]")
        if not isinstance(value, list | tuple):  # one element may stand for a list of it
            return (_read(element, value, name, root),)
        return tuple(_read(element, part, f"{name}.{index}", root) for index, part in enumerate(value))
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            _refuse(name, value, f"write names with their values, such as {_example(value)}")
        element = get_args(kind)[1]
        for key in value:
            if not _accepts(str, key):
                _refuse(f"{name}: the name", key, "text is needed")
        return {key: _read(element, part, f"{name}.{key}", root) for key, part in value.items()}
    if not _accepts(kind, value):
        listed = isinstance(value, list | tuple) or (isinstance(value, str) and "," in value)
        several = listed and f"{name}s" in field_names(root)
        _refuse(name, value, f"several are given as {name}s" if several else _remedy(kind, value))
    return float(value) if type(value) is int and not _takes(kind, int) else value


def _read_section(kind: Any, value: Any, name: str, root: type) -> Any:
    if kind in SHORTHAND and isinstance(value, str):
        value = {SHORTHAND[kind]: str(value)}
    hints = get_type_hints(kind)
    if not isinstance(value, Mapping):
        _refuse(name, value, f"this is a section; set its options by name, such as {name}.{next(iter(hints))}")
    dotted = f"{name}." if name else ""
    for key in value:
        if key not in hints:
            raise UserError(f"{dotted}{key}: {_unknown(dotted, str(key), list(hints), root)}")
    arguments = {}
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        field_type = hints[field.name]
        if field.name in value:
            arguments[field.name] = _read(field_type, value[field.name], dotted + field.name, root)
            if arguments[field.name] == "":
                _refuse(dotted + field.name, "", "the text is empty; give a value, or leave it out")
        elif needed and dataclasses.is_dataclass(field_type):
            arguments[field.name] = _read(field_type, {}, dotted + field.name, root)
        elif needed:
            raise UserError(f"{dotted}{field.name}: missing: set it in the config or with --{dotted}{field.name}")
    try:
        return kind(**arguments)
    except UserError as error:  # a section names its own fields in full, an element of a list cannot
        section = name.partition(".")[0]
        named_in_full = not name or str(error).startswith((f"{section}.", f"{section}:"))
        raise UserError(str(error) if named_in_full else dotted + str(error)) from None


def _from_command_line(kind: Any, text: CommandLineText, name: str) -> Any:
    """Text for a text field as it stands; else YAML. A bracket begins a list or mapping."""
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
    """Numbers are finite, whole ones fit in 64 bits; text can be written as UTF-8 and be a path."""
    if isinstance(value, str):
        return re.search("[\0\ud800-\udfff]", value) is None
    most = 2**63 - 1 if kind is int else sys.float_info.max
    return type(value) not in (int, float) or abs(value) <= most


def _takes(kind: Any, scalar: type) -> bool:
    return kind is scalar or scalar in get_args(kind)


def _options(kind: Any) -> list[str]:
    """The words for each alternative of a scalar type."""
    if get_origin(kind) in (Union, UnionType):
        return [word for option in get_args(kind) for word in _options(option)]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [SCALAR_WORDS.get(kind, "")]


def _remedy(kind: Any, value: Any) -> str:
    wanted = f"{type_words(kind)} is needed"
    if type(value) is str and _takes(kind, str) and not _is_usable(kind, value):
        return f"{wanted}, in UTF-8 and without NUL characters"
    if type(value) is int and (_takes(kind, int) or _takes(kind, float)):
        return f"{wanted}; this is out of range"
    if type(value) is float and value.is_integer() and _accepts(kind, int(value)):
        return f"{wanted}; write {int(value)}"
    if isinstance(value, str):
        options = _options(kind)
        near = [ALSO_CALLED[value.lower()]] if "sigmoid" in options and value.lower() in ALSO_CALLED else []
        near += difflib.get_close_matches(value, options, 1, cutoff=0.7)
        if near:
            return f"{wanted}; did you mean {near[0]}?"
        if value.lower() == "none" and _accepts(kind, None):
            return f"{wanted}; did you mean null?"
        if _accepts(kind, _parse_scalar(value)):
            return f"{wanted}; take away the quotes"
    if _accepts(kind, str(value)):
        return f"{wanted}; put it in quotes"
    return wanted


def _unknown(dotted: str, key: str, siblings: list[str], root: type) -> str:
    """Why this name is refused, and which was probably meant."""
    for kind, command in COMMAND_OF.items():
        if kind is not root and dotted + key in field_names(kind):
            return f"this belongs to `dpo-jax {command}`, not to `dpo-jax {COMMAND_OF[root]}`: remove it"
    names = list(field_names(root))
    near = [ELSEWHERE[key]] if any(f"{name}.".startswith(f"{ELSEWHERE.get(key)}.") for name in names) else []
    near += [dotted + match for match in difflib.get_close_matches(key, siblings, 1, cutoff=0.7)]
    near += [name for name in names if name.endswith(f".{key}")]
    near += [name for name in difflib.get_close_matches(dotted + key, names, 1, cutoff=0.8) if "." in name]
    return f"unknown option: did you mean {near[0]}?" if near else f"unknown option: choose from {', '.join(siblings)}"


def _refuse(name: str, value: Any, remedy: str) -> NoReturn:
    raise unusable(name or "the config", value, remedy)


def _words(value: Any) -> str:
    return {dict: "a mapping", list: "a list", NoneType: "nothing"}.get(type(value), shown(value))


# Overrides: a value put into a tree by its dotted name.


def _put(kind: Any, node: Any, where: tuple[str, ...], rest: Sequence[str], value: Any) -> Any:
    """The node with a value put in at the path ``rest``; the caller's tree stays as it is.

    ``kind`` is the node's type, which tells what was written short; None: the name is unknown, and refused later.
    ``where`` is the path to the node.
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
    if not isinstance(node, Mapping) and (node is not None or not _has_names(kind)):
        raise UserError(f"{name}: {dotted} is {shown(node)}, which has no parts: set {dotted} itself")
    node = node or {}
    key, inside = rest[0], None
    if dataclasses.is_dataclass(kind):
        inside = get_type_hints(kind).get(key)
    elif get_origin(kind) is dict:
        inside = get_args(kind)[1]
    return {**node, key: _put(inside, node.get(key), (*where, key), rest[1:], value)}


def _put_in_list(kind: Any, node: Any, where: tuple[str, ...], rest: Sequence[str], value: Any) -> list[Any]:
    """As `_put`, of a list of ``kind``. One set may stand for a list of it, so its index may be left out."""
    dotted, name = ".".join(where), ".".join((*where, *rest))
    alone = [] if node is None and kind not in SHORTHAND else [node]
    entries = list(node) if isinstance(node, list | tuple) else alone
    if kind in SHORTHAND and not rest[0].isdecimal():
        if len(entries) != 1:
            choice = " to ".join(".".join((dotted, str(index), *rest)) for index in (0, len(entries) - 1))
            raise UserError(f"{name}: {dotted} has {len(entries)} sets: say which, {choice}")
        rest = ["0", *rest]
    if rest[0] not in map(str, range(len(entries))):
        raise UserError(f"{name}: {dotted} has {len(entries)} entries, numbered from 0: {rest[0]!r} is none of them")
    index = int(rest[0])
    entries[index] = _put(kind, entries[index], (*where, rest[0]), rest[1:], value)
    return entries


def _has_names(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or get_origin(kind) is dict


# YAML 1.2's core schema, on PyYAML, which follows 1.1 by itself.

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(~|null|Null|NULL|)$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (none of version 1.1's; a class attribute there too)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                what = shown(key)
                problem = f"{what} is given twice" if isinstance(key, str) else f"the name {what} is not text"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        with from_outside(f"{origin}: this is not YAML", "correct it, or write it more simply"):
            return yaml.load(text, Loader=_Loader)
    except UserError as refused:
        error = refused.__cause__
        if not isinstance(error, yaml.MarkedYAMLError):
            raise
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise UserError(f"{origin}: {where}: this is not YAML: {error.problem or error.context}") from None


def _parse_scalar(text: str) -> Any:
    try:
        return _parse_yaml(text, "")
    except UserError:
        return text
