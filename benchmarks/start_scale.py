"""What a start costs on many pairs, and the report of many steps: CPU seconds, wall seconds and memory by part.

    python benchmarks/start_scale.py OUT [--pairs 1000000] [--steps 100000]

It makes the pairs, tokenizes them once, and then takes a second start apart: what `dpo-jax train` does on the host
before its first step, without imports and the model. Linux only, as peak memory is read from /proc. OUT is a folder
that does not exist. Figures of two commits are comparable only if made on the same machine in one go.
"""

import argparse
import json
import math
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_jax.batching.batches import set_batches, train_batches
from dpo_jax.batching.order import make_order
from dpo_jax.batching.sets import open_sets
from dpo_jax.config import DPOConfig
from dpo_jax.config.file import config_to_yaml, parse_config
from dpo_jax.data import sources
from dpo_jax.data.store import build_or_open_store, ids_by_source, open_store, split_held_out
from dpo_jax.reports.data_audit import audit
from dpo_jax.reports.run import write_report

WORDS = ("the", "a", "river", "stone", "light", "wind", "bird", "tree", "road", "house", "hand", "night", "day", "salt",
         "glass", "bread", "song", "field", "snow", "fire")  # fmt: skip
EVAL_KEYS = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
             "logps/rejected", "displacement", "kl", "mean_token_accuracy", "entropy")  # fmt: skip
STEP_KEYS = (*EVAL_KEYS[:7], "grad_norm", "learning_rate", "fill", "entropy", "mean_token_accuracy", "gradient_weight")


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Print a line of the table: what the block took, and by how much memory peaked above its start."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, cpu, wall = memory("VmRSS"), cpu_seconds(), time.perf_counter()
    yield
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    print(f"{part:34} {cpu:9.2f} {wall:9.2f} {memory('VmHWM') - before:9.0f}", flush=True)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_pairs(path: Path, number: int) -> None:
    """Pairs of random words, one in ten with the prompt of another; a few twice, a few with both labels."""
    chance = random.Random(0)
    text = lambda most: " ".join(chance.choices(WORDS, k=chance.randint(3, most)))  # noqa: E731
    with open(path, "w") as file:
        row = {"prompt": "", "chosen": "", "rejected": ""}
        for i in range(number):
            if i % 1000 == 998:
                row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            elif i % 1000 != 999:
                prompt = row["prompt"] if i % 10 == 9 else f"{i}: {text(10)}"
                row = {"prompt": prompt, "chosen": text(8), "rejected": text(8)}
            file.write(json.dumps(row) + "\n")


def measure_start(config: DPOConfig) -> None:
    """The parts of a second start, then all of them in one, and the audit."""
    data, run, tokenizer = config.data, config.run, byte_tokenizer()
    with timed("first start: tokenize"):
        built = build_or_open_store(Path(data.store), data.train, data, tokenizer, "dpo", data.workers)
    path = built.path
    del built
    with timed("hash the data files"):
        for source in data.train:
            sources.fingerprint(source)
    with timed("verify and open the store"):
        store = open_store(path)
    with timed("split off held-out pairs"):
        train_ids, _ = split_held_out(store, data.eval_fraction)
    with timed("order of the run"):
        length = {"batch": config.batch.size, "steps": run.steps, "epochs": run.epochs}
        groups = ids_by_source(store, train_ids)
        make_order(groups=groups, weights=None, seed=0, shuffle=True, **length).step_ids(0)
    del store, groups
    with timed("second start, whole"):
        sets = open_sets(data, run, tokenizer, "dpo", config.batch.size)
        batches = train_batches(sets, config.batch, 8)
        for eval_set in sets.evals.values():
            set_batches(eval_set.store, eval_set.ids, config.batch, 8)
        batches(0)
    with timed("audit (dpo-jax data)"):
        audit(sets, tokenizer)


def write_run(folder: Path, config: DPOConfig, steps: int) -> None:
    """A run directory as after so many logged steps and 50 evaluations, of noise around curves."""
    chance = random.Random(0)
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(config))
    value = lambda step, shift: math.exp(-step / steps + shift) * chance.lognormvariate(0, 0.3)  # noqa: E731
    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "timings.jsonl", "w") as timings:
        for step in range(steps + 1):
            if step % (steps // 50) == 0:
                row = {f"eval_held_out_{key}": value(step, i / 10) for i, key in enumerate(EVAL_KEYS)}
                metrics.write(json.dumps({"step": step, **row}) + "\n")
            if step:
                row = {key: value(step, i / 10) for i, key in enumerate(STEP_KEYS)}
                totals = {"epoch": step / steps, "num_tokens": step, "pairs": 8, "clipped": 0}
                metrics.write(json.dumps({"step": step, **row, **totals}) + "\n")
                speed = {"step_seconds": value(step, 0), "tokens_per_second": value(step, 5), "pairs_per_second": 8.0}
                timings.write(json.dumps({"step": step, **speed, "mfu": value(step, -2)}) + "\n")


def main() -> None:
    """Make pairs and logs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    pairs = args.out / "pairs.jsonl"
    config = parse_config(
        {
            "model": {"path": "made"},
            "data": {"train": str(pairs), "eval_fraction": 0.02, "max_length": 512, "store": str(args.out / "store")},
            "batch": {"pairs": 64},
            "run": {"dir": str(args.out / "run")},
        },
        {},
        DPOConfig,
    )
    assert isinstance(config, DPOConfig)
    print(f"{f'{args.pairs:,} pairs, {args.steps:,} steps':34} {'CPU s':>9} {'wall s':>9} {'MiB':>9}")
    if args.pairs:
        write_pairs(pairs, args.pairs)
        measure_start(config)
    if args.steps:
        write_run(args.out / "run", config, args.steps)
        with timed("report"):
            report = write_report(args.out / "run")
        print(f"{'report.html':34} {report.stat().st_size / 1e6:9.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
