"""The commands as a shell sees them: exit codes, one line on stderr, nothing lasting before the config is right."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_jax import __version__, cli
from dpo_jax.errors import Preempted, RunStopped, UserError

ROOT = Path(__file__).parents[1]
CONFIG = "model: {path: m}\ndata: {train: pairs.jsonl}\nrun: {dir: runs/x}\n"


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    """A right config in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    return "c.yaml"


def outcome(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


# (arguments, the line): each another way to be wrong
WRONG = [
    ("", f"give a command: choose from {', '.join(cli.COMMANDS)}"),
    ("trian c.yaml", "trian: unknown command: did you mean train?"),
    ("dance", "dance: unknown command: choose from train, sft, reward, ppo, eval, generate, export, data, plan, sweep"),
    ("--verbose", "unrecognized arguments: --verbose: see dpo-jax --help"),
    ("train", "the following arguments are required: config: see dpo-jax train --help"),
    ("train c.yaml more", "unrecognized arguments: more: see dpo-jax train --help"),
    ("train nope.yaml", "nope.yaml: config file not found"),
    ("train c.yaml --loss.beta", "--loss.beta: the value is missing: write --loss.beta VALUE"),
    ("train c.yaml --loss.beta --run.steps 3", "--loss.beta: the value is missing: write --loss.beta VALUE"),
    ("train c.yaml --run.stepz 3", "run.stepz: unknown option: did you mean run.steps?"),
    ("train c.yaml --batch.pairs 1.5", "batch.pairs must be an integer, got 1.5"),
    ("train c.yaml --beta=0.1", "beta: unknown option: did you mean loss.beta?"),
    ("sft c.yaml --loss.beta 0.1", "loss: belongs to `dpo-jax train`, not to `dpo-jax sft`: remove it"),
    ("eval c.yaml", "the following arguments are required: --output: see dpo-jax eval --help"),
    ("export runs/x", "the following arguments are required: out_dir: see dpo-jax export --help"),
    ("export runs/x out --which newst", "invalid choice: 'newst' (choose from 'newest', 'best')"),
    ("data c.yaml --step 0", "0 does not conform to restriction v>0: see dpo-jax data --help"),
    ("data c.yaml --for pop", "invalid choice: 'pop' (choose from 'train', 'sft', 'reward', 'ppo')"),
    ("data c.yaml --for ppo --loss.beta 1", "loss: belongs to `dpo-jax train`, not to `dpo-jax ppo`: remove it"),
    ("data c.yaml --for sft --loss.beta 1", "loss: belongs to `dpo-jax train`, not to `dpo-jax sft`: remove it"),
    ("doctor --run.steps 3", "--run.steps: it sets an option of a config file: add CONFIG.yaml"),
    ("quickstart here", "unrecognized arguments: here: see dpo-jax quickstart --help"),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG, ids=[arguments or "nothing" for arguments, _ in WRONG])
def test_wrong_usage_is_one_line(capsys, config, arguments, line):
    code, out, err = outcome(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("dpo-jax: error: ")
    assert err.count("\n") == 1
    assert line in err
    assert [path.name for path in Path.cwd().iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--loss.beta", "-1", "loss.beta must be positive, got -1.0"),
        ("--model.path", "./no", "model.path: ./no does not exist; give a directory, a hub name or builtin:tiny"),
        ("--data.train", "no.jsonl", "no.jsonl: no such file; the working directory is {}"),
        (
            "--model.path",
            "~no/m",
            "model.path: ~no/m does not exist; give a directory, a hub name or builtin:tiny",
        ),
    ],
)
def test_a_wrong_config_is_refused_before_jax_is_imported(config, option, value, line):
    code = "import sys; from dpo_jax import cli; print(cli.main(sys.argv[1:]), 'jax' in sys.modules)"
    command = [sys.executable, "-c", code, "train", config, option, value]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "2 False\n"
    assert done.stderr == f"dpo-jax: error: {line.format(Path.cwd())}\n"
    assert [path.name for path in Path.cwd().iterdir()] == ["c.yaml"]


def test_doctor_reads_the_config_itself(config, monkeypatch):
    given = []
    monkeypatch.setitem(cli.COMMANDS, "doctor", replace(cli.COMMANDS["doctor"], run=lambda **all: given.append(all)))
    assert cli.main(["doctor"]) == cli.main(["doctor", config, "--json", "--run.seed", "3"]) == 0
    assert given[0] == {"config": None, "json": False}
    assert (given[1]["config"]().run.seed, given[1]["json"]) == (3, True)
    assert cli.main(["doctor", config, "--for", "sft", "--loss.beta", "3"]) == 0
    with pytest.raises(UserError, match="loss: belongs to `dpo-jax train`"):
        given[2]["config"]()


@pytest.mark.parametrize("error", [UserError, Preempted, RunStopped])
def test_what_a_command_raises_is_its_line_and_exit_code(capsys, config, monkeypatch, error):
    def run(**_):
        raise error("the run: 3\ncannot go on")

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(summary="", run=run, config=cli.DPOConfig))
    kind = "" if error is Preempted else "error: "  # a run that was asked to stop and did is no error
    assert outcome(capsys, "train", config) == (error.exit_code, "", f"dpo-jax: {kind}the run: 3 cannot go on\n")
    assert (UserError.exit_code, Preempted.exit_code, RunStopped.exit_code) == (2, 42, 43)


def test_control_c_ends_with_130(capsys, config, monkeypatch):
    def run(**_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(summary="", run=run, config=cli.DPOConfig))
    assert outcome(capsys, "train", config) == (130, "", "dpo-jax: interrupted\n")


def test_output_that_cannot_be_written_costs_no_work(config, monkeypatch):
    done = []

    def run(**_):
        print("found \ud800 日本")
        print("noticed", file=sys.stderr)
        done.append(True)

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(summary="", run=run, config=cli.DPOConfig))

    def code(out, err):
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return cli.main(["train", config])

    def left():  # a pipe whose reader has gone
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w")

    with left() as out, left() as err:
        assert code(out, err) == 0
    assert code(None, None) == 0
    with open("out", "w", encoding="ascii") as out, open("err", "w") as err:
        assert code(out, err) == 0
    assert Path("out").read_text() == "found \\ud800 \\u65e5\\u672c\n"
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as out, open("err", "w") as err:
            assert code(out, err) == 1  # what it found is lost, and nobody chose that
        lost = "dpo-jax: error: stdout: [Errno 28] No space left on device: the output is lost\n"
        assert Path("err").read_text() == f"noticed\n{lost}"
    assert len(done) == 3 + Path("/dev/full").exists()


def test_descriptors_closed_at_the_start_are_no_file_of_the_run(tmp_path):
    code = "import os, dpo_jax.console as c; c.open_descriptors(); print(os.open('f', 65), file=open('n', 'w'))"
    shell = f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert int((tmp_path / "n").read_text()) > 2


def test_a_fault_of_the_program_is_not_hidden(config, monkeypatch):
    def run(**_):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(summary="", run=run, config=cli.DPOConfig))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", config])


@pytest.mark.parametrize("name", ["train", "sft", "eval", "data"])
def test_arguments_and_overrides_reach_the_command(capsys, config, monkeypatch, name):
    given = {}
    command = cli.COMMANDS[name]
    own = {"eval": ["--output", "o.jsonl"], "data": ["--step", "7"]}.get(name, [])
    seen = cli.Command(
        summary="", run=lambda **all: given.update(all), config=command.config, arguments=command.arguments
    )
    monkeypatch.setitem(cli.COMMANDS, name, seen)
    overrides = ["--run.seed=3", "--mesh.fsdp", "-1", "--run.seed", "4", "--data.eval.x", "e.jsonl"]
    assert outcome(capsys, name, *overrides, config, *own) == (0, "", "")
    assert (given["config"].run.seed, given["config"].mesh.fsdp) == (4, -1)
    assert given["config"].data.eval["x"].path == "e.jsonl"
    assert isinstance(given["config"], command.config)
    assert (given.get("output"), given.get("step")) == (
        ("o.jsonl" if name == "eval" else None),
        7 if name == "data" else None,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], *[[name, "--help"] for name in cli.COMMANDS], ["train", "c.yaml", "-h"]]
)
def test_help_on_all_levels(capsys, config, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    name = arguments[0]
    if name == "--help":
        assert all(command.summary in said for command in cli.COMMANDS.values())
    else:
        assert cli.COMMANDS[name].summary in said
    if name == "train":
        assert "--loss.beta VALUE Weight of the KL term; larger keeps the policy closer" in said
        assert "(a number; positive; default: 0.1)" in said
        assert "--data.train.0.path" in said
    if name == "sft":
        assert "--batch.examples VALUE" in said
        assert "--loss.beta" not in said


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dpo-jax {__version__}\n"


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "dpo_jax", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("dpo-jax: error: nope: unknown command")
