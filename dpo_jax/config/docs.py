"""The text under each field of a config, for ``--help`` and docs/configuration.md.

``python -m dpo_jax.config.docs > docs/configuration.md`` writes that page again.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from typing import Any, get_type_hints

import docstring_parser

from dpo_jax.config import DPOConfig, SFTConfig, SourceConfig
from dpo_jax.config.file import type_words

PREFACE = """# Configuration

A run is described by a YAML file. Any option can be set after it on the command line by its dotted name, also inside
lists and mappings. The value takes the place of what the file says; of an option given twice the last counts:

    dpo-jax train configs/tiny_cpu.yaml --loss.beta 0.05 --data.train.0.limit 100 --data.eval.test held_out.jsonl

- YAML is read by the rules of version 1.2: `5e-7` is a number, `yes` is text. What versions read differently, such as
  `012`, is text.
- Types are strict: `"8"` is no number, `1.0` no whole number, `1` no truth value. Unknown names are errors.
- A path alone may stand for a set, `pairs.jsonl` for `{path: pairs.jsonl}`, and one entry alone for a list of it. The
  index may be left out where there is one set only: `--data.train.limit 100`.
- An option that the other options leave without effect is an error. One that has none only because of the data,
  the length of the run or the devices, such as a warm-up longer than the run, is noted when the run starts.
- Relative paths are seen from the working directory.
- The run directory's `config.yaml` has every default spelled out, and can be used as a config itself.

This page is made from `dpo_jax/config/` by `python -m dpo_jax.config.docs`."""

# The options that most runs set, in the order in which one comes to them.
FIRST = ("model.path", "data.train", "data.max_length", "loss.type", "loss.beta", "reference.mode",
         "optimizer.learning_rate", "batch.pairs", "batch.accumulation", "run.dir")  # fmt: skip
_TABLE_HEAD = ("| option | type | default | meaning |", "|---|---|---|---|")


@dataclasses.dataclass(frozen=True)
class FieldText:
    """One option: its dotted name, type, default as in YAML (None: it must be given) and meaning."""

    name: str
    type: Any
    default: str | None
    meaning: str


@dataclasses.dataclass(frozen=True)
class SectionText:
    """One section: its dotted name, class, meaning and own fields."""

    name: str
    kind: type
    meaning: str
    fields: tuple[FieldText, ...]


def sections(kind: type, name: str = "") -> Iterator[SectionText]:
    """The sections of a config class, each before those inside it."""
    hints, meanings = get_type_hints(kind), _meanings(kind)
    dotted = f"{name}." if name else ""
    fields = tuple(
        FieldText(dotted + field.name, hints[field.name], _default(field), meanings[field.name])
        for field in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(hints[field.name])
    )
    if fields:
        yield SectionText(name, kind, inspect.getdoc(kind) or "", fields)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from sections(hints[field.name], dotted + field.name)


def help_sections(kind: type) -> Iterator[SectionText]:
    """What `sections` gives, and the options of one entry of data.train."""
    yield from sections(kind)
    yield from sections(SourceConfig, "data.train.0")


def reference_page() -> str:
    """docs/configuration.md: every option of both stages."""
    both = {part.name: part.kind for part in sections(SFTConfig)}
    staged = [(part, "" if both.get(part.name) is part.kind else " (`train`)") for part in help_sections(DPOConfig)]
    staged += [(part, " (`sft`)") for part in sections(SFTConfig) if (part, "") not in staged]
    fields = {field.name: field for part, _ in reversed(staged) for field in part.fields}
    lines = [PREFACE, "\n## The ten that matter\n", "What most runs set; the defaults of all others are sound.\n"]
    lines += [*_TABLE_HEAD, *(_table_row(fields[name]) for name in FIRST)]
    for part, stage in staged:
        note = " (one set; so too `data.eval.NAME`)" if part.kind is SourceConfig else stage
        lines += [f"\n## {part.name}{note}\n", f"{part.meaning}\n"]
        lines += [*_TABLE_HEAD, *map(_table_row, part.fields)]
    return "\n".join(lines) + "\n"


def _table_row(field: FieldText) -> str:
    default = "must be given" if field.default is None else f"`{field.default}`"
    cells = [f"`{field.name}`", type_words(field.type), default, field.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meanings(kind: type) -> dict[str, str]:
    """The text under each field, by name; a field of a parent class has its text there."""
    meanings: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if dataclasses.is_dataclass(owner):
            parsed = docstring_parser.parse_from_object(owner).params
            meanings |= {item.arg_name: " ".join((item.description or "").split()) for item in parsed}
    return meanings


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if field.default is dataclasses.MISSING:
        return None
    return field.default if isinstance(field.default, str) else json.dumps(field.default)


if __name__ == "__main__":
    sys.stdout.write(reference_page())
