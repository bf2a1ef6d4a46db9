"""Load Hugging Face tokenizers without running remote code, hash them, and detect the tokens they add to a text."""

import json
import logging
import os
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_jax.bucket import is_remote
from dpo_jax.bucket_cache import fetch_data
from dpo_jax.errors import UserError, from_outside, reason, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NUM_SAMPLES = 256  # texts made of a tokenizer's vocabulary, used to probe its behavior
TOKENS_PER_SAMPLE = 4


def load_tokenizer(path: str, revision: str | None, chat_template: str | None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer from a directory or a hub name; Python files in its repository are never run.

    ``revision``: branch, tag or commit of a hub name. ``chat_template``: a file, or the name of one of the tokenizer's.

    Raises:
        UserError: there is no such tokenizer or template.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    from transformers import AutoTokenizer

    with from_outside(f"{path}: no tokenizer can be loaded", "fix its files, or set model.tokenizer to another"):
        # unless this is False, transformers asks on standard input whether it may run the model's own code
        tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        special_tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for token in (token for token, index in special_tokens.items() if index is None):
        problem = f"the special token {token!r} is not in the vocabulary"
        raise UserError(f"{path}: {problem}; correct it, or set model.tokenizer to another")
    _compare_with_file(tokenizer, path, revision)
    tokenizer.chat_template = _select_template(path, tokenizer.chat_template, chat_template)
    return tokenizer


def _select_template(path: str, default: Any, choice: str | None) -> str | dict[str, str] | None:
    """Return the text of the chosen template; if no choice, the tokenizer's own: a text, a dict of several, or None."""
    templates = default if isinstance(default, dict) else {}
    if not all(isinstance(text, str) for text in (templates.values() if templates else [default or ""])):
        remedy = "correct it, or set data.chat_template to a file"
        raise UserError(f"{path}: chat_template is not text: {shown(default)}; {remedy}")
    if choice is None:
        return default or None
    if choice in templates:
        return templates[choice]
    try:
        file = fetch_data("data.chat_template", choice) if is_remote(choice) else Path(choice)
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        choices_text = f"; the tokenizer has the templates {', '.join(sorted(templates))}" if templates else ""
        problem = f"{choice!r} cannot be read: {reason(error)}"
        raise UserError(f"data.chat_template: {problem}: give a file, relative to {Path.cwd()}{choices_text}") from None


def _compare_with_file(tokenizer: Any, path: str, revision: str | None) -> None:
    """Warn if transformers splits text differently from the tokenizer's own tokenizer.json.

    The model type in config.json may select a class with its own splitting rules, which reads only the vocabulary from
    tokenizer.json.
    """
    if not tokenizer.is_fast or type(tokenizer).__name__ in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return
    import tokenizers
    from transformers.utils import cached_file

    file_name = "tokenizer.json"
    with from_outside(f"{path}: {file_name} cannot be read", "fix it, or set model.tokenizer to another"):
        file = cached_file(path, file_name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is None:
            return
        file_tokenizer = tokenizers.Tokenizer.from_file(file)
    for text in vocabulary_texts(tokenizer):
        actual = tokenizer.convert_ids_to_tokens(_ids(tokenizer, text, special=False) or [])
        expected = file_tokenizer.encode(text, add_special_tokens=False).tokens
        if actual != expected:
            problem = f"transformers loads it as {type(tokenizer).__name__}, which splits {text!r} into {actual}"
            remedy = "if the file is right, copy it without config.json to a folder and give that as model.tokenizer"
            log.warning("%s: %s, but tokenizer.json into %s; %s", path, problem, expected, remedy)
            return


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything that determines token ids: vocabulary, merges, added and special tokens, template."""
    if tokenizer.is_fast:
        tokenizer_state = json.loads(tokenizer.backend_tokenizer.to_str())
        tokenizer_state |= {"truncation": None, "padding": None}  # set by the latest call, not part of the identity
    else:
        tokenizer_state = sorted(tokenizer.get_vocab().items())
    added_tokens = sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items())
    roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}  # templates may write these
    splits_special = getattr(tokenizer, "split_special_tokens", False)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids), roles, splits_special]
    probes = [_ids(tokenizer, text, special=True) for text in vocabulary_texts(tokenizer)]  # behavior not in any file
    identity = [tokenizer_state, added_tokens, special, tokenizer.chat_template, probes]
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after every text.

    They are detected on a text made of vocabulary entries that contains none of these ids itself.

    Raises:
        UserError: the tokenizer adds tokens in another way, or encodes no text at all.
    """
    empty_ids, added_ids = (_ids(tokenizer, "", special) or [] for special in (False, True))
    num_added = len(added_ids) - len(empty_ids)
    for text in vocabulary_texts(tokenizer):
        plain_ids, full_ids = (_ids(tokenizer, text, special) or [] for special in (False, True))
        if not plain_ids or not set(plain_ids).isdisjoint(added_ids) or len(full_ids) - len(plain_ids) != num_added:
            continue
        for start in range(len(full_ids) - len(plain_ids) + 1):
            if full_ids[start : start + len(plain_ids)] == plain_ids:
                return full_ids[:start], full_ids[start + len(plain_ids) :]
    name = tokenizer.name_or_path or "model.tokenizer"
    text = next(vocabulary_texts(tokenizer), "")
    with from_outside(f"{name}: the tokenizer fails", "fix its files, or set model.tokenizer to another"):
        tokenizer(text)  # says why, if it can
    problem = "does not encode its own vocabulary, or adds different tokens to different texts"
    raise UserError(f"{name}: the tokenizer {problem}; set model.tokenizer to another")


def vocabulary_texts(tokenizer: Any) -> Iterator[str]:
    """Yield deterministic sample texts, each of a few consecutive vocabulary entries, spread over the vocabulary."""
    special_ids = set(tokenizer.all_special_ids)
    ids = sorted(index for index in tokenizer.get_vocab().values() if index not in special_ids)
    stride = max(1, len(ids) // NUM_SAMPLES)
    for start in islice(range(0, len(ids), stride), NUM_SAMPLES):
        yield tokenizer.decode(ids[start : start + TOKENS_PER_SAMPLE])


def _ids(tokenizer: Any, text: str, special: bool) -> list[int] | None:
    """Encode a text; None if the tokenizer cannot encode it."""
    try:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception:  # noqa: BLE001 (of tokenizers, for words out of vocabulary)
        return None
