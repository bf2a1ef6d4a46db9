"""How long a start takes: from the command to the end of the first step, and to the end of a run of two steps.

    python benchmarks/start.py PAIRS.jsonl [--checkout PATH ...] [--rounds 3] [--python PYTHON]

A Llama of 15M parameters with a cached reference, 8 pairs a step, at most 768 tokens. ``cold`` is the first start of a
new user: nothing tokenized, no reference cached, nothing compiled. ``warm`` is the same command for another run
directory. ``wrong path`` is a model directory that does not exist, and ``import`` is ``import jax`` alone. Several
checkouts are alternated. PYTHON is the interpreter of an install of this project, by default the one that runs this.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from programs import make_model

ROOT = Path(__file__).parents[1]


def timed(command: list[str], checkout: Path, home: Path, code: int = 0, until: Path | None = None) -> list[float]:
    """Seconds until the log ``until`` has the line of a step, if it is given, and until the command ends."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "HOME": str(home), "JAX_PLATFORMS": "cpu"}
    found = []
    began = time.perf_counter()
    with subprocess.Popen(command, env=env, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            if until is not None and not found and until.is_file() and b'"grad_norm"' in until.read_bytes():
                found.append(time.perf_counter() - began)
            time.sleep(0.005)
        ended = time.perf_counter() - began
        assert process.returncode == code, process.stderr.read().decode()
    return [*found, ended]


def measure(python: str, checkout: Path, model: str, pairs: str) -> dict[str, float]:
    """Seconds of each part, in a home that is empty at first."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        config = {
            "model": {"path": model},
            "reference": {"mode": "cached"},
            "data": {"train": pairs, "max_length": 768, "store": str(home / "store")},
            "batch": {"pairs": 8},
            "run": {"dir": str(home / "run"), "steps": 2, "progress": False},
        }
        (home / "config.yaml").write_text(json.dumps(config))
        train = [python, "-m", "dpo_jax", "train", str(home / "config.yaml")]
        figures = {"import": timed([python, "-c", "import jax"], checkout, home)[0]}
        (figures["wrong path"],) = timed([*train, "--model.path", str(home / "missing")], checkout, home, 2)
        for start in ("cold", "warm"):
            run = home / start
            times = timed([*train, "--run.dir", str(run)], checkout, home, until=run / "metrics.jsonl")
            figures[f"{start}, first step"], figures[f"{start}, end"] = times
        return figures


def main() -> None:
    """Print the median of each figure for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--checkout", type=Path, nargs="+", default=[ROOT])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    pairs = str(Path(arguments.pairs).absolute())
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), pairs, "15m")["path"]
        rounds = [
            [measure(arguments.python, checkout.absolute(), model, pairs) for checkout in arguments.checkout]
            for _ in range(arguments.rounds)
        ]
    for checkout, figures in zip(arguments.checkout, zip(*rounds, strict=True), strict=True):
        print(checkout)
        for name in figures[0]:
            print(f"  {name:<18} {statistics.median(row[name] for row in figures):7.2f} s")


if __name__ == "__main__":
    main()
