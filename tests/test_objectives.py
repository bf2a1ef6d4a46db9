"""docs/objectives.md says what the code computes."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from dpo_jax.config import LOSS_TRAITS, LossConfig, LossType
from dpo_jax.losses import LOSSES
from dpo_jax.methods.start_check import loss_at_start

PAGE = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text()
ROWS = {
    row[0].strip("`"): row[1:]
    for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|")
    if len(row) == 6 and row[0].startswith("`") and row[0] != "`loss.type`"
}


def test_every_loss_has_its_row():
    assert list(ROWS) == list(LOSSES) == list(LOSS_TRAITS) == list(get_args(LossType))


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_says_what_the_code_does(name):
    """Value at margin 0 with the defaults, the options that the loss takes, and the paper of its docstring."""
    _, at_start, options, source, when = ROWS[name]
    loss = LossConfig(type=name, label_smoothing=0.001 if name == "exo_pair" else 0.0)
    start = loss_at_start(loss)
    assert at_start == ("policy" if start is None else f"{start.loss:.4g}")
    assert set(re.findall(r"`(\w+)`", options)) == set(LOSS_TRAITS[name].options)
    papers = set(re.findall(r"\d{4}\.\d{5}", LOSSES[name].__doc__))
    assert papers == set(re.findall(r"\d{4}\.\d{5}", source))
    assert when


def test_every_option_of_the_loss_is_explained():
    assert [f.name for f in fields(LossConfig) if f.name not in ("type", "weights") and f"`{f.name}`" not in PAGE
            and f"loss.{f.name}" not in PAGE] == []  # fmt: skip
