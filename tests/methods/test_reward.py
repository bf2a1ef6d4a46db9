"""Reward models: Bradley-Terry on the pairs, rows and step of DPO."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from small import small_model
from small_tokenizer import make_tokenizer

from dpo_jax.batch import PairLogps
from dpo_jax.cli import main
from dpo_jax.commands.task import write_task
from dpo_jax.config import DPOConfig, LoraConfig, LossConfig, MeshConfig, RewardConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.losses import preference_loss, preference_metrics
from dpo_jax.methods.reward import unused_end
from dpo_jax.methods.setup import sets_of
from dpo_jax.models.adapters import make_lora
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.plan.plan import Inputs, plan_slices
from dpo_jax.runs.directory import read_json
from dpo_jax.train import train
from dpo_jax.weights.open import load_start
from dpo_jax.weights.peft import load_adapters

GOLDEN = Path(__file__).parents[1] / "golden"
ONE = jax.devices()[:1]  # for which a program compiles fastest
STEPS = 40  # in which the rule is learned to the last pair


def options(folder: Path, name: str, **more) -> dict:
    """A run of quickstart's shop, whose rule a reward model can learn to the last pair."""
    return {
        "model": {"path": "builtin:tiny", "tokenizer": str(folder / "tokenizer"), "dtype": "float32"},
        "data": {"train": str(folder / "data" / "train.jsonl"), "max_length": 64, "workers": 1,
                 "eval": {"held_out": str(folder / "data" / "held_out.jsonl")}, "store": str(folder / "store")},
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 10, "b2": 0.99},
        "batch": {"pairs": 64},
        "run": {"dir": str(folder / name), "steps": STEPS, "progress": False},
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run, `reward`, on the shop's pairs."""
    folder = tmp_path_factory.mktemp("shop")
    write_task(folder, 0)
    run = {"dir": str(folder / "reward"), "steps": STEPS, "samples": 40, "progress": False}
    train(parse_config(options(folder, "reward", run=run, sampling={"max_tokens": 16}), {}, RewardConfig))
    return folder


def test_a_reward_model_learns_the_rule_of_the_shop(trained):
    metrics = read_json(trained / "reward" / "metrics.jsonl")
    first = next(row for row in metrics if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)  # the head starts at 0
    assert 512 * metrics[-1]["eval_held_out_rewards/accuracies"] >= 510
    assert not any(name.startswith("logps/") for row in metrics for name in row)
    assert "Reward model" in (trained / "reward" / "report.html").read_text()


def test_the_start_s_answers_are_scored_at_every_evaluation(trained):
    rows, metrics = (read_json(trained / "reward" / f"{name}.jsonl") for name in ("samples", "metrics"))
    answers = [[row["start"]["text"] for row in rows if row["step"] == step] for step in (0, STEPS)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 40
    for step, logged in ((0, metrics[0]), (STEPS, metrics[-1])):
        scores = [row["start"]["score"] for row in rows if row["step"] == step]
        assert logged["eval_held_out_samples/score_mean"] == pytest.approx(np.mean(scores), abs=1e-6)
        assert logged["eval_held_out_samples/score_std"] == pytest.approx(np.std(scores), abs=1e-6)
        assert (np.std(scores) > 0.1) == (step > 0)  # the head starts at 0
    assert "start, score 0.0000 at step 0, " in (trained / "reward" / "report.html").read_text()


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


def test_eval_of_the_run_and_of_its_export_is_the_runs_last_evaluation(trained, capsys):
    config, exported = trained / "reward" / "config.yaml", trained / "exported_for_eval"
    assert main(["export", str(trained / "reward"), str(exported)]) == 0
    elsewhere = ["--model.path", str(exported), "--run.dir", str(trained / "none")]
    (logged,) = [
        {key: value for key, value in row.items() if key != "step" and "samples/" not in key}
        for row in read_json(trained / "reward" / "metrics.jsonl")
        if row["step"] == STEPS and "eval_held_out_loss" in row
    ]
    *_, spread = read_json(trained / "reward" / "distributions.jsonl")
    for name, more in ((f"{trained / 'reward'} step {STEPS}", []), (str(exported), elsewhere)):
        output = trained / f"pairs{len(more)}.jsonl"
        capsys.readouterr()
        assert main(["eval", str(config), "--for", "reward", "--output", str(output), *more]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["policy"] == name
        metrics = summary["sets"]["held_out"]
        assert {"step": STEPS, "set": "held_out", "pairs": 512, **metrics.pop("distributions")} == spread
        assert metrics.pop("pairs") == 512
        assert {f"eval_held_out_{key}": value for key, value in metrics.items()} == logged
        pairs = read_json(output)
        assert not any(key.startswith("logps/") for key in pairs[0])
        margins = [pair["rewards/margin"] for pair in pairs]
        assert np.mean(margins) == pytest.approx(metrics["rewards/margins"], rel=1e-5)


@pytest.mark.parametrize(
    ("command", "more", "line"),
    [("train", [], "it holds a reward model; use its config.yaml with --for reward"),
     ("reward", ["--per-token"], "--per-token: a reward model scores whole answers; omit --per-token"),
     ("reward", ["--run.dir", "none"], "model.path: 'builtin:tiny' cannot be used: it is a language model, which")],
)  # fmt: skip
def test_what_eval_cannot_score_is_refused(command, more, line, trained, capsys):
    arguments = ["eval", str(trained / "reward" / "config.yaml"), "--for", command, *more]
    assert main([*arguments, "--output", str(trained / "no.jsonl")]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.slow
def test_a_reward_model_trains_on_but_is_no_policy(trained):
    run = str(trained / "reward")
    model = {"path": run, "dtype": "float32"}
    more = {"model": model, "run": {"dir": str(trained / "further"), "steps": 1, "progress": False}}
    result = train(parse_config(options(trained, "further", **more), {}, RewardConfig), devices=ONE)
    assert result["loss"] < 0.1  # the head was loaded, not drawn again
    with pytest.raises(UserError, match=r"^run.samples: 1 cannot be used: model.path is a reward model, which cannot"):
        train(parse_config(options(trained, "further", **more), {"run.samples": 1}, RewardConfig))
    dpo = parse_config(options(trained, "dpo", model=model), {}, DPOConfig)
    for use in (lambda: train(dpo), lambda: next(plan_slices(dpo, ["v5e:2x2"], Inputs(), search=False))):
        with pytest.raises(UserError, match="it is a reward model, without an unembedding; choose a language model"):
            use()


@pytest.mark.slow
def test_a_dpo_run_puts_the_reward_model_next_to_the_implicit_reward(trained, capsys):
    """Its scores are those of the reward model's own run on the same pairs."""
    *_, spread = read_json(trained / "reward" / "distributions.jsonl")
    *_, logged = read_json(trained / "reward" / "metrics.jsonl")
    data = options(trained, "x")["data"] | {"train": {"path": str(trained / "data" / "train.jsonl"), "limit": 8}}
    more = {"data": data, "batch": {"pairs": 8}, "eval": {"reward": str(trained / "reward")}}
    more["optimizer"] = {"learning_rate": 1e-3, "schedule": "constant"}
    run = {"dir": str(trained / "compared"), "steps": 1, "progress": False}
    train(parse_config(options(trained, "compared", **more, run=run), {}, DPOConfig))
    first, last = read_json(trained / "compared" / "distributions.jsonl")
    expected = pytest.approx(spread["calibration"]["ece"], abs=1e-6)
    assert first["reward_model"]["calibration"]["ece"] == last["reward_model"]["calibration"]["ece"] == expected
    assert last["calibration"] != first["calibration"]
    assert '<th scope="row">held_out: reward model</th>' in (trained / "compared" / "report.html").read_text()
    pairs = trained / "compared.jsonl"
    assert main(["eval", str(trained / "compared" / "config.yaml"), "--output", str(pairs)]) == 0
    metrics = json.loads(capsys.readouterr().out)["sets"]["held_out"]
    assert metrics["reward_model/accuracies"] == logged["eval_held_out_rewards/accuracies"]
    assert metrics["distributions"]["reward_model"]["calibration"]["ece"] == expected
    lines = read_json(pairs)
    assert np.mean([row["reward_model/chosen"] for row in lines]) == pytest.approx(
        logged["eval_held_out_rewards/chosen"], abs=1e-5
    )
    alike = [
        (row["reward_model/chosen"] > row["reward_model/rejected"]) == (row["rewards/margin"] > 0) for row in lines
    ]
    assert metrics["reward_model/agreement"] == np.mean(alike) < 1


@pytest.mark.slow
def test_a_run_of_a_language_model_becomes_a_reward_model(shared, tmp_path):
    pairs = str(shared / "reference_curves" / "pairs.jsonl")
    common = {
        "model": {"path": str(shared / "models" / "stories260K"), "dtype": "float32"},
        "data": {"train": {"path": pairs, "limit": 8}, "max_length": 96, "workers": 1, "store": str(tmp_path / "s")},
        "batch": {"pairs": 4},
    }
    run = {"steps": 1, "progress": False, "report": False}
    train(parse_config(common | {"run": run | {"dir": str(tmp_path / "dpo")}}, {}, DPOConfig), devices=ONE)
    more = {"model": {"path": str(tmp_path / "dpo"), "dtype": "float32"}, "run": run | {"dir": str(tmp_path / "r")}}
    result = train(parse_config(common | more, {}, RewardConfig), devices=ONE)
    assert result["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "curve",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("center 0", "center 0.01")), "center 0.01, margins"],
)
def test_every_step_equals_that_of_trl(curve, shared, tmp_path):
    """Loss, gradient norm and margin; benchmarks/trl_reward_curve.py recorded TRL's."""
    theirs = json.loads((GOLDEN / "trl_reward.json").read_text())["curves"][curve]
    rows = read_json(shared / "reference_curves" / "pairs.jsonl")
    if "margins" in curve:
        rows = [row | {"margin": (i % 5) / 4} for i, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"train": str(tmp_path / "pairs.jsonl"), "shuffle": False, "workers": 1}
    config = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": pairs | {"store": str(tmp_path / "store")},
        "loss": {"center": float(curve.split()[1].strip(","))},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "batch": {"pairs": 8},
        "run": {"dir": str(tmp_path / "run"), "steps": 20, "progress": False, "report": False},
        "checkpoint": {"every": 20},
    }
    train(parse_config(config, {}, RewardConfig), devices=ONE)
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
    pairs = replace(pairs, margin=jnp.array([0.5, -1.0]))
    expected = [np.log1p(np.exp(-1.25)) + 0.01 * 1.25**2, np.log1p(np.exp(0.5)) + 0.01 * 2.5**2]
    np.testing.assert_allclose(preference_loss(pairs, None, config), expected, rtol=1e-6)
    assert float(preference_metrics(pairs, None, config)["rewards/margins"]) == pytest.approx(0.125)


def test_a_margin_that_is_no_number_is_refused_by_reward_and_passed_over_by_train(trained):
    rows = read_json(trained / "data" / "train.jsonl")[:8]
    lines = [json.dumps(row | {"margin": "large" if i == 5 else 1}) for i, row in enumerate(rows)]
    (trained / "margins.jsonl").write_text("\n".join(lines))
    data = {"train": str(trained / "margins.jsonl"), "max_length": 64, "workers": 1, "store": str(trained / "store")}
    more = {"data": data, "batch": {"pairs": 4}}
    with pytest.raises(UserError, match=r"^row 5 of \S+: margin is not a number: fix the column margin, or"):
        train(parse_config(options(trained, "m", **more), {}, RewardConfig))
    dpo = more | {"run": {"dir": str(trained / "m"), "steps": 1, "progress": False, "report": False}}
    result = train(parse_config(options(trained, "m", **dpo), {}, DPOConfig), devices=ONE)
    assert result["loss"] == pytest.approx(np.log(2), abs=1e-6)


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


def test_options_without_a_meaning_for_scores_are_refused(tmp_path):
    with pytest.raises(UserError, match="a reward model predicts no tokens; leave it at 1024"):
        parse_config(options(tmp_path, "x"), {"batch.target_chunk": 64}, RewardConfig)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
def test_adapters_with_their_head_are_the_same_function_in_peft(shared, torch, peft, tmp_path, capsys):
    """After three steps: PEFT, the merged export, eval, and a start from the adapters have the run's last scores."""
    base, pairs = str(shared / "models" / "stories260K"), str(shared / "reference_curves" / "pairs.jsonl")
    run = {"dir": str(tmp_path / "run"), "steps": 3, "eval_every": 3, "progress": False, "report": False}
    config = parse_config(
        {
            "model": {"path": base, "dtype": "float32"},
            "lora": {"rank": 4, "targets": ["q_proj", "up_proj"]},
            "data": {"train": {"path": pairs, "limit": 8}, "eval": {"dev": {"path": pairs, "limit": 16}},
                     "max_length": 96, "workers": 1, "store": str(tmp_path / "store")},
            "optimizer": {"learning_rate": 0.03, "schedule": "constant", "warmup_steps": 0},
            "batch": {"pairs": 4},
            "run": run,
        },
        {},
        RewardConfig,
    )  # fmt: skip
    train(config)
    last = {key: value for key, value in read_json(tmp_path / "run" / "metrics.jsonl")[-1].items() if key != "step"}
    for more in (["--adapters"], []):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / f"exported{len(more)}"), *more]) == 0
    merged, adapters = tmp_path / "exported0", tmp_path / "exported1"

    classifier = partial(transformers.AutoModelForSequenceClassification.from_pretrained, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    store = sets_of(config, tokenizer).evals["dev"].store
    pad = json.loads((merged / "config.json").read_text())["pad_token_id"]
    examples = map(store.example, range(len(store)))
    ids = [np.concatenate([prompt, answer]) for prompt, answers, _ in examples for answer in answers]
    tokens = torch.tensor([[*row, *[pad] * (max(map(len, ids)) - len(row))] for row in ids])

    def scores(model) -> np.ndarray:
        with torch.no_grad():
            return model(tokens, attention_mask=(tokens != pad).long()).logits.numpy().reshape(-1, 2)

    theirs = scores(peft.PeftModel.from_pretrained(classifier(base, num_labels=1, pad_token_id=pad), adapters))
    assert np.ptp(theirs) > 0.1  # or equality would say little
    np.testing.assert_allclose(scores(classifier(merged)), theirs, atol=1e-5)
    arguments = ["eval", str(tmp_path / "run" / "config.yaml"), "--for", "reward", "--output"]
    start = ["--run.dir", str(tmp_path / "none"), "--lora.path", str(adapters)]
    for name, more in (("run", []), ("start", start)):
        capsys.readouterr()
        assert main([*arguments, str(tmp_path / f"{name}.jsonl"), *more]) == 0
        found = json.loads(capsys.readouterr().out)["sets"]["dev"]
        assert {f"eval_dev_{key}": found[key] for key in found if key not in ("pairs", "distributions")} == last
        ours = [[pair["rewards/chosen"], pair["rewards/rejected"]] for pair in read_json(tmp_path / f"{name}.jsonl")]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("saved", [None, "score", ["classifier"], ["score", "embed_tokens"], [{}, "score"]], ids=str)
def test_adapters_without_the_head_alone_are_refused(saved, tmp_path):
    config = replace(small_model().config, scores=1)
    model = replace(small_model(), config=config, lora=make_lora(LoraConfig(rank=2), config))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "modules_to_save": saved}))
    with pytest.raises(UserError, match=r"modules_to_save: .* adapters must include its head; save score"):
        load_adapters(tmp_path, model, LoraConfig(rank=2), None)


def test_adapters_of_a_reward_model_start_from_its_head(tmp_path):
    config = replace(small_model().config, scores=1)
    model = replace(small_model(), config=config, lora=make_lora(LoraConfig(rank=2), config))
    head = jnp.arange(model.config.hidden, dtype=jnp.bfloat16)[None]
    started = load_start(LoraConfig(rank=2), model, {"score": head}, 0, make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_array_equal(started["score"], head.astype(jnp.float32))
