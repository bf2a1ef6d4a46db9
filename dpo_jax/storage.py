"""JSON objects with a checksum: an object and the SHA-256 of its content, in one file."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dpo_jax.errors import reason

SEAL = "sha256"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its checksum added; ``unseal`` gives the content back from its JSON text.

    Args:
        content: JSON values by name, without the name ``SEAL``.
    """
    return {**content, SEAL: _checksum(json.dumps(content, sort_keys=True))}


def unseal(text: bytes) -> dict[str, Any]:
    """The content that was sealed, whatever has happened to its JSON text since.

    Raises:
        ValueError: this is no text of a sealed object, or it was changed.
    """
    try:
        content = json.loads(text)
        checksum = content.pop(SEAL, None) if isinstance(content, dict) else None
        canonical = json.dumps(content, sort_keys=True)
    except Exception as error:  # nested too deeply, half a character, ...
        raise ValueError(f"it is not JSON: {reason(error)}") from error
    if checksum != _checksum(canonical):
        raise ValueError("its checksum is wrong")
    return content


def _checksum(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()
