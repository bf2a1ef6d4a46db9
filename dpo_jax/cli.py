"""Command-line interface. Each command reads and checks its whole config before it imports anything heavy."""

import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
from jsonargparse.typing import PositiveInt

import dpo_jax
from dpo_jax.config import AnyConfig, DPOConfig, RewardConfig, SFTConfig, TrainConfig
from dpo_jax.config.docs import help_sections
from dpo_jax.config.file import COMMAND_OF, CommandLineText, parse_config
from dpo_jax.console import lossy_streams, open_descriptors
from dpo_jax.errors import Preempted, UserError, reason, require, suggestion

CONFIG_OF = {command: config for config, command in COMMAND_OF.items()}
INTERRUPTED = 130  # the shell's code for control-C

Which = Literal["newest", "best"]


def _train(config: AnyConfig) -> None:
    from dpo_jax.train import train

    train(config)


def _eval(config: DPOConfig, output: str, which: Which, per_token: bool) -> None:
    from dpo_jax.commands.evaluate import evaluate
    from dpo_jax.parallel.hosts import is_writer

    summary = evaluate(config, Path(output), which, per_token)
    if is_writer():
        text = json.dumps(summary, indent=2)
        number_list = r"\[\s+([^][{}]*?)\s+\]"  # printed on one line
        print(re.sub(number_list, lambda match: f"[{' '.join(match[1].split())}]", text))


def _export(run_dir: str, out_dir: str, which: Which, adapters: bool) -> None:
    from dpo_jax.commands.export import export

    export(Path(run_dir), Path(out_dir), which, adapters)


def _data(config: AnyConfig, step: int | None) -> None:
    from dpo_jax.commands.data import describe_data

    print(describe_data(config, step))


def _plan(config: DPOConfig, topology: str, search: bool, output: str | None, **load: Any) -> None:
    lengths, examples, data = load["lengths"], load["examples"], load["data"]
    require(lengths is None or not data, "--lengths", lengths, "--data measures the lengths; give one of the two")
    require(examples is None or not data, "--examples", examples, "--data counts the examples; give one of the two")
    steps = config.run.steps
    require(
        examples is None or steps is None, "--examples", examples, f"run.steps is {steps} already; give one of the two"
    )
    if output is not None:
        is_writable = Path(output).absolute().parent.is_dir() and not Path(output).is_dir()
        require(is_writable, "--output", output, "give a file in an existing folder")
    load["lengths"] = None if lengths is None else _mean_lengths(lengths)
    from dpo_jax.commands.evaluate import write_output
    from dpo_jax.plan.plan import Known, plan_slices
    from dpo_jax.plan.text import render, table

    plans = []
    for plan in plan_slices(config, topology.split(","), Known(**load), search):
        plans.append(plan)
        print(render(plan), end="\n\n", flush=True)
        if output is not None:
            write_output(Path(output), json.dumps(plans, indent=2) + "\n")
    if len(plans) > 1:
        print(table(plans))


def _mean_lengths(text: str) -> tuple[float, float, float]:
    match = re.fullmatch(r"(\d+),(\d+),(\d+)", text)
    if match is None or not all(map(int, match.groups())):
        raise UserError("--lengths", text, "write mean tokens of prompt, chosen and rejected answer as 180,330,300")
    return float(match[1]), float(match[2]), float(match[3])


def _sweep(config: DPOConfig, betas: str) -> None:
    try:
        values = [float(beta) for beta in betas.split(",")]
    except ValueError:
        raise UserError("--betas", betas, "write numbers separated by commas, 0.05,0.1,0.5") from None
    configs = [replace(config, loss=replace(config.loss, beta=value)) for value in values]  # checked before jax import
    from dpo_jax.commands.sweep import render, sweep
    from dpo_jax.parallel.hosts import is_writer

    rows = sweep(config, [variant.loss.beta for variant in configs])
    if is_writer():
        print(render(rows))


def _quickstart(dir: str) -> None:
    from dpo_jax.commands.quickstart import quickstart

    quickstart(Path(dir))


@dataclass(frozen=True)
class Command:
    """One command; `config` is the class of the config that it reads, None for a command without a config."""

    run: Callable[..., None]
    summary: str
    config: type[TrainConfig] | None = None
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> settings of argparse

    @property
    def names(self) -> dict[str, str]:
        """Name of each argument in Python -> name on the command line."""
        return {option.lstrip("-").replace("-", "_"): option for option in self.arguments}


WHICH: dict[str, Any] = {"choices": ["newest", "best"], "default": "newest"}
COMMANDS = {
    "train": Command(_train, "Train with Direct Preference Optimization.", DPOConfig),
    "sft": Command(_train, "Fine-tune with supervision, to make the model that train starts from.", SFTConfig),
    "reward": Command(_train, "Train a reward model on preference pairs.", RewardConfig),
    "eval": Command(
        _eval,
        "Score every evaluation pair, log-probs and rewards; print a summary as JSON.",
        DPOConfig,
        {
            "--output": {"type": str, "required": True, "help": "File to write: JSON lines, one per pair."},
            "--which": {**WHICH, "help": "Checkpoint to evaluate."},
            "--per-token": {"action": "store_true", "help": "Also each token's reward, and a page of colored answers."},
        },
    ),
    "export": Command(
        _export,
        "Write a run's model as a Hugging Face directory.",
        arguments={
            "run_dir": {"type": str, "help": "Run directory."},
            "out_dir": {"type": str, "help": "Directory to create."},
            "--which": {**WHICH, "help": "Checkpoint to export."},
            "--adapters": {"action": "store_true", "help": "Write the adapters alone, in PEFT's format, not merged."},
        },
    ),
    "data": Command(
        _data,
        "Audit the data: counts, lengths, problems, and one pair as the model sees it.",
        DPOConfig,
        {
            "--for": {"choices": list(CONFIG_OF), "default": "train", "help": "Command that the config is for."},
            "--step": {"type": PositiveInt, "help": "Print the pairs of this step of metrics.jsonl instead."},
        },
    ),
    "plan": Command(
        _plan,
        "Compile the train step ahead of time for a TPU topology: memory, and bounds on time and cost.",
        DPOConfig,
        {
            "--topology": {
                "type": str,
                "required": True,
                "help": "Slice, v5e:4x4 or v5litepod-16; or several, v5e:4x4,v6e:4x4.",
            },
            "--slices": {"type": PositiveInt, "default": 1, "help": "Number of slices, joined by mesh.data."},
            "--rows": {"type": PositiveInt, "help": "Rows of batch.row_length tokens per device."},
            "--lengths": {"type": str, "help": "Mean tokens of prompt, chosen, rejected: 180,330,300; else full rows."},
            "--examples": {"type": PositiveInt, "help": "Number of pairs, for the hours of the run."},
            "--data": {"action": "store_true", "help": "Read the config's data for lengths and number of pairs."},
            "--search": {"action": "store_true", "help": "If it does not fit, look for settings that do."},
            "--output": {"type": str, "help": "JSON file to write the plans to."},
        },
    ),
    "sweep": Command(
        _sweep,
        "Train once for each of several betas; print a table of accuracy, margin and KL.",
        DPOConfig,
        {"--betas": {"type": str, "required": True, "help": "Numbers separated by commas: 0.05,0.1,0.5."}},
    ),
    "quickstart": Command(
        _quickstart,
        "Run both stages on a built-in task, without network, in about two minutes, and write a report.",
        arguments={"--dir": {"type": str, "default": "runs/quickstart", "help": "Folder for the runs and the report."}},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; print a ``UserError`` as one line on stderr."""
    open_descriptors()
    with lossy_streams() as (out, err):
        try:
            code = _outcome(list(sys.argv[1:] if argv is None else argv))
            out.flush()
            if code == 0 and out.first_error is not None and not isinstance(out.first_error, BrokenPipeError):
                print(
                    f"dpo-jax: error: stdout: {reason(out.first_error)}: the command's output is lost", file=sys.stderr
                )
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
        hint = suggestion(name, COMMANDS)
        raise UserError(f"{name}: unknown command: {hint}" if name else f"give a command: {hint}")
    command, remaining = COMMANDS[name], argv[1:]
    overrides: dict[str, CommandLineText] = {}
    if command.config is not None:
        remaining, overrides = split_overrides(remaining, own={"--help", *command.arguments})
    namespace = _parser(name).parse_args([name, *remaining])[name]
    arguments = {name: namespace[name] for name in command.names}
    if command.config is not None:
        config_class = CONFIG_OF[arguments.pop("for")] if "for" in arguments else command.config
        arguments["config"] = parse_config(namespace["config"], overrides, config_class)
    command.run(**arguments)


def split_overrides(args: list[str], own: Collection[str]) -> tuple[list[str], dict[str, CommandLineText]]:
    """Separate arguments from overrides (``--section.key value`` or ``--section.key=value``); the last one wins."""
    remaining: list[str] = []
    overrides: dict[str, CommandLineText] = {}
    tokens = iter(args)
    for token in tokens:
        option, equals, value = token.partition("=")
        if not token.startswith("--") or option in own:
            remaining.append(token)
            continue
        value = value if equals else next(tokens, "--")
        if value.startswith("--") and not equals:
            raise UserError(f"{option}: the value is missing: write {option} VALUE")
        overrides.pop(option[2:], None)
        overrides[option[2:]] = CommandLineText(value)
    return remaining, overrides


class _Parser(jsonargparse.ArgumentParser):
    """Argument parser that raises usage errors as a one-line ``UserError``, which `main` prints."""

    called = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse prefixes arguments with the command's name and drops the dashes of missing ones
        summary, separator, names = message.replace(f" {self.called}.", " ").partition("required: ")
        flags = COMMANDS[self.called].names if self.called in COMMANDS else {}
        usage = summary + separator + ", ".join(flags.get(name, name) for name in names.split(", "))
        raise UserError(f"{usage}: see {' '.join(['dpo-jax', self.called]).rstrip()} --help") from ex


def _parser(called: str) -> jsonargparse.ArgumentParser:
    """Return the parser of all commands; only the help of the called command lists its config options."""
    description = "Align a language model with preferences, in JAX."
    parser = _Parser(prog="dpo-jax", version=dpo_jax.__version__, allow_abbrev=False, description=description)
    parser.called = called
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND", title="commands", description=None, help="")
    for name, command in COMMANDS.items():
        subparser = _Parser(description=command.summary, allow_abbrev=False)
        subparser.called = name
        if command.config is not None:
            subparser.usage = f"dpo-jax {name} CONFIG.yaml [options] [--section.key VALUE ...]"
            subparser.add_argument("config", type=str, metavar="CONFIG.yaml", help="See docs/configuration.md.")
        for option, settings in command.arguments.items():
            subparser.add_argument(option, **settings)
        if command.config is not None and name == called:
            _list_options(subparser, command.config)
        subcommands.add_subcommand(name, subparser, help=command.summary)
    return parser


def _list_options(parser: jsonargparse.ArgumentParser, config: type[TrainConfig]) -> None:
    """Add config options to ``--help``; `split_overrides` removes overrides before the parser sees them."""
    for section in help_sections(config):
        group = parser.add_argument_group(f"{section.name}: {section.meaning.rstrip('.')}")
        for entry in section.fields:
            default = "required" if entry.default is None else f"default: {entry.default}"
            text = f"{entry.meaning} ({entry.values}; {default})".replace("%", "%%")
            group.add_argument(f"--{entry.name}", metavar="VALUE", default=SUPPRESS, help=text)
