"""Resolve ``model.path`` to a local directory and read its JSON files, such as ``config.json``."""

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dpo_jax.bucket import Bucket, denied_as_usage, is_remote
from dpo_jax.bucket_cache import MODELS, fetch
from dpo_jax.errors import UserError, from_outside
from dpo_jax.models.options import DecoderConfig
from dpo_jax.storage import expanded
from dpo_jax.weights.known import builtin_model

# Download only what this program reads from a hub repository: no PyTorch pickles, copies in other formats, or code.
_TEMPLATES = "additional_chat_templates/"
_HUB_FILES = ["*.json", "tokenizer.model", "*.txt", "*.jinja", f"{_TEMPLATES}*"]
_HUB_WEIGHTS = ["*.safetensors"]
_HUB_IGNORED = ["*/*.safetensors", "consolidated*.safetensors"]


class HubError(UserError):
    """A hub model could not be downloaded; the cause is the error of ``huggingface_hub``."""


def resolve_model(path: str, revision: str | None, weights: bool = True, section: str = "model") -> Path:
    """Return the local directory of a Hugging Face model: ``path`` itself, or a copy of one on the hub or in a bucket.

    If ``weights`` is false, only config and tokenizer of a hub model are downloaded. Weights in a bucket never are.
    ``section`` has the options ``path`` and ``revision``, for messages.

    Raises:
        UserError: the directory or hub model does not exist or contains no model.
        HubError: the hub refuses the model, does not have it, or cannot be reached.
    """
    option = f"{section}.path"
    if path.startswith("builtin:"):
        builtin_model(path, option)  # an unknown name raises an error that lists the built-in models
        raise UserError(f"{option}: {path} is built in and has no directory; give a directory or a hub name")
    directory = model_directory(option, path)
    if os.path.isdir(directory):
        if revision is not None:
            remedy = f"{path} is {'in a bucket' if is_remote(path) else 'a local directory'}; remove this option"
            raise UserError(f"{section}.revision: {revision!r} cannot be used: {remedy}")
        if not (directory / "config.json").is_file():
            raise UserError(f"{option}: {path} holds neither config.json nor checkpoints/; give a model or a run")
        return directory
    if os.path.exists(directory):
        raise UserError(f"{option}: {path} is a file; give the directory that contains config.json and the weights")
    refuse_missing(path, option)
    return _download(option, path, revision, _HUB_FILES + _HUB_WEIGHTS if weights else _HUB_FILES)


def refuse_missing(path: str, option: str = "model.path") -> None:
    """Raise ``UserError`` if ``path``, the value of ``option``, can only be a local one, and does not exist."""
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/")
    if is_local and not is_remote(path) and not os.path.exists(expanded(path)):
        raise UserError(f"{option}: {path} does not exist; give a directory, a hub name or builtin:tiny")


def model_directory(option: str, path: str) -> Path:
    """Return the path of a local directory, or a copy of one in a bucket, whose weights are read from there in ranges.

    ``option`` gives the path. Whether a local directory exists is not checked.

    Raises:
        UserError: there is no such directory in the bucket, or it is in other storage.
    """
    if not is_remote(path):
        return expanded(path)
    bucket = Bucket.named(option, path)
    with denied_as_usage(option):
        blobs, folders = bucket.entries()
        if _TEMPLATES in folders:
            blobs |= bucket.entries(_TEMPLATES)[0]
    read = [name for name in blobs if any(fnmatchcase(name, pattern) for pattern in _HUB_FILES + _HUB_WEIGHTS)]
    names = [name for name in read if not any(fnmatchcase(name, pattern) for pattern in _HUB_IGNORED)]
    if not names:
        raise UserError(f"{option}: {path} has no files of a model or adapters; check the path")
    weight_files = lambda name: name.endswith(".safetensors")  # noqa: E731
    with denied_as_usage(option):
        return fetch(bucket, {name: blobs[name] for name in names}, MODELS, weight_files)


def _download(option: str, name: str, revision: str | None, files: list[str]) -> Path:
    # imported here, because the import takes a quarter of a second and local models do not need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=_HUB_IGNORED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        suffix = "" if revision is None else f" at revision {revision}"
        raise HubError(f"{option}: {name} is not a directory, and its download{suffix} failed: {cause}") from error
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{option}: hub model {name} has no config.json; give a model in the transformers format")
    return Path(folder)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` of a model directory."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: config.json is missing; give a Hugging Face model directory")
    return read_json(path)


def end_tokens(folder: Path | None, hf_config: dict[str, Any]) -> frozenset[int]:
    """Return the end-of-sequence ids from the directory's generation_config.json or, if it has none, ``hf_config``."""
    path = None if folder is None else folder / "generation_config.json"
    options = read_json(path) if path is not None and path.is_file() else hf_config
    eos = options.get("eos_token_id")
    return frozenset(token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model directory; its top level must be an object."""
    with from_outside(f"{path}: not valid JSON", "copy or download it again"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(content).__name__}; copy or download it again")
    return content


def check_vocabulary(num_tokens: int, config: DecoderConfig, tokenizer: str) -> None:
    """Raise ``UserError`` if ``num_tokens`` (the tokenizer's largest id + 1) exceeds the model's embeddings."""
    if num_tokens > config.vocab:
        mismatch = f"the tokenizer has {num_tokens} tokens and the model {config.vocab} embeddings"
        raise UserError(f"{tokenizer}: {mismatch}; give the model's own tokenizer, or resize the embeddings first")
