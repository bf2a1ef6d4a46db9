"""The comparison of methods with the exact optimum: its rows, its page, and best of n."""

import json

import numpy as np
import pytest

from dpo_jax.commands import compare, inn
from dpo_jax.commands.inn_policies import table_policy


def test_best_of_n_is_what_choosing_among_samples_reaches():
    task = compare.Task(table_policy())
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
    for name in ("DPO_STEPS", "ONLINE_STEPS", "GRADIENT_STEPS"):
        monkeypatch.setattr(compare, name, 3)
    monkeypatch.setattr(compare, "LARGE_DATA", 512)
    compare.compare(tmp_path)
    rows = json.loads((tmp_path / "compare.json").read_text())
    page = (tmp_path / "compare.html").read_text()
    assert [row["method"] for row in rows] == [method.name for method in compare.methods(table_policy())]
    for row in rows:
        assert f"<td>{row['reward']:.3f}</td><td>{row['kl']:.3f}</td><td>{row['share']:.3f}</td>" in page
    assert page.count("<td>") == 10 * (len(rows) + len(compare.BEST_OF))
    assert "Best of 64" in page
