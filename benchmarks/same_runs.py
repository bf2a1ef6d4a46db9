"""Hashes of what small runs leave behind: run it at two commits to show that a change of structure alters no bit.

    python benchmarks/same_runs.py MODEL PAIRS OUT > before.txt     # at one commit
    python benchmarks/same_runs.py MODEL PAIRS OUT2 > after.txt     # at another, on the same machine
    diff before.txt after.txt

It uses the command line alone, so that it runs at any commit. MODEL is a small Hugging Face directory, PAIRS a file of
preference pairs, OUT a folder that does not exist.
"""

import argparse
import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 6
CASES: dict[str, dict[str, Any]] = {  # name -> what it adds to the options below
    "live": {},
    "cached": {"reference": {"mode": "cached"}},
    "sync_every": {"reference": {"mode": "live", "sync_every": 2}},
    "aot": {"loss": {"type": "aot"}},
    "sft": {},
    "lora": {"lora": {"rank": 4}},
    "padded": {"batch": {"layout": "padded"}},
    "killed": {"checkpoint": {"every": 2}},
}


def options(name: str, model: str, pairs: str, out: Path) -> dict[str, Any]:
    """The config of a case."""
    sft = name == "sft"
    config: dict[str, Any] = {
        "model": {"path": model},
        "data": {"train": pairs, "eval_fraction": 0.05, "max_length": 192, "store": str(out / "store")},
        "optimizer": {"learning_rate": 1e-4},
        "batch": {"examples" if sft else "pairs": 16, "accumulation": 2},
        "run": {
            "dir": str(out / name),
            "steps": STEPS,
            "eval_every": 3,
            "export": True,
            "progress": False,
            "report": False,
        },
    }
    for section, values in copy.deepcopy(CASES[name]).items():
        config[section] = config.get(section, {}) | values
    return config


def run(command: str, config: Path, devices: int) -> subprocess.Popen:
    """The command, on that many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen([sys.executable, "-m", "dpo_jax", command, str(config)], env=environment)


def kill_after(process: subprocess.Popen, metrics: Path, lines: int) -> None:
    """End a run at once, as a power cut would, when it has logged so many lines."""
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()


def main() -> None:
    """Print a line for each case and number of devices: name, devices, hash of metrics, hash of exported weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    for devices in args.devices:
        for name in args.cases:
            folder = args.out.absolute() / str(devices)
            folder.mkdir(parents=True, exist_ok=True)
            config = folder / f"{name}.yaml"
            config.write_text(json.dumps(options(name, args.model, args.pairs, folder)))
            command = "sft" if name == "sft" else "train"
            if name == "killed":
                kill_after(run(command, config, devices), folder / name / "metrics.jsonl", 5)
            if code := run(command, config, devices).wait():
                sys.exit(f"{name} on {devices} devices: exit code {code}")
            metrics = hashlib.sha256((folder / name / "metrics.jsonl").read_bytes()).hexdigest()[:16]
            weights = hashlib.sha256()
            for file in sorted((folder / name / "export").glob("*.safetensors")):
                weights.update(file.read_bytes())
            print(f"{name} {devices} {metrics} {weights.hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    main()
