"""Every way in which a sealed JSON file is edited in tests: what it is must be noticed, however it was changed."""

import json
import re

from dpo_jax.storage import SEAL, seal, unseal

DEEP = "[" * 100_000 + "]" * 100_000


def edits(text: bytes) -> dict[str, bytes]:
    """Edited versions of a sealed object, by what was done: each field gone, of another type, nested, a digit changed.

    Where the object was sealed again, only its shape is wrong.
    """
    content = unseal(text)
    found = {
        "nested, whole": DEEP.encode(),
        "list": b"[]",
        "number": b"7",
        "empty": b"",
        "not UTF-8": b"\xff" + text[1:],
    }
    for name, value in json.loads(text).items():
        others = {key: other for key, other in json.loads(text).items() if key != name}
        wrong = 7 if isinstance(value, dict | list | str | None) else "seven"
        found |= {
            f"{name} gone": json.dumps(others).encode(),
            f"{name} wrong": json.dumps({**others, name: wrong}).encode(),
        }
        deep = json.dumps({**others, name: "DEEP"}).replace('"DEEP"', DEEP)
        found[f"{name} nested"] = deep.encode()
        digit = re.search(r"[0-8]", json.dumps(value))
        if digit is not None:
            changed = json.dumps(value)[: digit.start()] + str(int(digit[0]) + 1) + json.dumps(value)[digit.end() :]
            found[f"{name}, a digit"] = json.dumps({**others, name: json.loads(changed)}).encode()
        if name != SEAL:
            left = {key: other for key, other in content.items() if key != name}
            found[f"{name} gone, sealed"] = json.dumps(seal(left)).encode()
            found[f"{name} wrong, sealed"] = json.dumps(seal({**left, name: wrong})).encode()
    return found
