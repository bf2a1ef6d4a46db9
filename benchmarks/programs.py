"""What vs_trl.py runs, each in a process of its own: ``python programs.py NAME FOLDER ARGUMENTS_AS_JSON``.

Every program trains on the same pairs in the same order and returns the same figures: seconds of each step
and of the reference pass, peak memory, what came before the first step, and the losses.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
WARM_UP = 2  # first steps that are never timed
LEARNING_RATE = 1e-4  # constant: large enough that the losses show whether both do the same work
GIB = 2**30
_SMALL = {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
          "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 2048}  # fmt: skip
SHAPES = {  # of Llamas, all with tied embeddings
    "tiny": _SMALL | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "num_key_value_heads": 2},
    "15m": _SMALL,
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072},
}  # fmt: skip


def make_model(folder: Path, pairs_file: str, shape: str) -> dict[str, Any]:
    """A Llama with random weights, and a tokenizer learned from the pairs."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = read_rows(pairs_file)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(32000, SHAPES[shape]["vocab_size"]),
        min_frequency=2,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    path = folder / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    LlamaForCausalLM(config).float().save_pretrained(path)
    return {"path": str(path), "tokens": tokenizer.get_vocab_size()}


def measure_rate(folder: Path, device: str, size: int) -> dict[str, Any]:
    """Operations a second of bfloat16 products of square matrices: the fastest of ten rows of products.

    ``missing`` says instead why JAX cannot use a ``device``, cpu or gpu.
    """
    import jax
    import jax.numpy as jnp

    try:
        found = jax.devices()[0]
    except RuntimeError as error:
        return {"missing": str(error).splitlines()[0]}
    if found.platform != device:
        return {"missing": f"it would run on {found.platform}"}
    row = 50  # long enough that starting it does not count
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    right /= size**0.5  # products stay of the size of ``left``: rates depend on what is multiplied
    products = jax.jit(lambda x, w: jax.lax.fori_loop(0, row, lambda _, x: x @ w, x))
    products(left, right).block_until_ready()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        products(left, right).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return {"size": size, "device": found.device_kind, "flops_per_second": row * 2 * size**3 / min(seconds)}


def run_dpo_jax(folder: Path, job: dict[str, Any], num_steps: int, reference: str) -> dict[str, Any]:
    """This project's `train`."""
    import jax

    from dpo_jax.config import DPOConfig
    from dpo_jax.config.file import parse_config
    from dpo_jax.runs.directory import read_json
    from dpo_jax.train import train

    compiles: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiles.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    run = folder / "run"
    config = parse_config(
        {
            "model": {"path": job["model"], "dtype": job["dtype"], "remat": job["remat"]},
            "reference": {"mode": reference},
            "data": {"train": job["pairs_file"], "shuffle": False, "max_length": job["max_length"], "workers": 1},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
            "batch": {"pairs": job["batch"]},
            "run": {"dir": str(run), "steps": num_steps, "progress": False, "report": False},
            "checkpoint": {"every": num_steps},
        },
        {},
        DPOConfig,
    )
    train(config)
    on_gpu = job["device"] == "gpu"
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / GIB if on_gpu else process_peak_gib()
    whole = time.perf_counter() - STARTED
    compile_seconds = sum(compiles)
    timings, metrics = read_json(run / "timings.jsonl"), read_json(run / "metrics.jsonl")
    fill = [row["fill"] for row in metrics]
    slots = [
        round(row["tokens_per_second"] * row["step_seconds"] / own) for row, own in zip(timings, fill, strict=True)
    ]
    first = [step for step, size in enumerate(slots) if size not in slots[:step]]
    seconds = [row["step_seconds"] for row in timings]
    return {
        "seconds": seconds,
        # A step's program is compiled while the step before it is waited for, and counts in that one's seconds.
        "compiled": sorted({step for own in first for step in (own - 1, own) if step >= 0}),
        "reference_seconds_per_pair": 0.0 if reference == "live" else jax_reference_seconds(config),
        "peak_gib": peak,
        "start_seconds": whole - sum(seconds[1:]),
        "compile_seconds": compile_seconds,
        "losses": [row["loss"] for row in metrics],
        "fill": fill,
        "token_slots": slots,
    }


def jax_reference_seconds(config: Any) -> float:
    """Seconds a pair to build the cached reference again, once its program is compiled."""
    import jax
    import numpy as np

    from dpo_jax.batching.batches import set_batches
    from dpo_jax.methods.dpo import make_reference
    from dpo_jax.methods.setup import assemble
    from dpo_jax.parallel.sharding import make_mesh, row_devices
    from dpo_jax.weights.open import load_weights

    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        setup = assemble(config, mesh)
        store = setup.batches.store
        every_pair = set_batches(store, np.arange(len(store)), config.batch, row_devices(mesh))
        weights = load_weights(setup.source, setup.model, config.model, mesh)
        seconds = 0.0
        for _ in range(2):  # the first compiles
            for old in store.path.glob("reference-*"):
                old.unlink()
            started = time.perf_counter()
            make_reference(setup, weights, [every_pair])
            seconds = time.perf_counter() - started
    return seconds / len(store)


def run_trl(folder: Path, job: dict[str, Any], num_steps: int, precompute: bool) -> dict[str, Any]:
    """TRL's DPOTrainer as it comes, but for the type of its arithmetic, and in file order."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOTrainer

    clock: list[float] = []  # when training began, and when each step was done
    passes: list[float] = []
    on_gpu = job["device"] == "gpu"

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            clock.append(time.perf_counter())

        def on_step_end(self, args, state, control, **_):
            if on_gpu:
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args, **kwargs):
            began = time.perf_counter()
            made = super()._precompute_ref_logps(*args, **kwargs)
            passes.append(time.perf_counter() - began)
            return made

    rows = read_rows(job["pairs_file"])
    trainer = Timed(
        model=job["model"],
        args=trl_arguments(folder, job, num_steps, precompute),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    )
    trainer.train()
    whole = time.perf_counter() - STARTED
    seconds = [done - before for before, done in pairwise(clock)]
    return {
        "seconds": seconds,
        "compiled": [],
        "reference_seconds_per_pair": sum(passes) / len(rows),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else process_peak_gib(),
        "start_seconds": whole - sum(seconds[1:]),
        "compile_seconds": 0.0,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def trl_arguments(folder: Path, job: dict[str, Any], num_steps: int, precompute: bool) -> Any:
    """TRL's own settings, and the few that differ from them."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(folder / "run"),
        max_length=job["max_length"],
        per_device_train_batch_size=job["batch"] // job["trl_parts"],
        gradient_accumulation_steps=job["trl_parts"],
        gradient_checkpointing=job["remat"] == "full",
        max_steps=num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=precompute,
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": "float32", "attn_implementation": job["trl_attention"]},
        bf16=job["dtype"] == "bfloat16",
        use_cpu=job["device"] == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def read_rows(path: str) -> list[dict[str, str]]:
    """What a file of JSON lines holds."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def process_peak_gib() -> float:
    """Most memory that this process has held, GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**20


def timed_steps(run: dict[str, Any]) -> set[int]:
    """Steps of a run, from 0, in which nothing is compiled or warmed up."""
    return set(range(WARM_UP, len(run["seconds"]))) - set(run["compiled"])


INPUTS = {"model": (make_model, {}), "rate": (measure_rate, {})}
PROGRAMS = {  # in the order in which they take turns
    "trl": (run_trl, {"precompute": False}),
    "dpo_jax-cached": (run_dpo_jax, {"reference": "cached"}),
    "trl-precomputed": (run_trl, {"precompute": True}),
    "dpo_jax-live": (run_dpo_jax, {"reference": "live"}),
}

if __name__ == "__main__":
    name, place, arguments = sys.argv[1:]
    function, options = (INPUTS | PROGRAMS)[name]
    found = function(Path(place), **options, **json.loads(arguments))
    (Path(place) / "result.json").write_text(json.dumps(found))
