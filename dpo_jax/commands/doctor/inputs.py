"""Checks of what a config names: model, tokenizer, data, mesh, memory, disk and bucket."""

import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from dpo_jax.batching.sets import store_folder
from dpo_jax.bucket import PROBE, SCHEME, Bucket, is_remote, probe, split_url
from dpo_jax.commands.doctor import machine
from dpo_jax.commands.doctor.findings import Finding, fail, ok, size_text, warn
from dpo_jax.config import AnyConfig, PPOConfig, SourceConfig
from dpo_jax.data.convert import ConvertJob, make_convert_rows
from dpo_jax.data.sources import kind_of
from dpo_jax.data.store import open_source
from dpo_jax.methods.optimizer import make_optimizer
from dpo_jax.methods.ppo import abstract_policy_state
from dpo_jax.methods.setup import abstract_state, trained_model
from dpo_jax.methods.value_model import value_model_of
from dpo_jax.models.decoder import Model, count_params, refuse_expert_axis
from dpo_jax.parallel.sharding import abstract_mesh, sharded_structs
from dpo_jax.plan.ahead_of_time import NUM_STEPS, num_bytes
from dpo_jax.runs.directory import holds_files, is_run_dir, run_at
from dpo_jax.storage import expanded
from dpo_jax.weights.hub import HubError
from dpo_jax.weights.open import OpenModel, find_model, open_model, param_shardings
from dpo_jax.weights.safetensors import find_tensors

SAMPLE_ROWS = 64  # of each data set, to tokenize
LARGE_FILE = 2**29  # bytes; opening a larger file takes too long
TRANSFER_BYTES = 2**25  # of the object that measures a bucket's rates
BUCKET_PATIENCE = 10.0  # seconds
HUB_REMEDIES = {  # type of the hub's error -> remedy
    "GatedRepoError": "accept the terms on the model's page, then run hf auth login or set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; if the model is private, run hf auth login or set HF_TOKEN",
    "RevisionNotFoundError": "correct model.revision",
    "HfHubHTTPError": "if the token is refused, run hf auth login or set HF_TOKEN; else try again",
}
HUB_UNREACHABLE = "connect to the hub, unset HF_HUB_OFFLINE, or give a local directory"


@dataclass
class Job:
    """A config, the devices that it would run on, and what earlier checks found."""

    config: AnyConfig
    platform: str = "cpu"
    devices: int | None = None  # None: unknown
    local_devices: int = 1  # of this host
    memory: int | None = None  # bytes of a device
    opened: OpenModel | None = None
    model: Model | None = None
    parameters: int = 0
    tokenizer: Any = None
    save_bytes: int | None = None  # of a checkpoint
    held_bytes: int | None = None  # on a device, at least, while a step runs


def model(job: Job) -> Finding:
    """Find the models that the config names; of a hub model, only its config and tokenizer are downloaded."""
    config, judge = job.config, job.config.judge
    try:
        job.opened = open_model(config.model, job.platform, config.lora, weights=False)
        if config.reference.path is not None:
            find_model(config.reference.path, None, weights=False, section="reference")
        if judge is not None and judge.path is not None:
            find_model(judge.path, judge.revision, judge.checkpoint, weights=False, section=judge.section)
    except HubError as error:
        return fail(str(error), HUB_REMEDIES.get(type(error.__cause__).__name__, HUB_UNREACHABLE))
    job.model = trained_model(job.opened.model, config)
    job.parameters = count_params(job.model)
    folder, text = job.opened.source.folder, f"{config.model.path}: {job.parameters:,} parameters"
    if folder is None or job.opened.source.run is not None:
        return ok(text, parameters=job.parameters)
    if not is_remote(config.model.path) and not os.path.isdir(expanded(config.model.path)):
        return _on_hub(text, folder, job.parameters)
    find_tensors(folder)
    return ok(text, parameters=job.parameters)


def _on_hub(text: str, folder: Path, parameters: int) -> Finding:
    """Check that there is room to download the weights of a hub model, in half precision, unless they are there."""
    from huggingface_hub import constants, get_token

    needed = 0 if any(folder.glob("*.safetensors")) else 2 * parameters
    room = _space("HF_HOME", Path(constants.HF_HUB_CACHE), needed, "set it to a larger disk")
    token = "with a token" if get_token() else "without a token"
    return room if room.status == "FAIL" else ok(f"{text}, on the hub, {token}", parameters=parameters)


def tokenizer(job: Job) -> Finding | None:
    """Load the tokenizer and its chat template."""
    if job.opened is None:
        return None
    job.tokenizer = job.opened.tokenizer(job.config.data.chat_template)
    template = "a chat template" if job.tokenizer.chat_template else "no chat template"
    return ok(f"{len(job.tokenizer):,} tokens, {template}", tokens=len(job.tokenizer))


def data(job: Job) -> Finding | None:
    """Open the local data sets and tokenize their first rows, as a run does."""
    config, skipped, num_rows = job.config, [], 0
    counts: Counter[str] = Counter()
    options = replace(config.data, max_length=config.data.max_length - config.planned.num_tokens)
    sources = (*config.data.train, *config.data.eval.values())
    for index, source in enumerate(sources):
        if not _is_small_local(source):
            skipped.append(source.path)
            continue
        opened = open_source(source, index, config.stage)
        if job.tokenizer is None:
            continue
        rows = opened.rows[:SAMPLE_ROWS]
        convert = make_convert_rows(ConvertJob(data=options, tokenizer=job.tokenizer, stage=config.stage))
        chunk = convert(opened.label, opened.parse, 0, rows)
        num_rows += len(rows)
        counts.update(problem.cause for problem in (*chunk.dropped, *chunk.notes))
        if len(chunk.dropped) == len(rows):
            first = chunk.dropped[0]
            return fail(f"{opened.label}: none of its first {len(rows)} rows is valid ({first.detail})", "fix the data")
    if job.tokenizer is None:
        return None
    note = f"; not opened: {', '.join(skipped)}" if skipped else ""
    text, facts = f"{num_rows} rows tokenized, the first of each data set", {"rows": num_rows, "causes": counts}
    if counts:
        causes = ", ".join(f"{cause} {count}" for cause, count in counts.most_common())
        return warn(f"{text}: {causes}{note}", "dpo-jax data lists them", **facts)
    return ok(text + note, **facts)


def _is_small_local(source: SourceConfig) -> bool:
    """Return whether a data set can be opened quickly; raise ``UserError`` if its path names nothing."""
    if is_remote(source.path):
        split_url("data", source.path)
        return False
    is_local = kind_of(source.path) not in ("TFDS set", "hub dataset")
    return is_local and os.path.getsize(source.path) <= LARGE_FILE


def mesh(job: Job) -> Finding | None:
    """Lay the train state out on the devices, which gives the size of a checkpoint."""
    config, trained = job.config, job.model
    if job.devices is None:
        return None
    devices = abstract_mesh(config.mesh, job.devices)
    if trained is None:
        return None
    refuse_expert_axis(trained.config, devices)
    if isinstance(config, PPOConfig):
        optimizer = make_optimizer(config.optimizer, NUM_STEPS, config.ppo.epochs)
        state = abstract_policy_state(trained, value_model_of(config, trained), devices, optimizer)
        policy = state.params.policy
    else:
        state = abstract_state(config, trained, devices, make_optimizer(config.optimizer, NUM_STEPS))
        policy = state.params
    job.save_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    has_copy = config.reference_mode == "live" and config.reference.sync_every == 0  # else it is in the state
    frozen = policy if has_copy else None
    if trained.lora is not None:
        frozen = sharded_structs(trained.param_shapes(), param_shardings(trained, devices))
    job.held_bytes = num_bytes((state, state.params, frozen))  # the gradient is as large as what is trained
    axes = " x ".join(f"{axis} {size}" for axis, size in devices.shape.items())
    return ok(f"{axes}; a checkpoint is {size_text(job.save_bytes)}", save_bytes=job.save_bytes)


def memory(job: Job) -> Finding | None:
    """Compare free memory with what a step holds at least: state, gradient, and frozen weights."""
    if job.platform == "cpu":
        return machine.memory(job.held_bytes and job.held_bytes * job.local_devices)
    if job.held_bytes is not None and job.memory is not None and job.held_bytes > job.memory:
        text = f"each device has {size_text(job.memory)}, but weights, gradient, optimizer and reference need"
        remedy = "use more devices, set lora.rank, or ask dpo-jax plan --search"
        return fail(f"{text} {size_text(job.held_bytes)}", remedy, needed=job.held_bytes, free=job.memory)
    return machine.memory()


def run_dir(job: Job) -> Finding:
    """Check that the run directory can be written, and that its disk has room for all saves and the export."""
    config, run = job.config, run_at(job.config.run.dir)
    if run.mirror is None and holds_files(run.root) and not is_run_dir(run.root):
        return fail(f"run.dir: {run.root} has other files but no run of this program", "choose an empty directory")
    copies = config.checkpoint.keep + config.checkpoint.keep_best + 1  # one more while it is written
    saves = copies * (job.save_bytes or 0) if run.mirror is None else 0
    export = config.run.export * job.parameters * (4 if config.model.param_dtype == "float32" else 2)
    written = sum(path.stat().st_size for path in run.root.rglob("*") if path.is_file()) if run.root.is_dir() else 0
    needed = max(saves + export - written, 0)
    finding = _space("run.dir", run.root, needed, "lower checkpoint.keep, or choose another run.dir")
    parts = [f"{size_text(size)} for {name}" for name, size in (("saves", saves), ("the export", export)) if size]
    parts += [f"for what is uploaded to {config.run.dir}"] if run.mirror is not None else []
    return replace(finding, text=f"{finding.text} ({', '.join(parts)})") if parts else finding


def store(job: Job) -> Finding:
    """Check that the folder for tokenized data can be written; it takes about as much room as the text."""
    config = job.config
    sources = (source.path for source in (*config.data.train, *config.data.eval.values()))
    size = sum(os.path.getsize(path) for path in sources if os.path.isfile(path))
    folder = store_folder(config.data.store, config.run.dir)
    return _space("data.store", folder, size, "choose another data.store")


def _space(option: str, folder: Path, needed: int, remedy: str) -> Finding:
    """Check that a folder, or the closest one above it that exists, can be written and has room for so many bytes."""
    existing = machine.closest_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=PROBE) as file:
            file.write(b"probe")
    except OSError as error:
        return fail(f"{option}: {folder} cannot be written ({error.strerror})", f"{remedy}, or fix its permissions")
    free = shutil.disk_usage(existing).free
    facts = {"free": free, "needed": needed}
    if free < needed:
        text = f"{option}: {folder} has {size_text(free)} free, but needs {size_text(needed)}"
        return fail(text, f"free space, {remedy}", **facts)
    note = f", {size_text(needed)} needed" if needed else ""
    return ok(f"{folder}: {size_text(free)} free{note}", **facts)


def bucket(job: Job) -> Finding | None:
    """Try every right that a run in a bucket needs, and measure how fast it is written and read."""
    if not job.config.run.dir.startswith(SCHEME):
        return None
    folder = Bucket.named("run.dir", job.config.run.dir).with_patience(BUCKET_PATIENCE)
    folder.connect()
    before = time.time()
    server_time = probe(folder)
    after = time.time()
    ahead = min(after - server_time, 0) + max(before - server_time, 0)
    clock = machine.clock(ahead, "this machine's clock", "the storage's")
    if clock.status != "ok":
        return clock
    name, content, seconds = f"{PROBE}{secrets.token_hex(8)}", os.urandom(TRANSFER_BYTES), {}
    for verb, transfer in (("write", lambda: folder.write(name, content)), ("read", lambda: folder.read(name))):
        start = time.perf_counter()
        transfer()
        seconds[verb] = time.perf_counter() - start
    folder.delete(name)
    rates = {verb: TRANSFER_BYTES / taken for verb, taken in seconds.items()}
    text = ", ".join(f"{verb} {rate / 1e6:,.0f} MB/s" for verb, rate in rates.items())
    return ok(f"{folder.url}: all rights, {text} of one object", **rates)


CHECKS: dict[str, Callable[[Job], Finding | None]] = {
    "model": model,
    "tokenizer": tokenizer,
    "data": data,
    "mesh": mesh,
    "memory": memory,
    "run.dir": run_dir,
    "data.store": store,
    "bucket": bucket,
}
