"""What fuzz tests share: valid trees made odd, files made of them, and the only two outcomes there may be."""

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_jax.errors import UserError

DEEP, HUGE = "@deep@", "@huge@"  # in JSON text: lists nested deeper than any parser goes, more digits than Python reads
ODD_TEXTS = (
    "", " ", "x", "1", "null", "true", "a\nb", "\r", "\x00", "\x1b[31m", "\ud800", "é\u2028", "🙂", "../x", "%s", "{x}",
    "{{ x }}", "</s>", "<|im_end|>", "[1]", '{"a": 1}', '["a", null]', "a" * 5000, DEEP, HUGE,
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 3, 7, 1.0, -0.0, 0.5, 1e-400, 1e308, math.inf, -math.inf, math.nan, 2**31, 2**63, 2**64, -(2**70),
    10**400,
)  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS), st.text(max_size=8)
)
odd_values = st.one_of(
    scalars,
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(ODD_TEXTS), inner, max_size=3),
        max_leaves=6,
    ),
)


def hunt(examples: int, strategy: st.SearchStrategy, check: Callable[[Any], bool]) -> tuple[int, int]:
    """Check that many drawn values, the same ones every time.

    Returns:
        How many were checked, and how many of them the product accepted.
    """
    accepted: list[bool] = []

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def run(value):
        accepted.append(check(value))

    run()
    return len(accepted), sum(accepted)


def refused(call: Callable[[], Any], *named: str) -> tuple[Any, bool]:
    """(what the call returns, False), or (None, True) where it is refused as documented; anything else is raised.

    Args:
        call: of the product.
        named: each is in the line of a refusal.
    """
    try:
        return call(), False
    except UserError as error:
        line = str(error)
        assert line.strip(), "an empty refusal"
        assert line.isprintable(), f"not one plain line: {line!r}"
        assert len(line) < 20_000, f"a line of {len(line)} characters: {line[:500]!r}"
        for name in named:
            assert name in line, f"{name} is not named: {line!r}"
        return None, True


def _paths(tree: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Every place under the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from _paths(value, (*prefix, key))


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _mutate(draw: st.DrawFn, tree: Any) -> Any:
    paths = list(_paths(tree))
    if not paths or draw(st.integers(0, 30)) == 0:
        return draw(odd_values)
    path = draw(st.sampled_from(paths))
    parent, key = _at(tree, path[:-1]), path[-1]
    value = parent[key]
    kind = draw(st.sampled_from(
        ["replace"] * 5 + ["delete"] * 2 + ["nest in a list", "nest in a mapping", "copy from", "insert", "null",
         "text"]
    ))  # fmt: skip
    if kind == "delete":
        del parent[key]
    elif kind == "insert" and isinstance(parent, list):
        parent.insert(key, draw(st.sampled_from([deepcopy(value), None]) | odd_values))
    elif kind == "insert":
        parent[draw(st.sampled_from(ODD_TEXTS))] = draw(odd_values)
    else:
        parent[key] = {
            "replace": lambda: draw(odd_values),
            "nest in a list": lambda: [value],
            "nest in a mapping": lambda: {draw(st.sampled_from(["x", "", str(key)])): value},
            "copy from": lambda: deepcopy(_at(tree, draw(st.sampled_from(paths)))),
            "null": lambda: None,
            "text": lambda: json.dumps(value),
        }[kind]()
    return tree


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy, most: int = 3) -> Any:
    """A valid tree of JSON values after 0 to `most` mutations."""
    tree = deepcopy(draw(valid))
    for _ in range(draw(st.integers(0, most))):
        tree = _mutate(draw, tree)
    return tree


def as_json(tree: Any) -> str:
    """JSON text, ASCII, of a tree; its odd texts ``DEEP`` and ``HUGE`` become what they stand for."""
    text = json.dumps(tree)
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{HUGE}"', "9" * 5000)


@st.composite
def damaged(draw: st.DrawFn, good: st.SearchStrategy) -> bytes:
    """Bytes after one accident: cut short, a piece replaced, removed, doubled, or put in; or noise."""
    data = draw(good)
    kind = draw(st.sampled_from(["whole", "cut", "replace", "replace", "remove", "double", "insert", "noise"]))
    if kind == "whole" or not data:
        return data
    if kind == "noise":
        return draw(st.binary(max_size=64))
    start = draw(st.integers(0, len(data) - 1))
    end = min(len(data), start + draw(st.integers(1, 8)))
    piece = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"0", b"9", b'"', b"{", b"\x00", b"\xff", b"\n"]))
    return {
        "cut": lambda: data[:start],
        "replace": lambda: data[:start] + piece[: end - start] + data[start + len(piece[: end - start]) :],
        "remove": lambda: data[:start] + data[end:],
        "double": lambda: data[:end] + data[start:],
        "insert": lambda: data[:start] + piece + data[start:],
    }[kind]()
