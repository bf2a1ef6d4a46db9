"""Speed and memory of DPO on a CPU, here and in TRL: the same model, the same pairs, the same steps.

    pip install -e '.[bench]'
    python benchmarks/vs_trl.py                       # a Llama of 15M parameters on HH pairs
    python benchmarks/vs_trl.py --setting curve       # stories260K, the model and pairs of TRL's reference curves

What is measured, and how, is in README.md beside this file. Linux only: peaks are read from /proc.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from programs import PROGRAMS, timed_steps

SHARED = Path(__file__).parents[2] / "shared" / "data"
SETTINGS = {  # defaults that make one comparison
    "llama15m": {"model": None, "pairs": SHARED / "preference/hh_harmless_dev.jsonl", "max_length": 768, "steps": 30,
                 "trl_steps": 12},
    "curve": {"model": SHARED / "models/stories260K", "pairs": SHARED / "reference_curves/pairs.jsonl",
              "max_length": 1024, "steps": 20, "trl_steps": 20},
}  # fmt: skip
BASELINE = "trl"
PACKAGES = ("dpo_jax", "jax", "jaxlib", "flax", "optax", "transformers", "datasets", "torch", "trl", "accelerate")
COLUMNS = {  # heading, format and key of each figure
    "pairs/s": ("8.3f", "pairs_per_second"),
    "s/step": ("8.3f", "step_seconds"),
    "reference s/pair": ("8.4f", "reference_seconds_per_pair"),
    "peak GiB": ("8.2f", "peak_gib"),
    "start s": ("8.1f", "start_seconds"),
    "of it compiling s": ("8.1f", "compile_seconds"),
}


def main() -> None:
    """Make the inputs, run every program in turn, print the table, write the file."""
    options, about = parse_options(sys.argv[1:]), machine()
    versions = {name: version(name) for name in PACKAGES}
    if about["load_before"] > 0.5:
        print(f"load average is {about['load_before']:.1f}: times mean little on a busy machine", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as scratch:
        work = Path(scratch)
        pairs = read_pairs(options.pairs)
        model = options.model or made_model(work, pairs)
        pairs = fitting(pairs, model, options.max_length)[: options.batch * options.steps]
        if len(pairs) < options.batch * options.steps:
            sys.exit(f"{options.pairs}: {len(pairs)} usable pairs, {options.steps} steps of {options.batch} need more")
        job = {
            "model": str(model.resolve()),
            "pairs_file": str(write_pairs(work / "pairs.jsonl", pairs)),
            "max_length": options.max_length,
            "batch": options.batch,
        }
        runs: list[dict[str, Any]] = []
        for number in range(options.rounds):
            for name in options.programs:
                num_steps = options.trl_steps if name.startswith("trl") else options.steps
                print(f"round {number + 1} of {options.rounds}: {name}, {num_steps} steps", file=sys.stderr, flush=True)
                python = sys.executable if name.startswith(BASELINE) else options.python
                figures = call(name, work, python, num_steps=num_steps, **job)
                runs.append({"program": name, "round": number + 1, **figures})
        lengths = mean_lengths(pairs, model)
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": about,
        "versions": versions,
        "mean_tokens": lengths,
        "programs": summarise(runs, options.batch),
        "runs": runs,
    }
    result["ratios"] = ratios(result["programs"])
    result["largest_loss_difference"] = loss_difference(runs)
    options.output.write_text(json.dumps(result, indent=1))
    print(table(result))
    print(f"all figures: {options.output}")


def parse_options(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given comes from the setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="llama15m")
    parser.add_argument("--model", type=Path, help="Hugging Face directory; llama15m makes one of random weights")
    parser.add_argument("--pairs", type=Path, help="JSON lines: HH transcripts, or prompt, chosen, rejected")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--steps", type=int, help="steps of dpo_jax; their pairs are the epoch of the reference pass")
    parser.add_argument("--trl-steps", type=int, help="steps of TRL, the first of the same")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every program; figures are medians")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), metavar="NAME",
                        help=f"of {', '.join(PROGRAMS)}")  # fmt: skip
    parser.add_argument("--python", default=sys.executable, metavar="PATH",
                        help="interpreter for dpo_jax, of an install without PyTorch; default: this one")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("vs_trl.json"))
    options = parser.parse_args(words)
    for name, value in SETTINGS[options.setting].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 3 <= options.trl_steps <= options.steps:
        parser.error(f"--trl-steps {options.trl_steps}: at least 3, of which 1 is timed, and at most --steps")
    return options


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Pairs as prompt, chosen, rejected; transcripts are split at the last ``Assistant:`` and shuffled."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if "prompt" in rows[0]:
        return rows
    pairs = []
    for row in rows:
        prompt, chosen = split_transcript(row["chosen"])
        other, rejected = split_transcript(row["rejected"])
        if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    random.Random(0).shuffle(pairs)  # so that the first ones are a fair sample of the file
    return pairs


def split_transcript(text: str) -> tuple[str, str]:
    """A dialogue as (prompt, last answer)."""
    prompt, mark, answer = text.rpartition("\n\nAssistant:")
    return prompt + mark, answer


def made_model(work: Path, pairs: list[dict[str, str]]) -> Path:
    """Directory of the model of random weights, its tokenizer learned from all pairs."""
    return Path(call("model", work, pairs_file=str(write_pairs(work / "all.jsonl", pairs)))["path"])


def fitting(pairs: list[dict[str, str]], model: Path, max_length: int) -> list[dict[str, str]]:
    """Pairs that neither program cuts or drops, so that step k holds the same tokens in both."""
    return [pair for pair, (prompt, chosen, rejected) in zip(pairs, num_tokens(pairs, model), strict=True)
            if prompt + max(chosen, rejected) <= max_length]  # fmt: skip


def num_tokens(pairs: list[dict[str, str]], model: Path) -> list[tuple[int, int, int]]:
    """Tokens of each pair's prompt and answers, end-of-sequence included."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    prompts = [len(one.ids) for one in tokenizer.encode_batch([pair["prompt"] for pair in pairs])]
    whole = [[len(one.ids) + 1 for one in tokenizer.encode_batch([pair["prompt"] + pair[key] for pair in pairs])]
             for key in ("chosen", "rejected")]  # fmt: skip
    return [(n, a - n, b - n) for n, a, b in zip(prompts, *whole, strict=True)]


def mean_lengths(pairs: list[dict[str, str]], model: Path) -> dict[str, float]:
    """Mean tokens of prompt, chosen and rejected."""
    columns = zip(("prompt", "chosen", "rejected"), zip(*num_tokens(pairs, model), strict=True), strict=True)
    return {name: round(statistics.mean(own), 1) for name, own in columns}


def write_pairs(path: Path, pairs: list[dict[str, str]]) -> Path:
    """The pairs as JSON lines."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def call(name: str, work: Path, python: str = sys.executable, **arguments: Any) -> dict[str, Any]:
    """Run a function of programs.py in a process of its own, with empty caches; what it returns."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=work))
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    words = [python, str(Path(__file__).with_name("programs.py")), name, str(folder), json.dumps(arguments)]
    ended = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{name} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    return json.loads((folder / "result.json").read_text())


def summarise(runs: list[dict[str, Any]], batch: int) -> dict[str, dict[str, float]]:
    """Medians over each program's runs, in the steps that every run timed."""
    common = sorted(set.intersection(*(timed_steps(run) for run in runs)))
    if not common:
        sys.exit("no step was timed in every run: give more --trl-steps")
    for run in runs:
        run["step_seconds"] = statistics.mean(run["seconds"][step] for step in common)
        run["pairs_per_second"] = 1 / (run["step_seconds"] / batch + run["reference_seconds_per_pair"])
    names = dict.fromkeys(run["program"] for run in runs)
    own = {name: [run for run in runs if run["program"] == name] for name in names}
    figures = [key for _, key in COLUMNS.values()]
    return {name: {key: statistics.median(run[key] for run in own[name]) for key in figures} for name in names}


def ratios(programs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Speed (larger is better) and peak memory (smaller is better) of each program over each of TRL's."""
    return {
        f"{name} / {base}": {
            "speed": own["pairs_per_second"] / other["pairs_per_second"],
            "memory": own["peak_gib"] / other["peak_gib"],
        }
        for base, other in programs.items()
        for name, own in programs.items()
        if base.startswith(BASELINE) and not name.startswith(BASELINE)
    }


def loss_difference(runs: list[dict[str, Any]]) -> float:
    """Largest difference between any two runs' losses of one step: that all did the same work."""
    return max(max(losses) - min(losses) for losses in zip(*(run["losses"] for run in runs), strict=False))


def machine() -> dict[str, Any]:
    """What this runs on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.machine(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lengths = ", ".join(f"{name} {value}" for name, value in result["mean_tokens"].items())
    lines = [
        f"{result['machine']['cores']} cores, {result['machine']['cpu']}",
        f"mean tokens: {lengths}; losses of a step differ by at most {result['largest_loss_difference']:.1e}",
        "",
        "| program | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, own in result["programs"].items():
        lines.append(f"| {name} | " + " | ".join(f"{own[key]:{form}}" for form, key in COLUMNS.values()) + " |")
    lines += ["", "| ratio | speed | peak memory |", "|---|---:|---:|"]
    lines += [f"| {name} | {own['speed']:.2f}x | {own['memory']:.2f}x |" for name, own in result["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
