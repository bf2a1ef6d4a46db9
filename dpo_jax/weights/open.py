"""Open the model that ``model.path`` names: its functions, its weights on the mesh, and its tokenizer."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dpo_jax.bucket import is_remote, split_url
from dpo_jax.config import LoraConfig, ModelConfig
from dpo_jax.config.file import load_yaml, read_section
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.errors import UserError, from_outside, require
from dpo_jax.models.adapters import Adapted, make_lora, merge, start_adapters
from dpo_jax.models.decoder import Model, Params, make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.heads import without_unembedding
from dpo_jax.models.options import DecoderConfig
from dpo_jax.parallel.sharding import platform_of, sharded_structs, weight_shardings
from dpo_jax.runs.checksums import weights_id
from dpo_jax.runs.directory import RunDir, find_run, is_run_dir, writing
from dpo_jax.runs.restore import restore_part
from dpo_jax.storage import write_atomically
from dpo_jax.weights.hub import check_vocabulary, model_directory, read_hf_config, resolve_model
from dpo_jax.weights.huggingface import CARRIED_FILE, carried_tensors, export_params, load_params
from dpo_jax.weights.known import builtin_model
from dpo_jax.weights.peft import export_adapters, load_adapters
from dpo_jax.weights.safetensors import copy_tensors

MODEL_FILES = "model"  # folder of a run with config.json and tokenizer, so that the run is self-contained


@dataclass(frozen=True)
class ModelSource:
    """Where a model's config, tokenizer and weights come from."""

    hf_config: dict[str, Any]
    folder: Path | None  # with config.json and tokenizer; None: a built-in model
    run: RunDir | None  # whose checkpoints hold the weights; None: the model is not a run


def find_model(
    path: str, revision: str | None, checkpoint: str = "newest", *, weights: bool = True, section: str = "model"
) -> ModelSource:
    """Find the model that ``model.path`` names; a hub model is downloaded, its weights only if ``weights`` is true.

    Of a model in a bucket, the files next to the weights are downloaded. ``section`` has the options ``path``,
    ``revision`` and ``checkpoint``, for messages.

    Raises:
        UserError: the model does not exist, or ``revision`` or ``checkpoint`` does not apply to it.
    """
    if is_remote(path):
        split_url(f"{section}.path", path)
    is_run, is_builtin = is_run_dir(path), path.startswith("builtin:")
    remedy = f"{path} is not a run directory, so it has no saved steps; leave it at newest"
    require(is_run or checkpoint == "newest", f"{section}.checkpoint", checkpoint, remedy)
    kind = f"a run directory; choose its step with {section}.checkpoint" if is_run else "built in"
    remedy = f"{path} is {kind}; remove this option"
    require(revision is None or not (is_run or is_builtin), f"{section}.revision", revision, remedy)
    if is_builtin:
        return ModelSource(builtin_model(path, f"{section}.path"), None, None)
    if is_run:
        run = find_run(path)
        folder = run.root / MODEL_FILES
        if not (folder / "config.json").is_file():
            raise UserError(f"{section}.path: the run {path} stopped before it saved a model; choose another")
        return ModelSource(read_hf_config(folder), folder, run)
    folder = resolve_model(path, revision, weights, section)
    return ModelSource(read_hf_config(folder), folder, None)


def decoder_of(source: ModelSource) -> DecoderConfig:
    """Return the model's architecture as given by its config.json.

    Raises:
        UserError: config.json requests something that the decoder does not support.
    """
    try:
        return decoder_config(source.hf_config)
    except UserError as error:
        raise UserError(f"{source.folder}/{error}" if source.folder else str(error)) from error


def build_model(source: ModelSource, config: ModelConfig, platform: str, lora: LoraConfig | None = None) -> Model:
    """Build the model's pure functions for ``platform``, with the adapters of ``lora``; no weights are loaded."""
    decoder = decoder_of(source)
    return make_model(decoder, config, platform, None if lora is None else make_lora(lora, decoder))


@dataclass(frozen=True)
class OpenModel:
    """A model whose files were found; its functions, tokenizer and weights are loaded on demand."""

    source: ModelSource
    config: ModelConfig
    platform: str
    lora: LoraConfig | None

    @cached_property
    def model(self) -> Model:
        """The model as built by `build_model`."""
        return build_model(self.source, self.config, self.platform, self.lora)

    def tokenizer(self, chat_template: str | None = None) -> Any:
        """Load the tokenizer with `find_tokenizer`."""
        return find_tokenizer(self.source, self.config, chat_template)

    def load(self, mesh: Mesh) -> Params:
        """Load the weights with `load_weights`, without the adapters of ``lora``."""
        return load_weights(self.source, self.model, self.config, mesh)


def open_model(
    config: ModelConfig,
    platform: str,
    lora: LoraConfig | None = None,
    weights: bool = True,
    section: str = "model",
) -> OpenModel:
    """Open the model of ``model.path`` for ``platform``; ``weights`` and ``section`` as in `find_model`."""
    source = find_model(config.path, config.revision, config.checkpoint, weights=weights, section=section)
    return OpenModel(source, config, platform, lora)


def load_weights(source: ModelSource, model: Model, config: ModelConfig, mesh: Mesh) -> Params:
    """Load the weights, each shard directly onto its device; those of a built-in model are drawn from a fixed seed.

    A reward model that starts from a language model has a head of zeros, so all its first scores are equal.
    """
    if model.config.scores > decoder_of(source).scores:
        params = load_weights(source, replace(model, config=replace(model.config, scores=0)), config, mesh)
        head, sharding = model.param_shapes()["score"], param_shardings(model, mesh)["score"]
        return without_unembedding(params) | {"score": jnp.zeros(head.shape, head.dtype, device=sharding)}
    if source.run is not None:
        return load_saved(source.run, model, config, mesh)[0]
    shardings = param_shardings(model, mesh)
    if source.folder is not None:
        return load_params(source.folder, model, shardings=shardings, dtype=config.param_dtype)
    return jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))


def load_saved(run: RunDir, model: Model, config: ModelConfig, mesh: Mesh) -> tuple[Params, int]:
    """Load a run's saved weights and their step. Adapters are merged into the base: ``model`` must have none."""
    adapted = adapted_run(run)
    if adapted is not None:
        return _load_merged(adapted, model, config, mesh)
    params, manifest = restore_params(
        run, config.checkpoint, sharded_structs(model.param_shapes(), param_shardings(model, mesh))
    )
    return params, manifest["step"]


def restore_params(run: RunDir, which: Literal["newest", "best"], shapes: Params) -> tuple[Params, dict]:
    """Read the policy's trained parameters and the manifest from a run's newest or best step."""
    trains_value = "ppo" in load_yaml(run.config)  # its parameters are an `ActorCritic`
    saved, manifest = restore_part(run.checkpoints, which, {"params": {"policy": shapes} if trains_value else shapes})
    return saved["params"]["policy"] if trains_value else saved["params"], manifest


@dataclass(frozen=True)
class AdaptedRun:
    """A run that trained adapters, as described by its config.yaml."""

    run: RunDir
    lora: LoraConfig
    base: ModelConfig  # the base model, and its step if it is itself a run


def adapted_run(run: RunDir) -> AdaptedRun | None:
    """Read a run's adapter options and base model from its config.yaml; None if the run trained all weights."""
    options = load_yaml(run.config)
    try:
        lora = lora_of(options)
        if lora.rank == 0:
            return None
        base = options.get("model")
        if isinstance(base, Mapping):  # the other options only affect how the run computed
            base = {name: base[name] for name in ("path", "revision", "checkpoint", "param_dtype") if name in base}
        return AdaptedRun(run, lora, read_section(ModelConfig, base, "model"))
    except UserError as error:
        raise UserError(f"{run.config}: {error}") from error


def lora_of(options: Mapping[str, Any]) -> LoraConfig:
    """Read the `lora` section of a run's resolved options; runs older than adapters have none."""
    section = options.get("lora", {})
    if isinstance(section, Mapping) and section.get("rank") == 0:
        return LoraConfig()  # the others had no effect, and may be defaults of an earlier version
    return read_section(LoraConfig, section, "lora")


def _load_merged(adapted: AdaptedRun, model: Model, config: ModelConfig, mesh: Mesh) -> tuple[Params, int]:
    """`load_saved` for a run that trained adapters; the base weights are loaded in the dtype that the run used."""
    try:
        source = find_model(adapted.base.path, adapted.base.revision)
    except UserError as error:
        problem = f"{adapted.run.config}: the base model of the adapters cannot be loaded"
        raise type(error)(f"{problem}: {error}") from error
    model = replace(model, lora=make_lora(adapted.lora, model.config))
    adapters, manifest = restore_params(adapted.run, config.checkpoint, trained_shapes(model, mesh))
    base = load_weights(source, replace(model, param_dtype=adapted.base.param_dtype), adapted.base, mesh)
    if weights_id(base) != manifest["identity"]["weights"]:
        mismatch = f"the adapters of {adapted.run.location} were not trained on the weights in {adapted.base.path}"
        remedy = f"restore the original weights, or correct model.path in {adapted.run.config}"
        raise UserError(f"model.path: {mismatch}: {remedy}")
    return merge(Adapted(adapters, base), model), manifest["step"]


def load_start(config: LoraConfig, model: Model, base: Params, seed: int, mesh: Mesh) -> Params:
    """Return a run's initial adapters: loaded from ``lora.path`` if it is set, otherwise drawn from ``seed``."""
    if config.path is None:
        initialize = partial(start_adapters, model, init=config.init)
        jitted_init = jax.jit(initialize, out_shardings=trained_shardings(model, mesh))
        return jitted_init(jax.random.key(seed), head=base.get("score"))
    return load_adapters(model_directory("lora.path", config.path), model, config, trained_shardings(model, mesh))


def param_shardings(model: Model, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of each weight, from the table of sharding rules."""
    return weight_shardings(model.param_shapes(), model.param_axes(), mesh)


def trained_shardings(model: Model, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of each trained parameter: of the adapters, or of all weights if there are none."""
    if model.lora is None:
        return param_shardings(model, mesh)
    return weight_shardings(model.adapter_shapes(), model.adapter_axes(), mesh)


def trained_shapes(model: Model, mesh: Mesh | AbstractMesh) -> Params:
    """Return the tree of trained parameters as `jax.ShapeDtypeStruct` with shardings."""
    shapes = model.param_shapes() if model.lora is None else model.adapter_shapes()
    return sharded_structs(shapes, trained_shardings(model, mesh))


def find_tokenizer(source: ModelSource, config: ModelConfig, chat_template: str | None) -> Any:
    """Load the tokenizer that ``model.tokenizer`` names or, if it is not set, the model's own."""
    path = config.tokenizer or source.folder
    if config.tokenizer is not None and is_remote(config.tokenizer):
        path = model_directory("model.tokenizer", config.tokenizer)
    if path is None:
        raise UserError(f"model.tokenizer: {config.path} has no tokenizer; give a directory or hub model that has one")
    revision = config.revision if config.tokenizer is None and not Path(path).is_dir() else None
    tokenizer = load_tokenizer(str(path), revision, chat_template)
    check_vocabulary(max(tokenizer.get_vocab().values(), default=-1) + 1, decoder_of(source), str(path))
    return tokenizer


def keep_model_files(run: RunDir, source: ModelSource, hf_config: Mapping[str, Any], tokenizer: Any) -> None:
    """Write the files that go with the trained model to the run directory: config.json, tokenizer, chat template, etc.

    These include the tensors of its `carried_tensors`.
    """
    folder = run.root / MODEL_FILES
    with from_outside(f"{folder}: the tokenizer cannot be written", "free space, or fix the tokenizer's files"):
        tokenizer.save_pretrained(folder)
    generation_file = "generation_config.json"
    with writing(folder):
        if source.folder is not None and (source.folder / generation_file).is_file():
            write_atomically(folder / generation_file, (source.folder / generation_file).read_bytes())
        carried = {} if source.folder is None else carried_tensors(source.folder, str(hf_config["model_type"]))
        if carried and source.folder != folder:
            copy_tensors(folder / f"{CARRIED_FILE}.partial", carried)
            os.replace(folder / f"{CARRIED_FILE}.partial", folder / CARRIED_FILE)
        write_atomically(folder / "config.json", json.dumps(hf_config, indent=2) + "\n")  # last: find_model trusts it


def export_run_adapters(run: RunDir, out_dir: str | Path, which: Literal["newest", "best"], mesh: Mesh) -> int:
    """Export the adapters of a run's newest or best step as a PEFT directory and return the step.

    Raises:
        UserError: the run has no adapters, or ``out_dir`` is not empty.
    """
    source = find_model(run.location, None)
    adapted = adapted_run(run)
    if adapted is None:
        raise UserError(f"--adapters: the run {run.location} trained all weights and has no adapters; omit --adapters")
    model = build_model(source, adapted.base, platform_of(mesh), adapted.lora)
    adapters, manifest = restore_params(run, which, trained_shapes(model, mesh))
    export_adapters(adapters, model, adapted.lora, adapted.base.path, out_dir)
    return manifest["step"]


def export_run(run: RunDir, out_dir: str | Path, model: Model, weights: Params | Adapted, overwrite: bool) -> None:
    """Export a run's weights as a Hugging Face directory, with adapters merged into the base weights."""
    params = merge(weights, model) if isinstance(weights, Adapted) else weights
    folder = run.root / MODEL_FILES
    hf_config, dtype = read_hf_config(folder), model.param_dtype
    export_params(
        params, model, hf_config=hf_config, out_dir=out_dir, dtype=dtype, source_dir=folder, overwrite=overwrite
    )
