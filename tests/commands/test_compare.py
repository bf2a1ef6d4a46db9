"""The comparison of methods with the exact optimum: its rows, its page, and best of n."""

import json

import numpy as np
import pytest

from dpo_jax.commands import compare, inn
from dpo_jax.commands.inn_experiment import Experiment, Sizes, Task
from dpo_jax.commands.inn_policies import table_policy


def test_best_of_n_is_what_choosing_among_samples_reaches():
    task = Task(table_policy())
    rng, best = np.random.default_rng(0), []
    for guest in range(inn.NUM_GUESTS):
        probs = np.exp(task.reference[guest])
        drawn = rng.choice(len(probs), size=(4000, 4), p=probs / probs.sum())
        best.append(task.tree.rewards[guest][drawn].max(1))
    values = np.concatenate(best)
    exact = task.tree.best_of(task.reference, 4)
    assert abs(values.mean() - exact.reward) < 4 * values.std() / values.size**0.5
    assert 0 < exact.kl < np.log(4) - 3 / 4  # ties make it less than the bound of Stiennon et al. 2020
    np.testing.assert_allclose(task.tree.best_of(task.reference, 1), task.start, atol=1e-9)


@pytest.mark.slow
def test_the_page_has_a_row_and_a_point_for_every_method(tmp_path, monkeypatch):
    few = Sizes(offline=3, online=3, gradient=3, rates=(0.05, 0.02))
    monkeypatch.setattr(compare, "TABLE_SIZES", few)
    monkeypatch.setattr(compare, "DECODER_SIZES", few)
    monkeypatch.setattr(compare, "supervised_decoder", table_policy)  # whose programs compile fast
    compare.compare(tmp_path)
    results = json.loads((tmp_path / "compare.json").read_text())
    page = (tmp_path / "compare.html").read_text()
    table, decoder = results["experiments"]
    experiment = Experiment("", Task(table_policy()), few)
    assert [row["name"] for row in table["rows"]] == [each.name for each in compare.table_methods(experiment)]
    assert [row["name"] for row in decoder["rows"]] == [each.name for each in compare.decoder_methods(experiment)]
    for row in [*table["rows"], *decoder["rows"]]:
        assert f"<td>{row['reward']:.3f}</td><td>{row['kl']:.3f}</td>" in page
        assert f">{row['name']}</th>" in page
    assert set(results["texts"]["rows"]) >= {"Reference", "IPO, 0.5", "Online DPO, 0.2"}
    assert page.count("<svg ") == 2 + len(results["rankings"])


@pytest.mark.slow
def test_rankings_agree_with_labels_as_often_as_the_rule_allows():
    """A ranker that knows the rule is right about the labels and calibrated, as they are drawn from it."""
    experiment = Experiment("", Task(table_policy()), compare.TABLE_SIZES)
    rewards = np.asarray(experiment.held_out.rewards, np.float64)
    actual = compare._ranking((rewards[:, :1] - rewards[:, 1:]).T, np.round(rewards[:, 0] - rewards[:, 1], 6))
    expected = (1 / (1 + np.exp(-np.abs(rewards[:, 0] - rewards[:, 1])))).mean()
    assert abs(actual["labels"] - expected) < 4 * 0.5 / len(rewards) ** 0.5
    assert actual["calibration"]["ece"] < 0.04
