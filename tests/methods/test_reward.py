"""Reward models: Bradley-Terry on the pairs, rows and step of DPO."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from small_tokenizer import make_tokenizer

from dpo_jax.batch import PairLogps
from dpo_jax.cli import main
from dpo_jax.commands.task import write_task
from dpo_jax.config import DPOConfig, LossConfig, RewardConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.losses import preference_loss, preference_metrics
from dpo_jax.methods.reward import unused_end
from dpo_jax.plan.plan import Inputs, plan_slices
from dpo_jax.runs.directory import read_json
from dpo_jax.train import train

GOLDEN = Path(__file__).parents[1] / "golden"


def options(folder: Path, name: str, **more) -> dict:
    """A run of quickstart's shop, whose rule a reward model can learn to the last pair."""
    return {
        "model": {"path": "builtin:tiny", "tokenizer": str(folder / "tokenizer"), "dtype": "float32"},
        "data": {"train": str(folder / "data" / "train.jsonl"), "max_length": 64, "workers": 1,
                 "eval": {"held_out": str(folder / "data" / "held_out.jsonl")}, "store": str(folder / "store")},
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 10, "b2": 0.99},
        "batch": {"pairs": 64},
        "run": {"dir": str(folder / name), "steps": 60, "progress": False},
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run, `reward`, on the shop's pairs."""
    folder = tmp_path_factory.mktemp("shop")
    write_task(folder, 0)
    train(parse_config(options(folder, "reward"), {}, RewardConfig))
    return folder


def test_a_reward_model_learns_the_rule_of_the_shop(trained):
    metrics = read_json(trained / "reward" / "metrics.jsonl")
    first = next(row for row in metrics if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)  # the head starts at 0
    assert 512 * metrics[-1]["eval_held_out_rewards/accuracies"] >= 510
    assert not any(name.startswith("logps/") for row in metrics for name in row)
    assert "Reward model" in (trained / "reward" / "report.html").read_text()


def test_the_exported_model_scores_in_transformers_as_in_the_run(trained, torch):
    assert main(["export", str(trained / "reward"), str(trained / "exported")]) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained / "exported", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "exported")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id != tokenizer.eos_token_id
    rows = [json.loads(line) for line in (trained / "data" / "held_out.jsonl").read_text().splitlines()]
    ids = [
        tokenizer(row["prompt"] + row[answer])["input_ids"] + [tokenizer.eos_token_id]
        for row in rows
        for answer in ("chosen", "rejected")
    ]
    tokens = torch.tensor([row + [model.config.pad_token_id] * (max(map(len, ids)) - len(row)) for row in ids])
    with torch.no_grad():
        scores = model(tokens).logits.numpy().reshape(-1, 2)
    last = read_json(trained / "reward" / "metrics.jsonl")[-1]
    assert scores[:, 0].mean() == pytest.approx(last["eval_held_out_rewards/chosen"], abs=1e-5)
    assert scores[:, 1].mean() == pytest.approx(last["eval_held_out_rewards/rejected"], abs=1e-5)


def test_a_reward_model_trains_on_but_is_no_policy(trained):
    run = str(trained / "reward")
    model = {"path": run, "dtype": "float32"}
    more = {"model": model, "run": {"dir": str(trained / "further"), "steps": 1, "progress": False}}
    result = train(parse_config(options(trained, "further", **more), {}, RewardConfig))
    assert result["loss"] < 0.1  # the head was loaded, not drawn again
    dpo = parse_config(options(trained, "dpo", model=model), {}, DPOConfig)
    for use in (lambda: train(dpo), lambda: next(plan_slices(dpo, ["v5e:2x2"], Inputs(), search=False))):
        with pytest.raises(UserError, match="it is a reward model, without an unembedding; choose a language model"):
            use()


def test_a_run_of_a_language_model_becomes_a_reward_model(shared, tmp_path):
    pairs = str(shared / "reference_curves" / "pairs.jsonl")
    common = {
        "model": {"path": str(shared / "models" / "stories260K"), "dtype": "float32"},
        "data": {"train": {"path": pairs, "limit": 8}, "max_length": 96, "workers": 1, "store": str(tmp_path / "s")},
        "batch": {"pairs": 4},
    }
    run = {"steps": 1, "progress": False, "report": False}
    train(parse_config(common | {"run": run | {"dir": str(tmp_path / "dpo")}}, {}, DPOConfig))
    more = {"model": {"path": str(tmp_path / "dpo"), "dtype": "float32"}, "run": run | {"dir": str(tmp_path / "r")}}
    assert train(parse_config(common | more, {}, RewardConfig))["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("curve", [pytest.param("center 0", marks=pytest.mark.slow), "center 0.01"])
def test_every_step_equals_that_of_trl(curve, shared, tmp_path):
    """Loss, gradient norm and margin; benchmarks/trl_reward_curve.py recorded TRL's."""
    theirs = json.loads((GOLDEN / "trl_reward.json").read_text())["curves"][curve]
    pairs = {"train": str(shared / "reference_curves" / "pairs.jsonl"), "shuffle": False, "workers": 1}
    config = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": pairs | {"store": str(tmp_path / "store")},
        "loss": {"center": float(curve.split()[1])},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "batch": {"pairs": 8},
        "run": {"dir": str(tmp_path / "run"), "steps": 20, "progress": False, "report": False},
        "checkpoint": {"every": 20},
    }
    train(parse_config(config, {}, RewardConfig))
    ours = read_json(tmp_path / "run" / "metrics.jsonl")
    assert len(ours) == len(theirs) == 20
    for row, expected in zip(ours, theirs, strict=True):
        for key, allowed in (("loss", 1e-5), ("rewards/margins", 1e-5), ("grad_norm", 1e-3 * expected["grad_norm"])):
            assert abs(row[key] - expected[key]) <= allowed, f"step {row['step']}: {key}"
    assert max(abs(row["rewards/margins"]) for row in ours) > 0.01


def test_the_loss_is_bradley_terry_with_centering():
    scores = jnp.array([[1.5, -0.25], [0.5, 2.0]])
    pairs = PairLogps(scores, jnp.ones((2, 2)), jnp.ones(2), jnp.ones(2, bool), scored=True)
    config = LossConfig(type="sigmoid", beta=1.0, reference_free=True, center=0.01)
    expected = [np.log1p(np.exp(-1.75)) + 0.01 * 1.25**2, np.log1p(np.exp(1.5)) + 0.01 * 2.5**2]
    np.testing.assert_allclose(preference_loss(pairs, None, config), expected, rtol=1e-6)
    assert float(preference_metrics(pairs, None, config)["rewards/chosen"]) == 1.0


def store_of(*ends: int) -> SimpleNamespace:
    """A store of one-token prompts and answers of two tokens, the last of which are given."""
    lengths = np.array([[1, 2, 2]] * (len(ends) // 2))
    tokens = np.array([token for a, b in zip(ends[::2], ends[1::2], strict=True) for token in (3, 3, a, 3, b)])
    return SimpleNamespace(starts=5 * np.arange(len(lengths)), lengths=lengths, tokens=tokens)


def test_padding_is_a_token_that_ends_no_answer():
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    first = unused_end(tokenizer, len(tokenizer), [store_of(eos, eos)])
    assert first != eos
    assert unused_end(tokenizer, len(tokenizer) + 1, [store_of(eos, eos), store_of(eos, first)]) not in (eos, first)


def test_all_special_tokens_at_ends_are_refused():
    tokenizer = make_tokenizer()
    special = sorted({*tokenizer.all_special_ids, tokenizer.unk_token_id or 0, tokenizer.pad_token_id or 0})
    ends = special if len(special) % 2 == 0 else [*special, special[0]]
    with pytest.raises(UserError, match="every special token may end an answer; add a padding token"):
        unused_end(tokenizer, len(tokenizer), [store_of(*ends)])
    assert unused_end(tokenizer, len(tokenizer) + 1, [store_of(*ends)]) == len(tokenizer)


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [("lora.rank", 4, "lora.rank: 4 cannot be used: training a reward model updates all weights; use 0"),
     ("batch.target_chunk", 64, "a reward model predicts no tokens; leave it at 1024")],
)  # fmt: skip
def test_options_without_a_meaning_for_scores_are_refused(option, value, line, tmp_path):
    with pytest.raises(UserError, match=line):
        parse_config(options(tmp_path, "x"), {option: value}, RewardConfig)
