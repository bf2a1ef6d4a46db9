"""Command-line interface. Each command checks its whole config before it imports heavy libraries."""

import json
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
from jsonargparse.typing import PositiveInt

import dpo_jax
from dpo_jax.bucket import is_remote
from dpo_jax.config import (
    AnyConfig,
    DPOConfig,
    GenerateConfig,
    PairConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from dpo_jax.config.compare import CompareConfig
from dpo_jax.config.docs import NO_SECTION, help_sections
from dpo_jax.config.file import COMMAND_OF, CommandLineText, parse_config
from dpo_jax.config.section import Section
from dpo_jax.console import lossy_streams, open_descriptors
from dpo_jax.errors import Preempted, UserError, reason, require, suggestion
from dpo_jax.signals import ending_signals, outcome

CONFIG_OF = {command: config for config, command in COMMAND_OF.items() if issubclass(config, TrainConfig)}

CheckpointChoice = Literal["newest", "best"]


def _train(config: AnyConfig) -> None:
    _refuse_missing(config)
    from dpo_jax.train import train

    train(config)


def _refuse_missing(config: AnyConfig) -> None:
    """Refuse local paths that do not exist before JAX is imported, which takes longer."""
    from dpo_jax.data import sources
    from dpo_jax.weights import hub

    hub.refuse_missing(config.model.path)
    for source in (*config.data.train, *config.data.eval.values()):
        sources.refuse_missing(source)


def _eval(config: PairConfig, output: str, which: CheckpointChoice, per_token: bool) -> None:
    from dpo_jax.commands.evaluate import evaluate
    from dpo_jax.parallel.hosts import is_writer

    summary = evaluate(config, output, which, per_token)
    if is_writer():
        number_list = r"\[\s+([^][{}]*?)\s+\]"  # printed on one line
        print(re.sub(number_list, lambda match: f"[{' '.join(match[1].split())}]", json.dumps(summary, indent=2)))


def _generate(config: GenerateConfig, output: str) -> None:
    from dpo_jax.commands.generate import generate_answers

    generate_answers(config, output)


def _export(run_dir: str, out_dir: str, which: CheckpointChoice, adapters: bool) -> None:
    from dpo_jax.commands.export import export

    export(run_dir, out_dir, which, adapters)


def _data(config: AnyConfig, step: int | None) -> None:
    from dpo_jax.commands.data import describe_data

    print(describe_data(config, step))


def _plan(config: PairConfig | PPOConfig, topology: str, search: bool, output: str | None, **inputs: Any) -> None:
    lengths, data, steps = inputs["lengths"], inputs["data"], config.run.steps
    for name, is_known, cause in (
        ("lengths", data, "--data measures the lengths"),
        ("examples", data, "--data counts the examples"),
        ("examples", steps is not None, f"run.steps is already {steps}"),
    ):
        require(inputs[name] is None or not is_known, f"--{name}", inputs[name], f"{cause}; give one of the two")
    if output is not None:
        is_writable = Path(output).absolute().parent.is_dir() and not Path(output).is_dir()
        require(is_writable, "--output", output, "give a file in an existing, writable folder")
    if lengths is not None:
        parts, example = "prompt, chosen and rejected answer", "180,330,300"
        if config.judge is not None:
            parts, example = "prompt and answer", "180,150"
        is_list = re.fullmatch(r"\d+(,\d+)*", lengths) and lengths.count(",") == example.count(",")
        values = tuple(map(float, lengths.split(","))) if is_list else ()
        require(all((values, *values)), "--lengths", lengths, f"give mean tokens of {parts}, such as {example}")
        inputs["lengths"] = values
    from dpo_jax.plan.plan import Inputs, plan_slices
    from dpo_jax.plan.text import render, table
    from dpo_jax.runs.output_file import write_output

    plans = []
    for plan in plan_slices(config, topology.split(","), Inputs(**inputs), search):
        plans.append(plan)
        print(render(plan), end="\n\n", flush=True)
        if output is not None:
            write_output(output, json.dumps(plans, indent=2) + "\n")
    if len(plans) > 1:
        print(table(plans))


def _sweep(config: DPOConfig, betas: str) -> None:
    try:
        values = [float(beta) for beta in betas.split(",")]
    except ValueError:
        raise UserError("--betas", betas, "write numbers separated by commas, such as 0.05,0.1,0.5") from None
    configs = [replace(config, loss=replace(config.loss, beta=value)) for value in values]  # checked before jax import
    _refuse_missing(config)
    from dpo_jax.commands.sweep import render, sweep
    from dpo_jax.parallel.hosts import is_writer

    rows = sweep(config, [variant.loss.beta for variant in configs])
    if is_writer():
        print(render(rows))


def _quickstart(dir: str) -> None:
    require(not is_remote(dir), "--dir", dir, "give a local folder")
    from dpo_jax.commands.quickstart import quickstart

    quickstart(Path(dir))


def _compare(config: CompareConfig | None, dir: str | None) -> None:
    if config is None:
        require(not is_remote(dir), "--dir", dir, "give a local folder")
        from dpo_jax.commands.compare import compare

        compare(Path(dir or "runs/compare"))
        return
    require(dir is None, "--dir", dir, "it is for the built-in task; with --config, set run.dir")
    from dpo_jax.commands.comparison import compare_methods

    compare_methods(config)


def _doctor(config: Callable[[], AnyConfig] | None, json: bool) -> None:
    from dpo_jax.commands.doctor.doctor import doctor

    doctor(config, as_object=json)


@dataclass(frozen=True)
class Command:
    """A subcommand: its function, summary, config class and arguments."""

    run: Callable[..., None]
    summary: str
    config: type[Section] | None = None  # class of the config that the command reads, if it reads one
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> settings for argparse
    usage: str = "CONFIG.yaml [options] [--section.key VALUE ...]"
    lazy_config: bool = False  # pass `run` a function that reads the config

    @property
    def needs_config(self) -> bool:
        """Whether the config file is a required argument, rather than one of its own ``arguments``."""
        return self.config is not None and self.arguments.keys().isdisjoint({"config", "--config"})

    @property
    def names(self) -> dict[str, str]:
        """Map each argument's name in Python to its name on the command line."""
        return {option.lstrip("-").replace("-", "_"): option for option in self.arguments}


# Settings for argparse that several arguments share.
TEXT: dict[str, Any] = {"type": str}
REQUIRED: dict[str, Any] = {**TEXT, "required": True}
COUNT: dict[str, Any] = {"type": PositiveInt}
FLAG: dict[str, Any] = {"action": "store_true"}
FOR: dict[str, Any] = {"default": "train", "help": "Command to which the config belongs."}
OF_PAIRS: dict[str, Any] = {"choices": ["train", "reward"], **FOR}
WHICH: dict[str, Any] = {"choices": ["newest", "best"], "default": "newest"}
COMMANDS = {
    "train": Command(_train, "Train with Direct Preference Optimization.", DPOConfig),
    "sft": Command(_train, "Run supervised fine-tuning, to make the model that train starts from.", SFTConfig),
    "reward": Command(_train, "Train a reward model on preference pairs.", RewardConfig),
    "ppo": Command(_train, "Train on sampled answers by policy gradients: PPO or RLOO.", PPOConfig),
    "eval": Command(
        _eval,
        "Compute the rewards of every evaluation pair, and for DPO its log-probs; print a summary as JSON.",
        DPOConfig,
        {
            "--for": OF_PAIRS,
            "--output": {**REQUIRED, "help": "File to write, local or gs://..., with one JSON line per pair."},
            "--which": {**WHICH, "help": "Checkpoint to evaluate."},
            "--per-token": {**FLAG, "help": "Add each token's reward, and a page of colored answers."},
        },
    ),
    "generate": Command(
        _generate,
        "Generate answers to prompts; score them with a reward model, and make pairs of them, on request.",
        GenerateConfig,
        {"--output": {**REQUIRED, "help": "File to write, local or gs://..., with one JSON line per prompt."}},
    ),
    "export": Command(
        _export,
        "Write a run's model as a Hugging Face directory.",
        arguments={
            "run_dir": {**TEXT, "help": "Run directory, local or gs://..."},
            "out_dir": {**TEXT, "help": "Directory to create, local or gs://..."},
            "--which": {**WHICH, "help": "Checkpoint to export."},
            "--adapters": {**FLAG, "help": "Write only the adapters, in PEFT's format."},
        },
    ),
    "data": Command(
        _data,
        "Audit the data: counts, lengths, problems, and one example as the model sees it.",
        DPOConfig,
        {
            "--for": {"choices": [*CONFIG_OF], **FOR},
            "--step": {**COUNT, "help": "Print the examples of this step (as in metrics.jsonl) instead."},
        },
    ),
    "plan": Command(
        _plan,
        "Compile the train step ahead of time for a TPU topology: memory, and bounds on time and cost.",
        DPOConfig,
        {
            "--for": {"choices": ["train", "reward", "ppo"], **FOR},
            "--topology": {**REQUIRED, "help": "TPU slice, as v5e:4x4 or v5litepod-16, or several: v5e:4x4,v6e:4x4."},
            "--slices": {**COUNT, "default": 1, "help": "Number of slices, joined by mesh.data."},
            "--rows": {**COUNT, "help": "Rows of batch.row_length tokens per device."},
            "--lengths": {
                **TEXT,
                "help": "Mean tokens of prompt, chosen, rejected, as 180,330,300; default: full rows. "
                "For ppo and data.online, of prompt and answer, as 180,150; default: the most that they may have.",
            },
            "--examples": {**COUNT, "help": "Number of pairs or prompts in the data, to estimate the run's hours."},
            "--data": {**FLAG, "help": "Measure lengths and number of pairs or prompts in the config's data."},
            "--search": {**FLAG, "help": "If the step does not fit in memory, search for settings that do."},
            "--output": {**TEXT, "help": "JSON file to write the plans to."},
        },
    ),
    "sweep": Command(
        _sweep,
        "Train once for each of several betas; print a table of accuracy, margin and KL.",
        DPOConfig,
        {"--betas": {**REQUIRED, "help": "Numbers separated by commas: 0.05,0.1,0.5."}},
    ),
    "compare": Command(
        _compare,
        "Compare DPO, reward models, PPO and others on a task whose optimum is known, or on your own; write a page.",
        CompareConfig,
        {
            "--dir": {**TEXT, "help": "Folder for the page of the built-in task; default: runs/compare."},
            "--config": {**TEXT, "metavar": "CONFIG.yaml", "help": "Compare on your own model, pairs and judge."},
        },
        usage="[--dir DIR | --config CONFIG.yaml [--section.key VALUE ...]]",
    ),
    "doctor": Command(
        _doctor,
        "Check this machine, its devices, bucket and config; print each problem with a remedy.",
        DPOConfig,
        {
            "config": {**TEXT, "nargs": "?", "metavar": "CONFIG.yaml", "help": "Check what a run of it needs, too."},
            "--for": {"choices": [*CONFIG_OF], **FOR},
            "--json": {**FLAG, "help": "Print one JSON object without secrets, for bug reports."},
        },
        usage="[CONFIG.yaml] [options] [--section.key VALUE ...]",
        lazy_config=True,
    ),
    "quickstart": Command(
        _quickstart,
        "Run SFT, then DPO, on a built-in task, without network, in about two minutes, and write a report.",
        arguments={"--dir": {**TEXT, "default": "runs/quickstart", "help": "Folder for the runs and the report."}},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; a ``UserError`` is printed as one line on stderr."""
    open_descriptors()
    with ending_signals(), lossy_streams() as (out, err):
        try:
            code = _outcome(list(sys.argv[1:] if argv is None else argv))
            out.flush()
            if code == 0 and out.first_error is not None and not isinstance(out.first_error, BrokenPipeError):
                print(f"dpo-jax: error: stdout: {reason(out.first_error)}: the output is lost", file=sys.stderr)
                return 1
            return code
        finally:
            out.discard()
            err.discard()


def _outcome(argv: list[str]) -> int:
    try:
        _run(argv)
    except UserError as error:
        prefix = "" if isinstance(error, Preempted) else "error: "
        print(f"dpo-jax: {prefix}{' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        line, exit_code = outcome(stopped)
        print(line, file=sys.stderr)
        return exit_code
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
        remaining, overrides = split_overrides(remaining, {"--help", *command.arguments})
    namespace = _parser(name).parse_args([name, *remaining])[name]
    arguments = {name: namespace[name] for name in command.names}
    if command.config is not None:
        config_class = CONFIG_OF[arguments.pop("for")] if "for" in arguments else command.config
        path = namespace["config"]
        require(path is None or not is_remote(path), "CONFIG.yaml", path, "give a local file")
        if path is None and overrides:
            given = "--config CONFIG.yaml" if "--config" in command.arguments else "CONFIG.yaml"
            raise UserError(f"--{next(iter(overrides))}: it sets an option of a config file: add {given}")
        read_config = partial(parse_config, path, overrides, config_class)
        if path is None:
            arguments["config"] = None
        else:
            arguments["config"] = read_config if command.lazy_config else read_config()
    command.run(**arguments)


def split_overrides(args: list[str], own_options: Collection[str]) -> tuple[list[str], dict[str, CommandLineText]]:
    """Split off the config overrides, ``--section.key value`` or ``--section.key=value``; a key's last value wins."""
    remaining: list[str] = []
    overrides: dict[str, CommandLineText] = {}
    arguments = iter(args)
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not argument.startswith("--") or option in own_options:
            remaining.append(argument)
            continue
        value = value if equals else next(arguments, "--")
        if value.startswith("--") and not equals:
            raise UserError(f"{option}: the value is missing: write {option} VALUE")
        overrides.pop(option[2:], None)
        overrides[option[2:]] = CommandLineText(value)
    return remaining, overrides


class _Parser(jsonargparse.ArgumentParser):
    """Argument parser that raises a one-line ``UserError`` for a usage error."""

    command_name = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse prefixes arguments with the command's name and drops the dashes of missing ones
        summary, separator, names_text = message.replace(f" {self.command_name}.", " ").partition("required: ")
        flag_names = COMMANDS[self.command_name].names if self.command_name in COMMANDS else {}
        problem = summary + separator + ", ".join(flag_names.get(name, name) for name in names_text.split(", "))
        raise UserError(f"{problem}: see {f'dpo-jax {self.command_name}'.rstrip()} --help") from ex


def _parser(command_name: str) -> jsonargparse.ArgumentParser:
    """Return the parser of all commands; only the help of ``command_name`` lists its config options."""
    description = "Align a language model with preferences, in JAX."
    parser = _Parser(prog="dpo-jax", version=dpo_jax.__version__, allow_abbrev=False, description=description)
    parser.command_name = command_name
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND", title="commands", description=None, help="")
    for name, command in COMMANDS.items():
        subparser = _Parser(description=command.summary, allow_abbrev=False)
        subparser.command_name = name
        if command.config is not None:
            subparser.usage = f"dpo-jax {name} {command.usage}"
        if command.needs_config:
            subparser.add_argument("config", type=str, metavar="CONFIG.yaml", help="See docs/configuration.md.")
        for option, settings in command.arguments.items():
            subparser.add_argument(option, **settings)
        if command.config is not None and name == command_name:
            for section in help_sections(command.config):  # only for the help: `split_overrides` takes overrides out
                group = subparser.add_argument_group(f"{section.name or NO_SECTION}: {section.meaning.rstrip('.')}")
                for entry in section.fields:
                    default_text = "required" if entry.default is None else f"default: {entry.default}"
                    text = f"{entry.meaning} ({entry.values}; {default_text})".replace("%", "%%")
                    group.add_argument(f"--{entry.name}", metavar="VALUE", default=SUPPRESS, help=text)
        subcommands.add_subcommand(name, subparser, help=command.summary)
    return parser
