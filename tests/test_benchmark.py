"""What the benchmark makes of its runs' figures; the runs themselves need its extras and minutes."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def vs_trl(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import vs_trl

    return vs_trl


def run_of(program, seconds, compiled=(), reference=0.0, peak=1.0):
    return {"program": program, "seconds": seconds, "compiled": list(compiled), "losses": [0.7, 0.6],
            "reference_seconds_per_pair": reference, "peak_gib": peak, "start_seconds": 1.0,
            "compile_seconds": 0.0}  # fmt: skip


def test_rates_are_of_the_steps_that_every_run_timed(vs_trl):
    theirs = [run_of("trl", [99, 99, 8.0, 50.0, 8.0], peak=peak) for peak in (6.0, 8.0, 9.0)]
    ours = run_of("dpo_jax-cached", [99, 99, 1.0, 40.0, 1.0, 77.0], compiled=[3], reference=0.125, peak=2.0)
    found = vs_trl.summarise([*theirs, ours], batch=8)
    assert found["trl"]["step_seconds"] == 8.0
    assert found["trl"]["pairs_per_second"] == 1.0
    assert found["dpo_jax-cached"]["pairs_per_second"] == 4.0  # 1/8 s of training and 1/8 s of reference a pair
    assert vs_trl.ratios(found) == {"dpo_jax-cached / trl": {"speed": 4.0, "memory": 0.25}}


def test_runs_without_a_step_in_common_are_refused(vs_trl):
    with pytest.raises(SystemExit, match="--trl-steps"):
        vs_trl.summarise([run_of("trl", [9, 9, 1]), run_of("dpo_jax-live", [9, 9, 1], compiled=[2])], batch=8)


def test_losses_are_compared_step_by_step(vs_trl):
    other = run_of("trl", [1]) | {"losses": [0.7, 0.5, 0.1]}
    assert vs_trl.loss_difference([run_of("dpo_jax-live", [1]), other]) == pytest.approx(0.1)


def test_transcripts_are_split_at_the_last_answer(vs_trl, tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [{"chosen": start + " d", "rejected": start + " e"}, {"chosen": start + " d", "rejected": start + " d"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert vs_trl.read_pairs(path) == [{"prompt": start, "chosen": " d", "rejected": " e"}]
