"""From what the user calls a model to a directory on disk, and what its ``config.json`` says."""

import json
from pathlib import Path
from typing import Any

from dpo_jax.errors import UserError, from_outside
from dpo_jax.models.options import DecoderConfig
from dpo_jax.weights.known import builtin_model

# Of a hub repository, only what is read here: never PyTorch pickles, other formats' copies, or code.
_HUB_FILES = ["*.json", "tokenizer.model", "*.txt", "*.jinja", "additional_chat_templates/*"]
_HUB_WEIGHTS = ["*.safetensors"]
_HUB_IGNORED = ["*/*.safetensors", "consolidated*.safetensors"]


def resolve_model(path: str, revision: str | None, weights: bool = True) -> Path:
    """The local directory of a Hugging Face model: ``path`` itself, or a snapshot of the hub model of that name.

    Without ``weights`` only config and tokenizer are downloaded.

    Raises:
        UserError: there is no such directory or hub model, it holds no model, or the hub cannot be reached.
    """
    if path.startswith("builtin:"):
        builtin_model(path)  # names those available
        raise UserError(f"model.path: {path} is built in and has no directory; give a directory or a hub name")
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise UserError(f"model.revision: {revision!r} cannot be used: {path} is a local directory; leave it out")
        if not (local / "config.json").is_file():
            raise UserError(f"model.path: {path} holds neither config.json nor checkpoints/; give a model or a run")
        return local
    if local.exists():
        raise UserError(f"model.path: {path} is a file; give the directory that holds config.json and the weights")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise UserError(f"model.path: {path} does not exist; give a directory, a hub name or builtin:tiny")
    return _download(path, revision, _HUB_FILES + _HUB_WEIGHTS if weights else _HUB_FILES)


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    # here, because importing it costs a quarter second that local models need not pay
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=_HUB_IGNORED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        at = "" if revision is None else f" at revision {revision}"
        raise UserError(f"model.path: {name} is no local directory, and the hub gave no model{at}: {why}") from error
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"model.path: hub model {name} has no config.json; give one in the transformers format")
    return Path(folder)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model directory.

    Raises:
        UserError: it is missing or is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: config.json is missing; give a Hugging Face model directory")
    return read_json(path)


def end_tokens(folder: Path | None, hf_config: dict[str, Any]) -> frozenset[int]:
    """Ids at which generation stops: those of a model directory's generation_config.json, else of its config.

    Raises:
        UserError: that file is no JSON object.
    """
    path = None if folder is None else folder / "generation_config.json"
    options = read_json(path) if path is not None and path.is_file() else hf_config
    given = options.get("eos_token_id")
    return frozenset(token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    with from_outside(f"{path}: this is not JSON", "copy or download it again"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is needed, this is {type(content).__name__}; copy or download it again")
    return content


def check_vocabulary(num_tokens: int, config: DecoderConfig, tokenizer: str) -> None:
    """Refuse a tokenizer with more tokens (its largest id + 1) than the model has embeddings."""
    if num_tokens > config.vocab:
        sizes = f"the tokenizer has {num_tokens} tokens and the model {config.vocab} embeddings"
        raise UserError(f"{tokenizer}: {sizes}; give the model's own tokenizer, or resize the embeddings first")
