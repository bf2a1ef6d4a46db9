"""What the benchmark makes of its runs' figures, and, where its extras are installed, a small one from end to end."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from dpo_jax.models.families import decoder_config
from dpo_jax.models.flops import Work, step_flops


def test_what_a_start_costs_is_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import start_scale

    monkeypatch.setattr(sys, "argv", ["start_scale.py", str(tmp_path / "out"), "--pairs", "1500", "--steps", "100"])
    start_scale.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines] == [
        "1,500 pairs,", "first start:", "hash the dat", "verify and o", "split off he",
        "order of the", "second start", "audit (dpo-j", "report", "report.html",
    ]  # fmt: skip


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
    found = vs_trl.summarize([*theirs, ours], batch=8)
    assert found["trl"]["step_seconds"] == 8.0
    assert found["trl"]["pairs_per_second"] == 1.0
    assert found["dpo_jax-cached"]["pairs_per_second"] == 4.0  # 1/8 s of training and 1/8 s of reference a pair
    assert vs_trl.ratios(found) == {"dpo_jax-cached / trl": {"speed": 4.0, "memory": 0.25}}


def test_runs_without_a_step_in_common_are_refused(vs_trl):
    with pytest.raises(SystemExit, match="--trl-steps"):
        vs_trl.summarize([run_of("trl", [9, 9, 1]), run_of("dpo_jax-live", [9, 9, 1], compiled=[2])], batch=8)


def test_losses_are_compared_step_by_step(vs_trl):
    other = run_of("trl", [1]) | {"losses": [0.7, 0.5, 0.1]}
    assert vs_trl.loss_difference([run_of("dpo_jax-live", [1]), other]) == pytest.approx(0.1)


def test_transcripts_are_split_at_the_last_answer(vs_trl, tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [{"chosen": start + " d", "rejected": start + " e"}, {"chosen": start + " d", "rejected": start + " d"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert vs_trl.read_pairs(path) == [{"prompt": start, "chosen": " d", "rejected": " e"}]


LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}  # fmt: skip


def test_rates_count_real_tokens_and_the_operations_of_each_layout(vs_trl, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    lengths = [(9, 9, 9), (9, 9, 9), (5, 2, 3), (4, 1, 1)]  # step 1, the last two, is timed
    found = {name: {"step_seconds": 2.0} for name in ("trl", "trl-precomputed", "dpo_jax-live", "dpo_jax-cached")}
    matrix = {"device": "NVIDIA H200", "flops_per_second": 1e6}
    vs_trl.add_rates(found, [1], lengths, 2, tmp_path, matrix)
    assert {own["tokens_per_second"] for own in found.values()} == {8.0}
    once = 15 + (28 - 15) + (36 - 15) + 10 + (15 - 10) + (15 - 10)  # causal pairs, those of the prompt once
    shared, repeated = Work(16, 2 * once, 7), Work(25, 2 * (28 + 36 + 15 + 15), 7)  # in two layers
    for name, work in (("trl", repeated), ("trl-precomputed", repeated), ("dpo_jax-live", shared),
                       ("dpo_jax-cached", shared)):  # fmt: skip
        flops = step_flops(decoder_config(LLAMA), work, live_reference=name in ("trl", "dpo_jax-live"))
        assert found[name]["measured_mfu"] == pytest.approx(flops / 2e6)
        assert found[name]["mfu"] == pytest.approx(flops / 2 / 989.5e12)


def test_an_unknown_chip_has_no_published_rate(vs_trl, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    found = {"trl": {"step_seconds": 2.0}}
    vs_trl.add_rates(found, [0], [(5, 2, 3)], 1, tmp_path, {"device": "cpu", "flops_per_second": 1e6})
    assert found["trl"]["mfu"] is None


def test_matrix_products_are_timed(vs_trl, tmp_path):
    found = vs_trl.call("rate", tmp_path, "cpu", device="cpu", size=64)
    assert found["size"] == 64
    assert 1e6 < found["flops_per_second"] < 1e13


@pytest.mark.skipif(any(device.platform == "gpu" for device in jax.devices()), reason="there is a GPU")
def test_without_a_gpu_its_setting_ends_in_one_line(vs_trl, tmp_path):
    options = vs_trl.parse_options(["--setting", "gpu", "--pairs", "pairs.jsonl"])
    with pytest.raises(SystemExit, match=r"^--device gpu: JAX finds none here.*cuda.*$") as raised:
        vs_trl.matrix_rate(options, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("words", [["--trl-parts", "3"], ["--matrix", "0"], ["--trl-steps", "2"]])
def test_what_cannot_be_is_refused(vs_trl, words, capsys):
    with pytest.raises(SystemExit):
        vs_trl.parse_options(["--setting", "gpu", *words])
    assert f"{words[0]} {words[1]}: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="needs the extra bench")
def test_the_gpu_setting_runs_from_end_to_end(vs_trl, tmp_path, monkeypatch, capsys):
    pairs = [{"prompt": f"{'word ' * (index % 5)}say {index}", "chosen": f" {index} yes", "rejected": " no"}
             for index in range(16)]  # fmt: skip
    vs_trl.write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ["--setting", "gpu", "--device", "cpu", "--shape", "tiny", "--matrix", "64", "--rounds", "1",
             "--pairs", str(tmp_path / "pairs.jsonl"), "--steps", "4", "--trl-steps", "4", "--batch", "4",
             "--trl-parts", "2", "--programs", "trl", "dpo_jax-live",
             "--output", str(tmp_path / "found.json")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["vs_trl.py", *words])
    vs_trl.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["largest_loss_difference"] < 0.02  # bfloat16, by two programs
    for own in found["programs"].values():
        assert own["tokens_per_second"] > 0
        assert own["measured_mfu"] > 0
    assert "of measured rate" in capsys.readouterr().out
