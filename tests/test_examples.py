"""The examples run, and what they train learns."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
MARKS = {"from_python.py": pytest.mark.slow, "reward_then_ppo.py": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in FILES])
def test_an_example_lowers_its_loss_or_raises_its_score(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    kind, *values = re.search(r"(loss|score) (-?[\d.]+) -> (-?[\d.]+)", capsys.readouterr().out).groups()
    before, after = map(float, values)
    assert after < 0.9 * before if kind == "loss" else after > before + 0.3


def test_every_example_is_listed():
    assert sorted(re.findall(r"^\| `(\w+\.py)`", (EXAMPLES / "README.md").read_text(), re.M)) == FILES
