"""Methods compared on a user's own model: what is judged, what is not repeated, and what is refused."""

import json
from pathlib import Path

import jax
import pytest
from runs import ended, events, num_lines, started, write_config
from small_tokenizer import make_tokenizer

from dpo_jax import cli
from dpo_jax.commands.comparison import compare_methods
from dpo_jax.config import DPOConfig, PPOConfig, RewardConfig
from dpo_jax.config.compare import CompareConfig
from dpo_jax.config.file import CommandLineText, config_to_yaml, parse_config
from dpo_jax.errors import UserError
from dpo_jax.runs.directory import RunDir, last_metrics

LEAST = {
    "model": {"path": "m"},
    "data": {"train": "pairs.jsonl", "eval": {"held_out": "held_out.jsonl"}, "max_length": 64},
    "judge": {"function": "rewards:vowels"},
    "sampling": {"max_tokens": 8},
    "run": {"dir": "compared", "steps": 2},
    "methods": {
        "dpo": {"method": "dpo", "betas": [0.1, 0.5]},
        "ipo": {"method": "dpo", "loss": {"type": "ipo", "beta": 0.2}},
        "online": {"method": "online_dpo", "online": {"answers": 3}},
        "rloo": {"method": "ppo", "reward": "learned", "ppo": {"estimator": "rloo", "answers": 2}, "steps": 7},
    },
}


def parse(**overrides) -> CompareConfig:
    texts = {name.replace("__", "."): CommandLineText(value) for name, value in overrides.items()}
    return parse_config(LEAST, texts, CompareConfig)


def test_every_run_has_the_shared_options_and_its_own():
    config = parse(seeds="2", run__seed="3", optimizer__learning_rate="1e-3", methods__ipo__optimizer__b2="0.9")
    runs = {run.folder: run for run in config.runs}
    names = ["reward_model", "dpo/beta-0.1", "dpo/beta-0.5", "ipo", "online", "rloo"]
    assert list(runs) == [f"{name}/seed-{seed}" for name in names for seed in (3, 4)]
    dpo, ipo, online, rloo = (runs[f"{name}/seed-4"].config for name in ("dpo/beta-0.5", "ipo", "online", "rloo"))
    assert isinstance(runs["reward_model/seed-3"].config, RewardConfig)
    assert isinstance(dpo, DPOConfig)
    assert isinstance(rloo, PPOConfig)
    assert (dpo.loss.beta, dpo.optimizer.learning_rate, dpo.run.seed) == (0.5, 1e-3, 4)
    assert (dpo.run.dir, dpo.data.store) == ("compared/dpo/beta-0.5/seed-4", "compared/store")
    assert (ipo.loss.type, ipo.loss.beta, ipo.optimizer.b2, ipo.optimizer.learning_rate) == ("ipo", 0.2, 0.9, 5e-7)
    assert (online.data.online.answers, online.data.online.reward.function) == (3, "rewards:vowels")
    assert (rloo.reward.path, rloo.run.steps) == ("compared/reward_model/seed-4", 7)
    assert parse_config(json.loads(json.dumps(LEAST)), {}, CompareConfig) == parse()


def test_the_load_balancing_loss_is_of_methods_that_have_one():
    config = parse(model__router_aux_loss_coef="0")
    coefs = {run.folder.split("/")[0]: run.config.model.router_aux_loss_coef for run in config.runs}
    assert coefs == {"reward_model": None, "dpo": 0.0, "ipo": 0.0, "online": 0.0, "rloo": None}


def test_a_config_is_read_back_as_it_was_written(tmp_path):
    (tmp_path / "c.yaml").write_text(config_to_yaml(parse()))
    assert parse_config(tmp_path / "c.yaml", {}, CompareConfig) == parse()


REFUSED = [
    ({"methods__dpo__loss__beta": "-1"}, "methods.dpo.loss.beta must be positive, got -1"),
    ({"methods__dpo__loss__beta": "3"}, "methods.dpo.betas: (0.1, 0.5) cannot be used: loss.beta is 3; give one of"),
    ({"methods__dpo__betas": "[1, 1]"}, "methods.dpo.betas: (1.0, 1.0) cannot be used: two of them are equal to six"),
    ({"methods__dpo__betas": "[1, 1.0000001]"}, "methods.dpo.betas: (1.0, 1.0000001) cannot be used: two of them are"),
    ({"methods__dpo__loss__type": "sft"}, "methods.dpo.betas: (0.1, 0.5) cannot be used: loss sft has no beta"),
    ({"methods__dpo__lr": "3"}, "methods.dpo.lr: unknown option: did you mean optimizer.learning_rate?"),
    ({"methods__dpo__online__answers": "3"}, "methods.dpo.online: method dpo has no such section; remove it"),
    ({"methods__rloo__loss__beta": "3"}, "methods.rloo.loss: method ppo has no such section; remove it"),
    ({"methods__dpo__reward": "learned"}, "methods.dpo.reward: 'learned' cannot be used: method dpo trains on the"),
    ({"methods__dpo__method": "sft"}, "methods.dpo.method must be dpo, online_dpo or ppo, got 'sft'"),
    ({"methods__online__loss__type": "orpo"}, "methods.online: loss.type: 'orpo' cannot be used: orpo imitates"),
    ({"methods": "{}"}, "methods: {} cannot be used: name at least one method"),
    ({"methods": "{a/b: {method: dpo}}"}, "methods: 'a/b' cannot be used: a method's name is also that of its folder"),
    ({"methods": "{store: {method: dpo}}"}, "methods: 'store' cannot be used: a method's name is also that of its"),
    ({"methods": "{reward_model: {method: dpo}}"}, "methods: 'reward_model' cannot be used: a method's name is"),
    ({"methods": "{Reference: {method: dpo}}"}, "methods: 'Reference' cannot be used: a method's name is"),
    ({"methods": "{comparison.html: {method: dpo}}"}, "methods: 'comparison.html' cannot be used: a method's name is"),
    ({"methods": "{start.json: {method: dpo}}"}, "methods: 'start.json' cannot be used: a method's name is"),
    ({"methods": "{config.yaml: {method: dpo}}"}, "methods: 'config.yaml' cannot be used: a method's name is"),
    ({"sampling__temperature": "0.5"}, "sampling.temperature: 0.5 cannot be used: training needs samples of the"),
    ({"data__eval": "{}"}, "data.eval: {} cannot be used: name one set of held-out pairs"),
    ({"data__eval": "{}", "data__eval_fraction": "0.1"}, "data.eval_fraction: 0.1 cannot be used: name one set"),
    ({"data__shuffle": "false", "seeds": "2"}, "learned_reward: run.seed: 1 cannot be used: nothing is random"),
    ({"checkpoint__keep_best": "1", "checkpoint__best_metric": "x"}, "checkpoint.keep_best: 1 cannot be used: the"),
    ({"judge__path": "x"}, "judge.function: 'rewards:vowels' cannot be used: judge.path is set, too"),
    ({"loss__beta": "1"}, "loss: belongs to `dpo-jax train`, not to `dpo-jax compare --config`"),
    ({"best_of": "[1]"}, "best_of.0 must be above 1, got 1"),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=[line[:50] for _, line in REFUSED])
def test_what_is_refused_before_anything_is_trained(overrides, line):
    with pytest.raises(UserError) as caught:
        parse(**overrides)
    assert str(caught.value).startswith(line)


def test_options_of_the_two_comparisons_do_not_mix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(json.dumps(LEAST))
    assert cli.main(["compare", "--run.steps", "3"]) == 2
    assert "--run.steps: it sets an option of a config file: add --config CONFIG.yaml" in capsys.readouterr().err
    assert cli.main(["compare", "--config", "c.yaml", "--dir", "x"]) == 2
    assert (
        "--dir: 'x' cannot be used: it is for the built-in task; with --config, set run.dir" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def small_config(folder: Path, methods: dict, **sections) -> Path:
    """A comparison on the built-in model with a few pairs."""
    make_tokenizer().save_pretrained(folder / "tokenizer")
    for name, count in (("pairs", 16), ("held_out", 8)):
        rows = [{"prompt": f"{name} {i}", "chosen": "yes" * (1 + i % 3), "rejected": f"no {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"train": str(folder / "pairs.jsonl"), "eval": {"held_out": str(folder / "held_out.jsonl")}}
    config = {
        "model": {"path": "builtin:tiny", "tokenizer": str(folder / "tokenizer")},
        "data": {**sources, "max_length": 64, "workers": 1},
        "judge": {"function": "rewards:vowels"},
        "sampling": {"max_tokens": 8},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "batch": {"pairs": 8},
        "mesh": {"fsdp": 1},
        "run": {"dir": str(folder / "compared"), "steps": 2, "progress": False, "report": False},
        "checkpoint": {"every": 1},
        "methods": methods,
        **sections,
    }
    return write_config(folder / "compare.yaml", config)


def test_answers_are_judged_as_a_run_judges_its_own_and_nothing_is_repeated(tmp_path):
    methods = {"dpo": {"method": "dpo"}, "rloo": {"method": "ppo", "ppo": {"estimator": "rloo", "answers": 2}}}
    path, compared = small_config(tmp_path, methods, best_of=[2]), tmp_path / "compared"

    def compare(**overrides) -> None:
        config = parse_config(
            path, {name.replace("__", "."): value for name, value in overrides.items()}, CompareConfig
        )
        compare_methods(config, devices=jax.devices()[:1])

    compare()
    results = json.loads((compared / "comparison.json").read_text())
    (dpo, rloo), page = results["experiment"]["rows"], (compared / "comparison.html").read_text()
    # the run's own evaluation has the same judge, prompts and keys
    own = last_metrics(RunDir(compared / "rloo" / "seed-0"))
    for key, metric in {"reward": "score", "kl": "sampled_kl", "length": "length", "ended": "ended"}.items():
        assert rloo[key] == pytest.approx(own[f"eval_held_out_{metric}"], abs=1e-5)
    assert rloo["win_rate"] == own["eval_held_out_win_rate"]
    assert rloo["kl"] != 0
    assert (rloo["sampled"], dpo["sampled"], dpo["pairs"], rloo["pairs"]) == (own["sampled_tokens"], 0, 16, 0)
    assert (
        results["rankings"]["dpo, beta 0.1"]["labels"]
        == last_metrics(RunDir(compared / "dpo" / "seed-0"))["eval_held_out_rewards/accuracies"]
    )
    reference, (best,) = results["experiment"]["reference"], results["experiment"]["best_of"]
    assert reference["win_rate"] == 0.5
    assert best["reward"] > reference["reward"]
    assert all(
        f'<th scope="row">{name}</th>' in page for name in ("Reference", "Best of 2 by the judge", "dpo", "rloo")
    )
    # again: nothing is trained or judged, and the page is the same
    times = {
        file: file.stat().st_mtime_ns for file in [*compared.rglob("judged.json"), *compared.rglob("metrics.jsonl")]
    }
    compare()
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert (compared / "comparison.html").read_text() == page
    assert all(len(events(compared / name / "seed-0", "start")) == 1 for name in ("dpo", "rloo"))
    with pytest.raises(
        UserError, match=r'with other options: judge\.function: was "rewards:vowels", now "rewards:equal"'
    ):
        compare(judge__function="rewards:equal")
    with pytest.raises(
        UserError, match=r"holds a comparison with other options: run\.steps: was 2, now 3: restore them"
    ):
        compare(run__steps=3)


@pytest.mark.slow
def test_a_comparison_killed_while_a_method_trains_ends_as_one_that_never_was(shared, tmp_path):
    """On real dialogues, with adapters, on 8 devices."""
    source = {"path": str(shared / "preference" / "hh_harmless_dev.jsonl"), "limit": 48}
    cut = {"max_length": 96, "truncation": "keep_end", "workers": 1}
    config = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "lora": {"rank": 4},
        "data": {"train": source, "eval": {"held_out": {**source, "limit": 8}}, **cut},
        "judge": {"function": "rewards:length"},
        "sampling": {"max_tokens": 8},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "batch": {"pairs": 8},
        "run": {"steps": 5, "dir": str(tmp_path / "killed"), "progress": False, "report": False},
        "checkpoint": {"every": 2},
        "methods": {
            "dpo": {"method": "dpo", "betas": [0.1]},
            "ppo": {"method": "ppo", "reward": "learned"},
        },
    }
    path, said = write_config(tmp_path / "c.yaml", config), tmp_path / "said"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["compare", "--config", path]
    assert ended(*command, "--run.dir", whole, output=said, devices=8) == (0, "")
    for run in ("dpo/beta-0.1", "ppo"):
        with started(*command, output=said, devices=8) as running:
            running.wait_for(lambda: num_lines(killed / run / "seed-0" / "metrics.jsonl") > 3)  # noqa: B023
            running.kill()
    assert ended(*command, output=said, devices=8) == (0, "")
    starts = {run: len(events(killed / run / "seed-0", "start")) for run in ("reward_model", "dpo/beta-0.1", "ppo")}
    assert starts == {"reward_model": 1, "dpo/beta-0.1": 2, "ppo": 2}
    results = [json.loads((folder / "comparison.json").read_text()) for folder in (whole, killed)]
    for result in results:
        for row in [*result["experiment"]["rows"], result["reward_model"]]:
            del row["seconds"], row["gib"]
    assert results[0] == results[1]
    (scores,) = results[0]["learned"]
    assert scores["after"]["learned"] != scores["before"]["learned"]
