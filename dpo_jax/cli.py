"""The commands. Each reads its config wholly, and refuses what is wrong, before anything heavy is imported."""

import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
from jsonargparse.typing import PositiveInt

import dpo_jax
from dpo_jax.config import DPOConfig, SFTConfig, TrainConfig
from dpo_jax.config.docs import help_sections
from dpo_jax.config.file import COMMAND_OF, CommandLineText, parse_config, type_words
from dpo_jax.console import lossy_streams, open_descriptors
from dpo_jax.errors import Preempted, UserError, reason

CONFIG_OF = {command: config for config, command in COMMAND_OF.items()}
INTERRUPTED = 130  # the shell's code for control-C


def _train(config: DPOConfig | SFTConfig) -> None:
    from dpo_jax.train import train

    train(config)


def _eval(config: DPOConfig, output: str, which: Literal["newest", "best"], per_token: bool) -> None:
    from dpo_jax.commands.evaluate import evaluate
    from dpo_jax.parallel.hosts import is_writer

    summary = evaluate(config, Path(output), which, per_token)
    if is_writer():
        text = json.dumps(summary, indent=2)
        print(
            re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
        )  # lists of numbers


def _export(run_dir: str, out_dir: str, which: Literal["newest", "best"], adapters: bool) -> None:
    from dpo_jax.commands.export import export

    export(Path(run_dir), Path(out_dir), which, adapters)


def _data(config: TrainConfig, step: int | None) -> None:
    from dpo_jax.reports.data_audit import audit_config, render, show_step
    from dpo_jax.weights.hub import end_tokens
    from dpo_jax.weights.open import open_model

    opened = open_model(config.model, "cpu", weights=False)
    source, tokenizer = opened.source, opened.tokenizer(config.data.chat_template)
    if step is None:
        positions, ends = source.hf_config.get("max_position_embeddings"), end_tokens(source.folder, source.hf_config)
        print(render(audit_config(config, tokenizer, positions, ends)))
    else:
        print(show_step(config, step, tokenizer))


def _plan(
    config: DPOConfig, topology: str, slices: int, rows: int | None, lengths: str | None, examples: int | None,
    data: bool, search: bool, output: str | None,
) -> None:  # fmt: skip
    mean_lengths = None
    if lengths is not None:
        if data:
            raise UserError(f"--lengths: {lengths} is given, and --data measures them; keep one")
        match = re.fullmatch(r"(\d+),(\d+),(\d+)", lengths)
        if match is None or not all(map(int, match.groups())):
            raise UserError(f"--lengths: {lengths} cannot be read; write mean tokens of prompt, chosen and rejected "
                            "with commas between, 180,330,300")  # fmt: skip
        mean_lengths = (float(match[1]), float(match[2]), float(match[3]))
    if data and examples is not None:
        raise UserError(f"--examples: {examples} is given, and --data counts them; keep one")
    if config.run.steps is not None and examples is not None:
        raise UserError(f"--examples: {examples} says nothing: run.steps is {config.run.steps}; keep one")
    if output is not None and (not Path(output).absolute().parent.is_dir() or Path(output).is_dir()):
        raise UserError(f"--output: {output!r} cannot be written: give a file in a folder that is there")
    from dpo_jax.commands.evaluate import write_output
    from dpo_jax.plan.plan import Known, plan_slices
    from dpo_jax.plan.text import render, table

    plans = []
    given = Known(slices=slices, rows=rows, lengths=mean_lengths, examples=examples, data=data)
    for plan in plan_slices(config, topology.split(","), given, search):
        plans.append(plan)
        print(render(plan), end="\n\n", flush=True)
        if output is not None:
            write_output(Path(output), json.dumps(plans, indent=2) + "\n")
    if len(plans) > 1:
        print(table(plans))


def _sweep(config: DPOConfig, betas: str) -> None:
    try:
        values = [float(beta) for beta in betas.split(",")]
    except ValueError:
        raise UserError(f"--betas: {betas} cannot be read; write numbers with commas between, 0.05,0.1,0.5") from None
    configs = [replace(config, loss=replace(config.loss, beta=value)) for value in values]  # refused before jax comes
    from dpo_jax.commands.sweep import render, sweep
    from dpo_jax.parallel.hosts import is_writer

    rows = sweep(config, [variant.loss.beta for variant in configs])
    if is_writer():
        print(render(rows))


def _quickstart(dir: str) -> None:
    from dpo_jax.commands.quickstart import quickstart

    quickstart(Path(dir))


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command; `config` is the class of the config that it reads, None if it reads none."""

    summary: str
    run: Callable[..., None]
    config: type[TrainConfig] | None = None
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


COMMANDS = {
    "train": Command(summary="Direct Preference Optimization.", run=_train, config=DPOConfig),
    "sft": Command(
        summary="Supervised fine-tuning, to make the model that train starts from.", run=_train, config=SFTConfig
    ),
    "eval": Command(
        summary="Log-probs and rewards of the evaluation sets, pair by pair; a summary to stdout, as JSON.",
        run=_eval,
        config=DPOConfig,
        arguments={
            "--output": {"type": str, "required": True, "help": "JSON lines, one a pair, are written here."},
            "--which": {
                "choices": ["newest", "best"],
                "default": "newest",
                "help": "Which saved step to judge.",
            },
            "--per-token": {
                "action": "store_true",
                "help": "Also what each token adds to the reward, and a page of coloured answers next to --output.",
            },
        },
    ),
    "export": Command(
        summary="Write a run's model as a Hugging Face directory.",
        run=_export,
        arguments={
            "run_dir": {"type": str, "help": "Run directory."},
            "out_dir": {"type": str, "help": "Directory to be made."},
            "--which": {"choices": ["newest", "best"], "default": "newest", "help": "Which saved step to take."},
            "--adapters": {"action": "store_true", "help": "Write the adapters alone, for PEFT; not merged."},
        },
    ),
    "data": Command(
        summary="What the data holds: counts, lengths, problems, one pair as the model sees it.",
        run=_data,
        config=DPOConfig,
        arguments={
            "--for": {"choices": list(CONFIG_OF), "default": "train", "help": "The command that the config is for."},
            "--step": {
                "type": PositiveInt,
                "default": None,
                "help": "Print the pairs of this step of metrics.jsonl instead.",
            },
        },
    ),
    "plan": Command(
        summary="Compile the train step ahead of time for a TPU topology: memory, and bounds on time and cost.",
        run=_plan,
        config=DPOConfig,
        arguments={
            "--topology": {
                "type": str,
                "required": True,
                "help": "The slice by its chips, v5e:4x4, or by its type, v5litepod-16; several with commas between.",
            },
            "--slices": {"type": PositiveInt, "default": 1, "help": "How many of them; mesh.data joins them."},
            "--rows": {"type": PositiveInt, "default": None, "help": "Rows of batch.row_length tokens a device."},
            "--lengths": {
                "type": str,
                "default": None,
                "help": "Mean tokens of prompt, chosen and rejected answer: 180,330,300. Default: rows are full.",
            },
            "--examples": {
                "type": PositiveInt,
                "default": None,
                "help": "Pairs of the data, for the hours of the run.",
            },
            "--data": {"action": "store_true", "help": "Read the config's data for lengths and pairs."},
            "--search": {"action": "store_true", "help": "If it does not fit, look for settings that do."},
            "--output": {"type": str, "default": None, "help": "All of it as JSON is written here."},
        },
    ),
    "sweep": Command(
        summary="Train once for each of several betas; a table of accuracy, margin and KL.",
        run=_sweep,
        config=DPOConfig,
        arguments={"--betas": {"type": str, "required": True, "help": "Numbers with commas between: 0.05,0.1,0.5"}},
    ),
    "quickstart": Command(
        summary="Both stages on a built-in task, without network, in about two minutes; with a report.",
        run=_quickstart,
        arguments={"--dir": {"type": str, "default": "runs/quickstart", "help": "Where the runs and the report go."}},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. A cause that the user can fix is one line on stderr."""
    open_descriptors()
    with lossy_streams() as (out, err):
        try:
            code = _outcome(list(sys.argv[1:] if argv is None else argv))
            out.flush()
            if code == 0 and out.lost is not None and not isinstance(out.lost, BrokenPipeError):
                print(f"dpo-jax: error: stdout: {reason(out.lost)}: the command's output is lost", file=sys.stderr)
                return 1
            return code
        finally:
            out.discard()
            err.discard()


def _outcome(argv: list[str]) -> int:
    try:
        _run(argv)
    except UserError as error:
        kind = "" if isinstance(error, Preempted) else "error: "
        print(f"dpo-jax: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dpo-jax: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(argv: list[str]) -> None:
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        if name.startswith("-"):
            _parser("").parse_args(argv)  # --help and --version end here
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise UserError(f"{name or 'COMMAND'}: there is no such command: {hint}" if name else f"which command? {hint}")
    command, rest = COMMANDS[name], argv[1:]
    overrides: dict[str, CommandLineText] = {}
    if command.config is not None:
        rest, overrides = split_overrides(rest, own={"--help", *command.arguments})
    given = _parser(name).parse_args([name, *rest])[name]
    names = [option.lstrip("-").replace("-", "_") for option in command.arguments]
    arguments = {name: given[name] for name in names}
    if command.config is not None:
        kind = CONFIG_OF[arguments.pop("for")] if "for" in arguments else command.config
        arguments["config"] = parse_config(given["config"], overrides, kind)
    command.run(**arguments)


def split_overrides(args: list[str], own: Collection[str]) -> tuple[list[str], dict[str, CommandLineText]]:
    """Take ``--section.key value`` and ``--section.key=value`` out of the arguments; of two alike the last counts."""
    rest: list[str] = []
    overrides: dict[str, CommandLineText] = {}
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if not word.startswith("--") or option in own:
            rest.append(word)
            continue
        value = value if equals else next(words, "--")
        if value.startswith("--") and not equals:
            raise UserError(f"{option}: it has no value: write {option} VALUE")
        overrides.pop(option[2:], None)
        overrides[option[2:]] = CommandLineText(value)
    return rest, overrides


class _Parser(jsonargparse.ArgumentParser):
    """Raises what is wrong as one line, for `main` to print."""

    called = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # the library puts the command's name before its arguments, and drops the dashes of those that are missing
        what, required, names = message.replace(f" {self.called}.", " ").partition("required: ")
        options = COMMANDS[self.called].arguments if self.called in COMMANDS else ()
        flags = {option.lstrip("-").replace("-", "_"): option for option in options}
        plain = what + required + ", ".join(flags.get(name, name) for name in names.split(", "))
        raise UserError(f"{plain}: see {' '.join(['dpo-jax', self.called]).rstrip()} --help") from ex


def _parser(called: str) -> jsonargparse.ArgumentParser:
    """The parser of all commands; the one that is called also explains its config's fields."""
    parser = _Parser(prog="dpo-jax", version=dpo_jax.__version__, allow_abbrev=False,
                     description="Align a language model with preferences, in JAX.")  # fmt: skip
    parser.called = called
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND", title="commands", description=None, help="")
    for name, command in COMMANDS.items():
        inner = _Parser(description=command.summary, allow_abbrev=False)
        inner.called = name
        if command.config is not None:
            inner.usage = f"dpo-jax {name} CONFIG.yaml [--section.key VALUE ...]"
            inner.add_argument("config", type=str, metavar="CONFIG.yaml", help="See docs/configuration.md.")
        for option, settings in command.arguments.items():
            inner.add_argument(option, **settings)
        if command.config is not None and name == called:
            _explain_fields(inner, command.config)
        subcommands.add_subcommand(name, inner, help=command.summary)
    return parser


def _explain_fields(parser: jsonargparse.ArgumentParser, config: type[TrainConfig]) -> None:
    """For --help only: overrides never reach the parser, they are read by `parse_config`."""
    for section in help_sections(config):
        group = parser.add_argument_group(f"{section.name}: {section.meaning.rstrip('.')}")
        for entry in section.fields:
            default = "must be given" if entry.default is None else f"default: {entry.default}"
            text = f"{entry.meaning} ({type_words(entry.type)}; {default})".replace("%", "%%")
            group.add_argument(f"--{entry.name}", metavar="VALUE", default=SUPPRESS, help=text)
