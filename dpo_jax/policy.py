"""From ``model.path`` to a model, its weights on the mesh, and its tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.config import ModelConfig
from dpo_jax.data.tokenize import load_tokenizer
from dpo_jax.errors import UserError
from dpo_jax.models.decoder import Model, Params, make_model
from dpo_jax.models.families import builtin_model, decoder_config
from dpo_jax.models.load import check_vocabulary, read_hf_config, resolve_model
from dpo_jax.models.weights import export_params, load_params
from dpo_jax.rundir import RunDir, find_run, is_run_dir
from dpo_jax.saved import restore_part
from dpo_jax.sharding import weight_shardings

MODEL_FILES = "model"  # in a run directory: config.json and tokenizer, so that the run stands alone
SHARD_BYTES = 4 * 2**30  # size of an exported file


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    hf_config: dict[str, Any]
    folder: Path | None  # holds config.json and tokenizer; None: a built-in model
    run: RunDir | None  # holds the weights, as checkpoints


def find_model(path: str, revision: str | None) -> ModelSource:
    """What ``model.path`` names; a hub model is downloaded.

    Raises:
        UserError: there is no such model.
    """
    if path.startswith("builtin:"):
        return ModelSource(builtin_model(path), None, None)
    if is_run_dir(path):
        run = find_run(path)
        folder = run.root / MODEL_FILES
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: the run {path} did not come as far as to have a model; choose another")
        return ModelSource(read_hf_config(folder), folder, run)
    folder = resolve_model(path, revision)
    return ModelSource(read_hf_config(folder), folder, None)


def build_model(source: ModelSource, config: ModelConfig) -> Model:
    """The model as pure functions, without weights."""
    return make_model(
        decoder_config(source.hf_config),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        attention=config.attention,
        remat=config.remat,
        scan=config.scan,
        matmul_precision=config.matmul_precision,
    )


def load_weights(source: ModelSource, model: Model, config: ModelConfig, mesh: Mesh) -> Params:
    """The weights, each shard straight to its device. A built-in model's are drawn from a fixed seed."""
    if source.run is not None:
        wanted = {"params": placed_shapes(model, mesh)}
        return restore_part(source.run.checkpoints, config.checkpoint, wanted)[0]["params"]
    shardings = param_shardings(model, mesh)
    if source.folder is not None:
        return load_params(source.folder, model, shardings=shardings, dtype=config.param_dtype)
    return jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))


def param_shardings(model: Model, mesh: Mesh) -> Any:
    """Sharding of each weight under the table."""
    return weight_shardings(model.param_shapes(), model.param_axes(), mesh)


def find_tokenizer(source: ModelSource, model: Model, config: ModelConfig, chat_template: str | None) -> Any:
    """The model's tokenizer, or the one that ``model.tokenizer`` names."""
    path = config.tokenizer or source.folder
    if path is None:
        raise UserError(f"model.tokenizer: {config.path} brings none; name a directory or hub model that has one")
    revision = config.revision if config.tokenizer is None and not Path(path).is_dir() else None
    tokenizer = load_tokenizer(str(path), revision, chat_template)
    check_vocabulary(max(tokenizer.get_vocab().values(), default=-1) + 1, model.config, str(path))
    return tokenizer


def placed_shapes(model: Model, mesh: Mesh) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`, each with its place on the mesh."""
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
        model.param_shapes(),
        param_shardings(model, mesh),
    )


def keep_model_files(run: RunDir, source: ModelSource, tokenizer: Any) -> None:
    """Put config.json, tokenizer, chat template and generation config into the run."""
    folder = run.root / MODEL_FILES
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(source.hf_config, indent=2) + "\n")
    generation = "generation_config.json"
    if source.folder is not None and (source.folder / generation).is_file():
        (folder / generation).write_bytes((source.folder / generation).read_bytes())


def export_run(run: RunDir, out_dir: Path, model: Model, params: Params, overwrite: bool) -> None:
    """Write a run's weights as a Hugging Face directory."""
    folder = run.root / MODEL_FILES
    export_params(params, model, hf_config=read_hf_config(folder), out_dir=out_dir, dtype=model.param_dtype,
                  source_dir=folder, max_shard_bytes=SHARD_BYTES, overwrite=overwrite)  # fmt: skip
