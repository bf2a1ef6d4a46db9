"""Speed and memory of DPO, here and in TRL: the same model, the same pairs, the same steps.

    pip install -e '.[bench]'
    python benchmarks/vs_trl.py                       # a Llama of 15M parameters on HH pairs
    python benchmarks/vs_trl.py --setting curve       # stories260K, the model and pairs of TRL's reference curves
    python benchmarks/vs_trl.py --setting gpu --pairs hh.jsonl    # a Llama of 1.2B parameters in bfloat16, on one GPU

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

import numpy as np
from programs import PROGRAMS, SHAPES, timed_steps

from dpo_jax.models.families import decoder_config
from dpo_jax.models.flops import pairs_work, step_flops
from dpo_jax.parallel.chips import chip_of

SHARED = Path(__file__).parents[2] / "shared" / "data"
_CPU = {"model": None, "shape": "15m", "pairs": SHARED / "preference/hh_harmless_dev.jsonl", "max_length": 768,
        "steps": 30, "trl_steps": 12, "batch": 8, "trl_parts": 1, "device": "cpu", "dtype": "float32",
        "matrix": 0}  # fmt: skip
SETTINGS = {  # defaults that make one comparison
    "llama15m": _CPU,
    "curve": _CPU | {"model": SHARED / "models/stories260K", "pairs": SHARED / "reference_curves/pairs.jsonl",
                     "max_length": 1024, "steps": 20, "trl_steps": 20},
    "gpu": _CPU | {"shape": "1b", "steps": 24, "batch": 64, "trl_parts": 4, "device": "gpu", "dtype": "bfloat16",
                   "matrix": 8192},
}  # fmt: skip
BASELINE = "trl"
JOB = ("max_length", "batch", "dtype", "remat", "device", "trl_parts", "trl_attention")  # what the programs are told
LIVE = ("trl", "dpo_jax-live")  # the reference's forward pass is part of their steps
PACKAGES = ("dpo_jax", "jax", "jaxlib", "flax", "optax", "transformers", "datasets", "torch", "trl", "accelerate")
COLUMNS = {  # heading, format and key of each figure
    "pairs/s": ("8.3f", "pairs_per_second"),
    "s/step": ("8.3f", "step_seconds"),
    "reference s/pair": ("8.4f", "reference_seconds_per_pair"),
    "peak GiB": ("8.2f", "peak_gib"),
    "start s": ("8.1f", "start_seconds"),
    "of it compiling s": ("8.1f", "compile_seconds"),
}
RATES = {  # beside them where the rate of matrix products was measured
    "tokens/s": ("8.0f", "tokens_per_second"),
    "of measured rate": (".1%", "measured_mfu"),
    "of published rate": (".1%", "mfu"),
}


def main() -> None:
    """Make the inputs, run every program in turn, print the table, write the file."""
    options, about = parse_options(sys.argv[1:]), machine()
    versions = {name: version(name) for name in PACKAGES}
    if about["load_before"] > 0.5:
        print(f"load average is {about['load_before']:.1f}: times mean little on a busy machine", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="vs_trl_") as scratch:
        work = Path(scratch)
        if options.matrix:
            about["matrix"] = matrix_rate(options, work)
        pairs = read_pairs(options.pairs)
        model = options.model or made_model(work, pairs, options.shape)
        pairs = fitting(pairs, model, options.max_length)[: options.batch * options.steps]
        if len(pairs) < options.batch * options.steps:
            sys.exit(f"{options.pairs}: {len(pairs)} usable pairs, {options.steps} steps of {options.batch} need more")
        job = {key: getattr(options, key) for key in JOB} | {
            "model": str(model.resolve()),
            "pairs_file": str(write_pairs(work / "pairs.jsonl", pairs)),
        }
        runs = run_all(options, work, job)
        programs = summarize(runs, options.batch)
        if options.matrix:
            add_rates(programs, common_steps(runs), num_tokens(pairs, model), options.batch, model, about["matrix"])
        lengths = mean_lengths(pairs, model)
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": about,
        "versions": versions,
        "mean_tokens": lengths,
        "programs": programs,
        "runs": runs,
    }
    result["ratios"] = ratios(result["programs"])
    result["largest_loss_difference"] = loss_difference(runs)
    options.output.write_text(json.dumps(result, indent=1))
    print(table(result))
    print(f"all figures: {options.output}")


def run_all(options: argparse.Namespace, work: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of every run, the programs in turn."""
    runs = []
    for number in range(options.rounds):
        for name in options.programs:
            num_steps = options.trl_steps if name.startswith(BASELINE) else options.steps
            print(f"round {number + 1} of {options.rounds}: {name}, {num_steps} steps", file=sys.stderr, flush=True)
            python = sys.executable if name.startswith(BASELINE) else options.python
            figures = call(name, work, options.device, python, num_steps=num_steps, job=job)
            runs.append({"program": name, "round": number + 1, **figures})
    return runs


def parse_options(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given comes from the setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="llama15m")
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default, but in curve: random weights")
    parser.add_argument("--shape", choices=SHAPES, help="what is made where no model is given")
    parser.add_argument("--pairs", type=Path, help="JSON lines: HH transcripts, or prompt, chosen, rejected")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--steps", type=int, help="steps of dpo_jax; their pairs are the epoch of the reference pass")
    parser.add_argument("--trl-steps", type=int, help="steps of TRL, the first of the same")
    parser.add_argument("--batch", type=int, help="pairs in a step")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="gpu: the first that CUDA_VISIBLE_DEVICES leaves")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic; weights are float32")
    parser.add_argument("--remat", choices=("full", "none"), default="full",
                        help="full: both programs compute every layer again in the backward pass")  # fmt: skip
    parser.add_argument("--trl-parts", type=int, help="TRL's gradient accumulation: padding is to a part's longest")
    parser.add_argument("--trl-attention", default="sdpa", help="attn_implementation, such as flash_attention_2")
    parser.add_argument("--matrix", type=int, help="size of bfloat16 products whose rate is measured first; 0: none")
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
    if options.trl_parts < 1 or options.batch % options.trl_parts:
        parser.error(f"--trl-parts {options.trl_parts}: it must divide --batch, {options.batch}")
    if options.device == "gpu" and options.matrix < 1:
        parser.error(f"--matrix {options.matrix}: a GPU's rates are shares of what is measured first; give 8192")
    return options


def matrix_rate(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The device and its rate of matrix products; ends in one line where a program would find no GPU."""
    found = call("rate", work, options.device, options.python, device=options.device, size=options.matrix)
    if "missing" in found:
        sys.exit(f"--device {options.device}: JAX finds none here, {found['missing']}; "
                 "pip install '.[cuda]' on a machine with a GPU, or choose another --setting")  # fmt: skip
    import torch

    if options.device == "gpu" and not torch.cuda.is_available():
        sys.exit("--device gpu: PyTorch finds none here; install its CUDA build")
    return found


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


def made_model(work: Path, pairs: list[dict[str, str]], shape: str) -> Path:
    """Directory of the model of random weights, its tokenizer learned from all pairs."""
    return Path(call("model", work, "cpu", pairs_file=str(write_pairs(work / "all.jsonl", pairs)), shape=shape)["path"])


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


def call(name: str, work: Path, platform: str, python: str = sys.executable, **arguments: Any) -> dict[str, Any]:
    """Run a function of programs.py in a process of its own, with empty caches; what it returns."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=work))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one: TRL would spread over all it sees
    settings = {
        "JAX_PLATFORMS": "cuda,cpu" if platform == "gpu" else "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "CUDA_VISIBLE_DEVICES": gpu if platform == "gpu" else "",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    words = [python, str(Path(__file__).with_name("programs.py")), name, str(folder), json.dumps(arguments)]
    ended = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{name} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    return json.loads((folder / "result.json").read_text())


def common_steps(runs: list[dict[str, Any]]) -> list[int]:
    """Steps that every run timed."""
    common = sorted(set.intersection(*(timed_steps(run) for run in runs)))
    if not common:
        sys.exit("no step was timed in every run: give more --trl-steps")
    return common


def summarize(runs: list[dict[str, Any]], batch: int) -> dict[str, dict[str, float]]:
    """Medians over each program's runs, in the steps that every run timed."""
    common = common_steps(runs)
    for run in runs:
        run["step_seconds"] = statistics.mean(run["seconds"][step] for step in common)
        run["pairs_per_second"] = 1 / (run["step_seconds"] / batch + run["reference_seconds_per_pair"])
    names = dict.fromkeys(run["program"] for run in runs)
    own = {name: [run for run in runs if run["program"] == name] for name in names}
    figures = [key for _, key in COLUMNS.values()]
    return {name: {key: statistics.median(run[key] for run in own[name]) for key in figures} for name in names}


def add_rates(
    programs: dict[str, dict[str, Any]],
    steps: list[int],
    lengths: list[tuple[int, int, int]],
    batch: int,
    model: Path,
    matrix: dict[str, Any],
) -> None:
    """Add each program's rates in the steps timed: of tokens, a prompt counted once; of operations on real tokens.

    The operations are those of the program's own layout: TRL computes a prompt for each of its two answers. A chip that
    is not in `dpo_jax.parallel.chips` has no published rate.
    """
    config = decoder_config(json.loads((model / "config.json").read_text()))
    chip = chip_of(matrix["device"])
    own = np.concatenate([np.asarray(lengths)[step * batch : (step + 1) * batch] for step in steps])
    for name, figures in programs.items():
        layout = "repeated" if name.startswith(BASELINE) else "shared"
        work = pairs_work(own, own[:, 1:], layout=layout, windows=config.windows)
        flops = step_flops(config, work, live_reference=name in LIVE)
        seconds = figures["step_seconds"] * len(steps)
        figures["tokens_per_second"] = own.sum() / seconds
        figures["measured_mfu"] = flops / seconds / matrix["flops_per_second"]
        figures["mfu"] = flops / seconds / chip.peak_flops if chip else None


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
    matrix, columns = result["machine"].get("matrix"), COLUMNS | (RATES if result["settings"]["matrix"] else {})
    lines = [f"{result['machine']['cores']} cores, {result['machine']['cpu']}"]
    if matrix:
        rate, size = matrix["flops_per_second"] / 1e12, matrix["size"]
        lines.append(f"{matrix['device']}: {rate:.3g} TFLOP/s in bfloat16 products of {size} x {size} matrices")
    lines += [
        f"mean tokens: {lengths}; losses of a step differ by at most {result['largest_loss_difference']:.1e}",
        "",
        "| program | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, own in result["programs"].items():
        cells = ["unknown" if own[key] is None else f"{own[key]:{form}}" for form, key in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| ratio | speed | peak memory |", "|---|---:|---:|"]
    lines += [f"| {name} | {own['speed']:.2f}x | {own['memory']:.2f}x |" for name, own in result["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
