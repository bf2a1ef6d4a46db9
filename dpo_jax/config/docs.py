"""Document config fields from their docstrings, for ``--help`` and docs/configuration.md.

``python -m dpo_jax.config.docs > docs/configuration.md`` regenerates that page.
"""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import docstring_parser

from dpo_jax.config import SourceConfig, TrainConfig
from dpo_jax.config.compare import CompareConfig, ComparedMethodConfig
from dpo_jax.config.file import COMMAND_OF, field_types, type_words
from dpo_jax.config.section import as_yaml

PREFACE = """# Configuration

A run is described by a YAML file. Any option can be set on the command line by its dotted name, also inside lists and
mappings. It replaces the value in the file; if an option is given twice, the last one counts:

    dpo-jax train configs/tiny_cpu.yaml --loss.beta 0.05 --data.train.0.limit 100 --data.eval.test held_out.jsonl

- YAML is read by the rules of version 1.2: `5e-7` is a number, `yes` is a string. What YAML versions read differently,
  such as `012`, is a string.
- Types are strict: `"8"` is not a number, `1.0` is not an integer, `1` is not a boolean. Unknown names are errors.
- A path alone may stand for a data set, `pairs.jsonl` for `{path: pairs.jsonl}`, and a single entry for a list of one.
  It may stand for a reward model, too: `reward` of `generate` and `ppo`, `eval.reward` and `data.online.reward` of
  `train`, and `judge` of `compare`.
  The index may be left out if there is only one data set: `--data.train.limit 100`.
- An option that has no effect next to the other options is an error. One that has no effect only because of the data,
  the length of the run or the devices, such as a warmup longer than the run, is noted when the run starts.
- Relative paths are relative to the working directory.
- The run directory's `config.yaml` spells out every default, and is itself a valid config.

This page is generated from `dpo_jax/config/` by `python -m dpo_jax.config.docs`."""

# The options that most runs set, in reading order.
KEY_OPTIONS = ("model.path", "data.train", "data.max_length", "loss.type", "loss.beta", "reference.mode",
         "optimizer.learning_rate", "batch.pairs", "batch.accumulation", "run.dir")  # fmt: skip
NO_SECTION = "options without a section"
METHOD = "methods.NAME"  # section that stands for every method of a comparison
DATA_SET = "data.train.0"  # section that stands for every data set of a run
_TABLE_HEAD = ("| option | type | default | meaning |", "|---|---|---|---|")


class FieldText(NamedTuple):
    """Documentation of an option: dotted name, allowed values in words, default as YAML (None: required), meaning."""

    name: str
    values: str
    default: str | None
    meaning: str


class SectionText(NamedTuple):
    """Documentation of a section: dotted name, meaning and fields."""

    name: str
    meaning: str
    fields: tuple[FieldText, ...]


def sections(kind: type, name: str = "") -> Iterator[SectionText]:
    """Yield the documentation of each section of a config class, before that of its subsections."""
    types, meanings = field_types(kind), _meanings(kind)
    prefix = f"{name}." if name else ""
    options = (field for field in dataclasses.fields(kind) if not dataclasses.is_dataclass(types[field.name]))
    fields = tuple(_field_text(field, types[field.name], meanings[field.name], prefix) for field in options)
    if fields:
        yield SectionText(name, " ".join((inspect.getdoc(kind) or "").split()), fields)
    for option, option_type in types.items():
        if dataclasses.is_dataclass(option_type):
            yield from sections(option_type, prefix + option)


def help_sections(kind: type) -> Iterator[SectionText]:
    """Yield the `sections` of a config class, then the options of one data set and, for `compare`, of one method."""
    yield from sections(kind)
    if issubclass(kind, CompareConfig):
        yield next(sections(ComparedMethodConfig, METHOD))  # without its sections, which are those of other commands
    if issubclass(kind, TrainConfig | CompareConfig):
        yield from sections(SourceConfig, DATA_SET)


def reference_page() -> str:
    """Return the text of docs/configuration.md: every option of every command that reads a config."""
    commands: dict[SectionText, list[str]] = {}
    for config, command in COMMAND_OF.items():
        for text in help_sections(config):
            commands.setdefault(text, []).append(f"`{command}`")
    fields = {field.name: field for text in reversed(commands) for field in text.fields}
    lines = [PREFACE, "\n## The ten that matter\n", "Most runs set these; the other defaults are sound.\n"]
    lines += [*_TABLE_HEAD, *(_table_row(fields[name]) for name in KEY_OPTIONS)]
    for text, names in commands.items():
        note = f" ({', '.join(names)})" if len(names) < len(COMMAND_OF) else ""
        note = " (one data set; also `data.eval.NAME`)" if text.name == DATA_SET else note
        lines += [f"\n## {text.name or NO_SECTION}{note}\n", f"{text.meaning}\n"]
        lines += [*_TABLE_HEAD, *map(_table_row, text.fields)]
    return "\n".join(lines) + "\n"


def _table_row(field: FieldText) -> str:
    default = "required" if field.default is None else f"`{field.default}`"
    cells = [f"`{field.name}`", field.values, default, field.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meanings(kind: type) -> dict[str, str]:
    """Return the docstring under each field, by field name; inherited fields are documented in the parent class."""
    meanings: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if dataclasses.is_dataclass(owner):
            parsed = docstring_parser.parse_from_object(owner).params
            meanings |= {item.arg_name: " ".join((item.description or "").split()) for item in parsed}
    return meanings


def _field_text(field: dataclasses.Field[Any], kind: Any, meaning: str, prefix: str) -> FieldText:
    values = "; ".join([type_words(kind), *(str(allowed) for allowed in field.metadata.values())])
    default = None if field.default is dataclasses.MISSING else as_yaml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        default = as_yaml(field.default_factory())
    return FieldText(prefix + field.name, values, default, meaning)


if __name__ == "__main__":
    sys.stdout.write(reference_page())
