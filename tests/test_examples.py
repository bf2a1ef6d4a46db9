"""The examples run, and what they train learns."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
MARKS = {"from_python.py": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in FILES])
def test_an_example_lowers_its_loss(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups())
    assert after < 0.9 * before


def test_every_example_is_listed():
    assert sorted(re.findall(r"^\| `(\w+\.py)`", (EXAMPLES / "README.md").read_text(), re.M)) == FILES
