"""Configs: strict types, names, round trips, and one clear line for whatever is wrong."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from dpo_jax.config import (
    DPOConfig,
    GenerateConfig,
    LossConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    SourceConfig,
)
from dpo_jax.config.compare import CompareConfig
from dpo_jax.config.docs import help_sections, reference_page, sections
from dpo_jax.config.elsewhere import NOT_OFFERED, OPTION_ALIASES
from dpo_jax.config.file import CommandLineText, config_to_yaml, field_names, load_yaml, parse_config
from dpo_jax.config.idle import IDLE, Facts, idle_options
from dpo_jax.config.section import Range
from dpo_jax.errors import UserError

ROOT = Path(__file__).parents[2]
LEAST = {"model": {"path": "m"}, "data": {"train": "pairs.jsonl"}, "run": {"dir": "runs/x"}}


def parse(kind=DPOConfig, /, **overrides):
    """The least config with `section__key=value` on top."""
    return parse_config(LEAST, {name.replace("__", "."): value for name, value in overrides.items()}, kind)


def typed(**overrides):
    """The same, as on the command line."""
    return parse(**{name: CommandLineText(text) for name, text in overrides.items()})


def refused(kind=DPOConfig, /, **overrides) -> str:
    with pytest.raises(UserError) as caught:
        parse(kind, **overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Options that can never act next to others: (option, value, what leaves it idle). With its default all is accepted.
NEVER_ACTS = [
    ("lora.alpha", 8.0, {}),
    ("lora.targets", ("q_proj",), {}),
    ("lora.rslora", True, {}),
    ("lora.init", "zero_a", {}),
    ("lora.init", "zero_a", {"lora.rank": 4, "lora.path": "x"}),
    ("lora.path", "x", {}),
    ("data.truncation", "keep_end", {"data.invalid_rows.too_long": "drop"}),
    ("data.train.0.weight", 2.0, {}),
    ("data.eval.x.weight", 2.0, {"data.eval.x.path": "y"}),
    ("optimizer.decay_steps", 5, {}),
    ("optimizer.final_fraction", 0.1, {"optimizer.schedule": "constant"}),
    ("optimizer.b1", 0.9, {"optimizer.name": "rmsprop"}),
    ("optimizer.b2", 0.9, {"optimizer.name": "adafactor"}),
    ("optimizer.eps", 1e-8, {"optimizer.name": "lion"}),
    ("optimizer.decay_mask", "all", {}),
    ("optimizer.decay_mask", "all", {"optimizer.weight_decay": 0.1, "lora.rank": 4}),
    ("optimizer.moment_dtype", "bfloat16", {"optimizer.name": "rmsprop"}),
    ("run.seed", 7, {"data.shuffle": False}),
    ("run.seed", 7, {"data.shuffle": False, "lora.rank": 4, "lora.path": "x"}),
    ("run.seed", 7, {"data.shuffle": False, "run.samples": 4, "sampling.temperature": 0.0}),
    ("sampling.max_tokens", 8, {}),
    ("sampling.temperature", 0.0, {}),
    ("sampling.top_k", 8, {}),
    ("sampling.top_p", 0.5, {}),
    ("sampling.top_p", 0.5, {"run.samples": 4, "sampling.temperature": 0.0}),
    ("eval.reward.revision", "x", {}),
    ("eval.reward.checkpoint", "best", {}),
    ("checkpoint.best_metric", "eval_x_loss", {}),
    ("checkpoint.best_mode", "min", {}),
    ("reference.path", "x", {"loss.type": "simpo"}),
    ("reference.dtype", "bfloat16", {"reference.mode": "cached"}),
    ("reference.sync_every", 5, {"reference.mode": "cached"}),
    ("reference.sync_mix", 0.5, {}),
    ("loss.weights", (1.0,), {}),
    ("loss.label_smoothing", 0.1, {"loss.type": "hinge"}),
    ("loss.center", 0.1, {"loss.type": "hinge"}),
    ("loss.f_divergence", "js", {"loss.type": "ipo"}),
    ("loss.f_alpha", 0.7, {}),
    ("loss.ld_alpha", 0.5, {"loss.type": "ipo"}),
    ("loss.weighting", "wpo", {"loss.type": "aot"}),
    ("loss.weighting", "wpo", {"data.online.reward": "r"}),
    ("data.append_eos", False, {"data.online.reward": "r"}),
    ("loss.wpo_gradient", True, {}),
    ("loss.reference_free", True, {"loss.type": "simpo"}),
    ("loss.ipo_average", False, {}),
    ("loss.discopop_tau", 0.1, {}),
    ("loss.dpop_lambda", 1.0, {}),
    ("loss.simpo_gamma", 1.0, {}),
    ("loss.cpo_weight", 2.0, {}),
]
# What is left: each acts, is a bound or a rule that holds, or is refused where the thing it speaks of is opened.
ACTS = {
    "model.router_aux_loss_coef",
    "model.path", "model.revision", "model.checkpoint", "model.tokenizer", "model.dtype", "model.param_dtype",
    "model.attention", "model.remat", "model.scan", "lora.rank", "data.train", "data.eval", "data.eval_fraction",
    "data.max_length", "data.shuffle", "data.invalid_rows.missing_field", "data.invalid_rows.empty_answer",
    "data.invalid_rows.empty_prompt", "data.invalid_rows.equal_answers", "data.invalid_rows.message_not_rendered",
    "data.invalid_rows.prompts_differ", "data.invalid_rows.template_not_prefix", "data.invalid_rows.template_refused",
    "data.invalid_rows.too_long", "data.online.reward.path", "data.online.reward.revision",
    "data.online.reward.checkpoint", "data.online.reward.function", "data.online.answers", "data.online.labels",
    "data.online.missing_eos_penalty",
    "data.store", "data.workers", "optimizer.name", "optimizer.learning_rate", "optimizer.schedule",
    "optimizer.weight_decay", "optimizer.max_grad_norm", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor",
    "run.dir", "run.steps", "run.epochs", "run.token_stats", "run.export", "run.report", "run.trackers", "run.progress",
    "run.profile_steps", "checkpoint.keep", "checkpoint.keep_best", "reference.mode", "loss.type", "loss.types",
    "loss.beta", "batch.row_length", "batch.max_shapes", "batch.accumulation", "batch.target_chunk", "batch.pairs",
    "batch.layout",
}  # fmt: skip


@pytest.mark.parametrize(("option", "value", "beside"), NEVER_ACTS, ids=[case[0] for case in NEVER_ACTS])
def test_what_can_never_act_is_refused_but_for_its_default(option, value, beside):
    assert option in refused(**beside, **{option: value})
    config = parse(**beside)
    assert parse_config(yaml.safe_load(config_to_yaml(config)), {}, DPOConfig) == config


def test_every_option_is_known_to_act_or_when_it_is_idle():
    names = set(field_names(DPOConfig))
    leaves = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    refuse = {option for option, _, _ in NEVER_ACTS if ".x." not in option and ".0." not in option}
    note = {option for option, _, _ in IDLE}
    assert leaves == refuse | note | ACTS
    assert not ACTS & (refuse | note)


def test_fine_tuning_has_no_second_answer():
    for cause in ("equal_answers", "prompts_differ"):
        assert f"data.invalid_rows.{cause}: 'error' cannot be used" in refused(
            SFTConfig, **{f"data.invalid_rows.{cause}": "error"}
        )
    config = parse(SFTConfig)
    assert parse_config(yaml.safe_load(config_to_yaml(config)), {}, SFTConfig) == config


FACTS = Facts(steps=10, eval_sets=1, examples=8, messages=4, dated=True, platform="tpu", flags=frozenset({"xla_a"}))
# (option, an idle value, one that acts, what makes it idle besides)
IDLE_VALUES = [
    ("optimizer.warmup_steps", 10, 9, {}),
    ("reference.sync_every", 11, 10, {}),
    ("checkpoint.every", 11, 10, {}),
    ("run.log_every", 11, 10, {}),
    ("run.eval_every", 11, 10, {}),
    ("run.eval_every", 1, 0, {"eval_sets": 0}),
    ("run.samples", 1, 0, {"eval_sets": 0}),
    ("eval.reward.path", "r", None, {"eval_sets": 0}),
    ("data.chat_template", "t.jinja", None, {"messages": 0}),
    ("data.template_date", "2025-01-01", "2024-07-26", {"dated": False}),
    ("data.append_eos", False, True, {"messages": 8}),
    ("model.matmul_precision", "highest", "default", {"platform": "cpu"}),
    ("run.compiler_flags", {"xla_b": ""}, {"xla_a": "", "xla_b": "1"}, {}),
]


def test_what_is_idle_in_this_run_is_noted():
    assert [option for option, *_ in IDLE_VALUES] == [option for option, _, _ in IDLE]
    for option, idle, acts, facts in IDLE_VALUES:
        config, here = parse(**{option: idle}), FACTS._replace(**facts)
        (line,) = idle_options(config, here)
        assert line.startswith(f"{option} is {idle!r}: ")
        assert idle_options(parse(**{option: acts}), here) == []
        if facts:
            assert idle_options(config, FACTS) == []
        assert parse_config(yaml.safe_load(config_to_yaml(config)), {}, DPOConfig) == config
    assert idle_options(parse(SFTConfig, optimizer__warmup_steps=12), FACTS) == [
        "optimizer.warmup_steps is 12: the run has 10 steps, so the learning rate never reaches its peak"
    ]


def accepts(kind, option) -> bool:
    return any(f"{name}.".startswith(f"{option}.") for name in field_names(kind))


def test_names_of_other_trainers_lead_to_options():
    for name, option in OPTION_ALIASES.items():
        kind = next(kind for kind in (DPOConfig, PPOConfig, RewardConfig) if accepts(kind, option))
        assert f"{name}: unknown option: did you mean {option}?" in refused(kind, **{name: 1})


def test_options_that_would_train_something_else_are_refused_with_the_reason():
    for name, why in NOT_OFFERED.items():
        assert refused(PPOConfig, **{name.replace(".", "__"): 1}) == f"{name}: unknown option: {why}; remove it"


# (overrides, what the line must hold): each another path through the code
BAD = [
    ({"batch__pairs": "8"}, "batch.pairs must be an integer, got '8': remove the quotes"),
    ({"batch__pairs": 8.0}, "batch.pairs must be an integer, got 8.0"),
    ({"batch__pairs": True}, "batch.pairs must be an integer, got True"),
    ({"loss__beta": "5e-7"}, "loss.beta must be a number, got '5e-7': remove the quotes"),
    ({"loss__beta": False}, "loss.beta must be a number, got False"),
    ({"optimizer__learning_rate": float("inf")}, "optimizer.learning_rate must be a number, got inf"),
    ({"run__epochs": float("nan")}, "run.epochs must be a number or null, got nan"),
    ({"run__export": "yes"}, "run.export must be true or false, got 'yes'"),
    ({"run__export": 1}, "run.export must be true or false, got 1"),
    ({"model__path": 3}, "model.path must be a string, got 3: put it in quotes"),
    ({"model__path": None}, "model.path must be a string, got None"),
    ({"loss__type": "sigmod"}, "did you mean sigmoid?"),
    ({"loss__type": "DPO"}, "did you mean sigmoid?"),
    ({"loss__type": "rpo"}, "did you mean [sigmoid, sft] as loss.types?"),
    ({"loss__type": "kto"}, "simpo, orpo, cpo, sft or null, got 'kto'"),
    (
        {"loss__type": ["sigmoid", "sft"]},
        "loss.type: ['sigmoid', 'sft'] cannot be used: to give several values, set loss.types",
    ),
    ({"loss__types": "sigmoid, sft"}, "loss.types: 'sigmoid, sft' cannot be used: write a list as [sigmoid, sft]"),
    ({"loss__type": "\ud800"}, "sft or null, got '\\ud800'"),
    ({"run__steps": 1e3}, "run.steps must be an integer or null, got 1000.0: write 1000"),
    ({"run__steps": 2**63}, "run.steps must be an integer or null, got 9223372036854775808: it is out of range"),
    ({"loss__beta": 10**400}, "loss.beta must be a number, got a number of 1329 bits: it is out of"),
    ({"optimizer__max_grad_norm": "none"}, "must be a number or null, got 'none': did you mean null?"),
    ({"model__tokenizer": ""}, "model.tokenizer: '' cannot be used: the string is empty"),
    ({"run__dir": "a\0"}, "run.dir must be a string, got 'a\\x00': write UTF-8 without NUL characters"),
    ({"output_dir": "x"}, "output_dir: unknown option: did you mean run.dir?"),
    ({"data__test": "x"}, "data.test: unknown option: did you mean data.eval?"),
    ({"model__model": "x"}, "model.model: unknown option: choose from path, revision"),
    ({"batch__row_length": "automatic"}, "batch.row_length must be auto or an integer, got 'automatic'"),
    ({"data__fates": {"too_long": "drop"}}, "data.fates: unknown option: did you mean data.invalid_rows?"),
    ({"batch__pair": 8}, "batch.pair: unknown option: did you mean batch.pairs?"),
    ({"los": {"beta": 1}}, "los: unknown option: did you mean loss?"),
    ({"beta": 0.1}, "beta: unknown option: did you mean loss.beta?"),
    ({"run__learning_rate": 0.1}, "run.learning_rate: unknown option: did you mean optimizer.learning_rate?"),
    ({"mesh__zzz": 1}, "mesh.zzz: unknown option: choose from data, fsdp, expert, tensor"),
    ({"batch__examples": 8}, "batch.examples: belongs to `dpo-jax sft`, not to `dpo-jax train`: remove it"),
    ({"loss": 3}, "loss: 3 cannot be used: it is a section"),
    ({"loss": None}, "loss: None cannot be used: it is a section"),
    ({"data__eval": "held.jsonl"}, "data.eval: 'held.jsonl' cannot be used: give names with their values"),
    ({"data__eval": {1: "x"}}, "data.eval: a name must be a string, got 1"),
    ({"data__train__columns": "prompt=question"}, "give names with their values, such as {prompt: question}"),
    ({"data__train": []}, "data.train: () cannot be used: give at least one data set"),
    (
        {"data__train": [{"path": "a", "limt": 1}]},
        "data.train.0.limt: unknown option: did you mean data.train.0.limit?",
    ),
    ({"data__train": [{"path": "a", "limit": 0}]}, "data.train.0.limit must be null or positive, got 0"),
    (
        {"data__train": ["a", {"split": "x"}]},
        "data.train.1.path is required: set it in the config or with --data.train.1.path",
    ),
    ({"data__eval": {"x": {"path": 1}}}, "data.eval.x.path must be a string, got 1"),
    ({"run__trackers": ["wandb", "wandbb"]}, "run.trackers.1 must be tensorboard or wandb, got 'wandbb'"),
    ({"model__path__x": 1}, "model.path.x: model.path is 'm', which has no options: set model.path itself"),
    ({"data__store__x": 1}, "data.store.x: data.store is None, which has no options: set data.store itself"),
    ({".".join("a" * 5000): 1}, "a: unknown option"),
    ({"data__train__" + "9" * 5000: 1}, "9999': it has 1, counted from 0"),
    (
        {"data__train": ["a"], "data__train__1__path": "b"},
        "data.train.1.path: data.train has no entry '1': it has 1, counted from 0",
    ),
    ({"batch__pairs": 3, "batch__accumulation": 2}, "batch.accumulation: 2 cannot be used: it must divide batch.pairs"),
    ({"run__steps": 1, "run__epochs": 1}, "run.steps: 1 cannot be used: run.epochs 1.0 is given too"),
    ({"reference__mode": "cached", "reference__dtype": "bfloat16"}, "reference.dtype: 'bfloat16' cannot be used"),
    ({"reference__mode": "none"}, "reference.mode: 'none' cannot be used: loss sigmoid needs a reference"),
    ({"reference__sync_every": 5, "reference__mode": "cached"}, "reference.sync_every: 5 cannot be used"),
    ({"lora__rank": -1}, "lora.rank must be at least 0, got -1"),
    ({"lora__rank": 4, "lora__alpha": 0.0}, "lora.alpha must be positive, got 0.0"),
    ({"lora__rank": 4, "lora__targets": []}, "lora.targets: () cannot be used"),
    ({"lora__alpha": 8.0}, "lora.alpha: 8.0 cannot be used: lora.rank is 0"),
    ({"lora__targets": ["q_proj"]}, "lora.targets: ('q_proj',) cannot be used: lora.rank is 0"),
    ({"lora__rslora": True}, "lora.rslora: True cannot be used: lora.rank is 0"),
    ({"lora__init": "zero_a"}, "lora.init: 'zero_a' cannot be used: lora.rank is 0"),
    ({"lora__path": "x"}, "lora.path: 'x' cannot be used: lora.rank is 0"),
    ({"lora__rank": 4, "lora__path": "x", "lora__init": "gaussian"}, "lora.init: 'gaussian' cannot be used"),
    ({"lora__rank": 4, "reference__path": "x"}, "reference.path: 'x' cannot be used: with lora.rank the reference is"),
    ({"lora__rank": 4, "reference__dtype": "bfloat16"}, "reference.dtype: 'bfloat16' cannot be used: with lora.rank"),
    ({"lora__rank": 4, "reference__sync_every": 5}, "reference.sync_every: 5 cannot be used: with lora.rank"),
    ({"lora__rank": 4, "reference__mode": "live", "loss__type": "simpo"}, "reference.mode: 'live' cannot be used"),
    ({"reference__sync_mix": 0.5}, "reference.sync_mix: 0.5 cannot be used: reference.sync_every is 0"),
    (
        {"reference__sync_every": 5, "reference__sync_mix": 0.0},
        "reference.sync_mix must be positive and at most 1, got 0.0",
    ),
    ({"loss__type": "simpo", "reference__path": "x"}, "reference.path: 'x' cannot be used: reference.mode is none"),
    ({"loss__reference_free": True, "reference__mode": "live"}, "reference.mode: 'live' cannot be used"),
    ({"loss__type": "simpo", "loss__reference_free": True}, "loss.reference_free: True cannot be used: simpo uses no"),
    ({"loss__type": "dpop", "loss__reference_free": True}, "loss.reference_free: True cannot be used: dpop compares"),
    ({"loss__type": "hinge", "loss__types": ["ipo"]}, "loss.types: ('ipo',) cannot be used: loss.type hinge is given"),
    ({"loss__types": ["ipo", "ipo"]}, "loss.types: ('ipo', 'ipo') cannot be used: name each loss once"),
    ({"loss__types": ["ipo"], "loss__weights": [1, 2]}, "loss.weights: (1.0, 2.0) cannot be used: give one for each"),
    ({"loss__weights": [1.0]}, "loss.weights: (1.0,) cannot be used: give one for each loss in loss.types (0)"),
    ({"loss__types": ["ipo"], "loss__weights": [0]}, "loss.weights.0 must be positive, got 0.0"),
    ({"loss__type": "exo_pair"}, "loss.label_smoothing: 0.0 cannot be used: exo_pair is infinite at 0"),
    (
        {"loss__type": "hinge", "loss__label_smoothing": 0.1},
        "loss.label_smoothing: 0.1 cannot be used: it is not an option of hinge",
    ),
    ({"loss__discopop_tau": 0.1}, "loss.discopop_tau: 0.1 cannot be used: it is not an option of sigmoid"),
    ({"loss__ipo_average": False}, "loss.ipo_average: False cannot be used: it is not an option of sigmoid"),
    ({"loss__simpo_gamma": 1.0}, "loss.simpo_gamma: 1.0 cannot be used: it is not an option of sigmoid"),
    ({"loss__type": "ipo", "loss__f_divergence": "js"}, "loss.f_divergence: 'js' cannot be used: it is defined for"),
    ({"loss__f_alpha": 0.7}, "loss.f_alpha: 0.7 cannot be used: loss.f_divergence reverse_kl has no coefficient"),
    (
        {"loss__type": "ipo", "loss__ld_alpha": 0.5},
        "loss.ld_alpha: 0.5 cannot be used: ipo already divides by the lengths",
    ),
    ({"loss__ld_alpha": 1.5}, "loss.ld_alpha must be null or at least 0 and at most 1, got 1.5"),
    (
        {"loss__type": "aot", "loss__weighting": "wpo"},
        "loss.weighting: 'wpo' cannot be used: aot couples a step",
    ),
    ({"loss__type": "dpop", "loss__dpop_lambda": -1.0}, "loss.dpop_lambda must be at least 0, got -1.0"),
    ({"loss__wpo_gradient": True}, "loss.wpo_gradient: True cannot be used: loss.weighting is none, so"),
]


def test_the_reference_is_there_where_the_loss_needs_one():
    assert parse().reference_mode == "live"
    for name in ("simpo", "orpo", "cpo", "sft"):
        assert parse(loss__type=name).reference_mode == "none"
        assert parse(loss__type=name, reference__mode="cached").reference_mode == "cached"  # for the metrics
    assert parse(loss__reference_free=True).reference_mode == "none"
    assert parse(loss__types=["simpo", "sigmoid"]).reference_mode == "live"


def test_the_loss_is_settled_in_the_config_that_is_kept():
    assert parse().loss.type == "sigmoid"
    several = parse(loss__types=["sigmoid", "sft"])
    assert several.loss.type is None
    for config in (parse(), several):
        assert parse_config(yaml.safe_load(config_to_yaml(config)), {}, DPOConfig) == config


def test_lists_given_in_python_are_what_a_file_gives():
    given = LossConfig(types=["sigmoid", "sft"], weights=[1.0, 0.5])
    assert given == LossConfig(types=("sigmoid", "sft"), weights=(1.0, 0.5))
    assert hash(given)
    with pytest.raises(UserError, match=r"loss\.weights\.1 must be positive"):
        LossConfig(types=["sigmoid", "sft"], weights=[1.0, -0.5])


# (bounds, words, numbers inside, numbers outside)
RANGES = [
    ({"above": 0}, "positive", [1, 1e-9], [0, -1]),
    ({"at_least": 0}, "at least 0", [0, 1], [-1, -1e-9]),
    ({"above": 0, "at_most": 1}, "positive and at most 1", [0.1, 1], [0, 1.1]),
    ({"at_least": 0, "below": 0.5}, "at least 0 and below 0.5", [0, 0.4], [-0.1, 0.5]),
    ({"at_least": 64, "multiple_of": 64}, "at least 64 and a multiple of 64", [64, 192], [0, 65, -64]),
    ({"above": 0, "special": -1}, "-1 or positive", [-1, 1], [-2, 0]),
]


@pytest.mark.parametrize(("bounds", "words", "inside", "outside"), RANGES, ids=[words for _, words, _, _ in RANGES])
def test_a_range_is_checked_as_it_is_written(bounds, words, inside, outside):
    allowed = Range(**bounds)
    assert str(allowed) == words
    assert [number in allowed for number in (*inside, *outside)] == [True] * len(inside) + [False] * len(outside)


def test_the_page_gives_the_range_that_is_checked():
    values = {field.name: field.values for kind in (DPOConfig, SFTConfig) for part in help_sections(kind)
              for field in part.fields}  # fmt: skip
    ranges = {name: text.partition("; ")[2] for name, text in values.items() if ";" in text}
    positive = {"data.train.0.limit", "data.train.0.weight", "data.workers", "lora.alpha", "loss.beta", "loss.weights",
                "optimizer.learning_rate", "optimizer.decay_steps", "optimizer.max_grad_norm", "batch.pairs",
                "batch.examples", "batch.max_shapes", "batch.accumulation", "batch.target_chunk", "run.steps",
                "run.epochs", "run.log_every", "run.profile_steps", "checkpoint.keep",
                "sampling.max_tokens"}  # fmt: skip
    from_0 = {"lora.rank", "loss.dpop_lambda", "loss.simpo_gamma", "loss.cpo_weight", "loss.center",
              "optimizer.warmup_steps", "optimizer.weight_decay", "reference.sync_every", "run.eval_every",
              "run.seed", "run.samples", "checkpoint.every",
              "checkpoint.keep_best", "sampling.temperature", "sampling.top_k",
              "data.online.missing_eos_penalty", "model.router_aux_loss_coef"}  # fmt: skip
    assert ranges == {
        **dict.fromkeys(positive, "positive"),
        **dict.fromkeys(from_0, "at least 0"),
        **dict.fromkeys(["mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor"], "-1 or positive"),
        **dict.fromkeys(["optimizer.b1", "optimizer.b2", "optimizer.eps"], "at least 0 and below 1"),
        "data.eval_fraction": "at least 0 and below 1",
        "data.max_length": "at least 2",
        "data.online.answers": "at least 2",
        "batch.row_length": "at least 64 and a multiple of 64",
        "optimizer.final_fraction": "at least 0 and at most 1",
        "reference.sync_mix": "positive and at most 1",
        "sampling.top_p": "positive and at most 1",
        "loss.label_smoothing": "at least 0 and below 0.5",
        "loss.ld_alpha": "at least 0 and at most 1",
        "loss.discopop_tau": "positive and below 1",
    }
    assert refused(batch__pairs=0) == "batch.pairs must be positive, got 0"
    assert refused(optimizer__b1=1.0) == "optimizer.b1 must be null or at least 0 and below 1, got 1.0"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sections_made_in_python_hold_finite_numbers(value):
    with pytest.raises(UserError, match=r"^run.seed must be a 64-bit integer, got 9223372036854775808$"):
        RunConfig(dir="x", seed=2**63)
    for name in ("beta", "f_alpha", "weights"):
        with pytest.raises(UserError, match=rf"^loss\.{name}\S* must be finite, got {value}$"):
            LossConfig(types=("ipo",), **{name: (value,) if name == "weights" else value})


@pytest.mark.parametrize(("overrides", "line"), BAD, ids=[line[:40] for _, line in BAD])
def test_what_is_wrong_is_one_line(overrides, line):
    assert line in refused(**overrides)


def test_missing_fields_are_named():
    for name in ("model.path", "data.train", "run.dir"):
        section = name.split(".")[0]
        with pytest.raises(UserError, match=f"^{re.escape(name)} is required: set it in the config or with --{name}$"):
            parse_config({key: value for key, value in LEAST.items() if key != section}, {}, DPOConfig)


def test_sft_refuses_what_is_of_dpo():
    for name in ("loss__beta", "reference__mode", "batch__pairs", "batch__layout"):
        assert "belongs to `dpo-jax train`, not to `dpo-jax sft`: remove it" in refused(SFTConfig, **{name: 1})
    assert parse(SFTConfig, batch__examples=3).batch.examples == 3


def test_types_come_out_as_written():
    config = parse(loss__beta=1, run__epochs=2, optimizer__max_grad_norm=None)
    assert type(config.loss.beta) is float
    assert type(config.run.epochs) is float
    assert config.optimizer.max_grad_norm is None
    assert parse(batch__row_length=128).batch.row_length == 128
    assert parse(run__trackers=["wandb", "tensorboard"]).run.trackers == ("wandb", "tensorboard")


def test_text_of_the_command_line_is_read_by_the_type_of_its_field():
    assert typed(loss__beta="5e-7").loss.beta == 5e-7
    assert typed(mesh__fsdp="-1").mesh.fsdp == -1
    assert typed(run__export="true").run.export is True
    assert typed(run__dir="2024").run.dir == "2024"
    assert typed(run__dir="a: #1 'b'").run.dir == "a: #1 'b'"
    assert typed(run__dir="null").run.dir == "null"
    assert typed(model__revision="null").model.revision is None
    assert typed(model__revision="1e5").model.revision == "1e5"
    assert typed(data__train="[{path: a, limit: 3}, b]").data.train == (
        SourceConfig(path="a", limit=3),
        SourceConfig(path="b"),
    )
    for name, text, line in [
        ("batch__pairs", '"8"', "remove the quotes"),
        ("batch__pairs", "8.0", "batch.pairs must be an integer, got 8.0"),
        ("batch__pairs", "[", "batch.pairs: line 1, column 2: invalid YAML"),
        ("batch", "{pairs: 8}", "it is a section; set its options by name"),
    ]:
        with pytest.raises(UserError, match=re.escape(line)):
            typed(**{name: text})


def test_sets_may_be_written_short():
    whole = parse_config(
        {**LEAST, "data": {"train": [{"path": "pairs.jsonl"}], "eval": {"x": {"path": "y"}}}}, {}, DPOConfig
    )
    assert parse(data__train="pairs.jsonl", data__eval={"x": "y"}) == whole
    assert parse(data__train={"path": "pairs.jsonl"}, data__eval__x="y") == whole
    assert parse(data__train=["pairs.jsonl"], data__eval__x__path="y") == whole
    longer = parse(
        data__train=["a", {"path": "b"}], data__train__1__limit=5, data__train__1__columns__prompt="question"
    )
    assert longer.data.train[1] == SourceConfig(path="b", limit=5, columns={"prompt": "question"})


@pytest.mark.parametrize("written", ["a", {"path": "a"}, ["a"], [{"path": "a"}]], ids=repr)
def test_an_only_set_is_named_with_or_without_its_index(written):
    for source in (written, CommandLineText(json.dumps(written) if not isinstance(written, str) else written)):
        expected = SourceConfig(path="a", split="test", columns={"prompt": "question"})
        for train in ("data.train", "data.train.0"):
            overrides = {"data.train": source, f"{train}.split": "test", f"{train}.columns.prompt": "question"}
            assert parse_config(LEAST, overrides, DPOConfig).data.train == (expected,)
            without = {name: section for name, section in LEAST.items() if name != "data"}
            given = {**overrides, f"{train}.path": "a"}
            del given["data.train"]
            assert parse_config(without, given, DPOConfig).data.train == (expected,)


def test_of_several_sets_the_flag_says_which():
    line = "data.train.split: data.train has 3 data sets: choose one, data.train.0.split to data.train.2.split"
    assert refused(data__train=["a", {"path": "b"}, "c"], data__train__split="x") == line
    train = parse(data__train=["a", {"path": "b"}], data__train__0__split="x", data__train__1__limit=2).data.train
    assert train == (SourceConfig(path="a", split="x"), SourceConfig(path="b", limit=2))
    assert parse(data__eval={"x": "a"}, data__eval__x__split="t").data.eval == {"x": SourceConfig(path="a", split="t")}


def test_overrides_leave_the_source_as_it_was():
    source = {**LEAST, "data": {"train": [{"path": "a"}]}}
    parse_config(source, {"data.train.0.path": "b", "loss.beta": 1.0}, DPOConfig)
    assert source == {**LEAST, "data": {"train": [{"path": "a"}]}}


@pytest.mark.parametrize("kind", [DPOConfig, SFTConfig])
def test_yaml_out_and_in_again_is_equal(kind, tmp_path):
    strange = [
        " ",
        "5e-7",
        "yes",
        "012",
        "null",
        "true",
        "1:30",
        "2024-01-01",
        "~",
        "",
        " a",
        "ü\n",
        "#",
        "1_000",
        ".5",
        "0x1",
    ]
    config = parse(
        kind,
        data__train=[{"path": text or "x", "columns": {text: text}} for text in strange],
        data__eval={text: text or "x" for text in strange},
        optimizer__learning_rate=5e-7,
        run__epochs=1e22,
        run__trackers=["wandb"],
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    assert parse_config(file, {}, kind) == config
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == load_yaml(file)  # other programs read the same


def test_every_default_is_spelled_out(tmp_path):
    tree = yaml.safe_load(config_to_yaml(parse(data__online__reward="r")))
    for name in field_names(DPOConfig):
        node = tree
        for part in name.split("."):
            assert part in node, f"{name} is not in the resolved config"
            node = node[part]


def load(tmp_path, text: str):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("latin-1"))
    return load_yaml(file)


def test_yaml_is_read_by_version_1_2(tmp_path):
    read = load(tmp_path, "a: [5e-7, 1e6, .5, 12, -3, 012, yes, on, 1:30, 1_000, true, null, ~, 2024-01-01, 0x1]\nb:\n")
    words = [5e-7, 1e6, 0.5, 12, -3, "012", "yes", "on", "1:30", "1_000", True, None, None, "2024-01-01", "0x1"]
    assert read == {"a": words, "b": None}
    assert [type(value) for value in read["a"][:4]] == [float, float, float, int]


def test_a_byte_order_mark_is_no_part_of_the_yaml(tmp_path):
    assert load(tmp_path, "\ufeffa: 1\n".encode().decode("latin-1")) == {"a": 1}


ENDLESS: list = []
ENDLESS.append(ENDLESS)
BOMB = "x"
for _ in range(40):
    BOMB = [BOMB] * 10


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (None, "the config: None cannot be used: give the path of a YAML file, or a mapping of sections"),
        ([], "the config: [] cannot be used"),
        (b"c.yaml", "the config: b'c.yaml' cannot be used"),
        ({1: 2}, "1: unknown option"),
        ({**LEAST, "data": {"train": ENDLESS}}, "data.train.0: [[[...]]] cannot be used: it is a section"),
        ({**LEAST, "data": {"train": BOMB}}, "data.train.0: [[[...], [...], "),
        ({**LEAST, "run": {"dir": {"r"}}}, "run.dir must be a string, got {'r'}"),
        ("nul\0.yaml", "the config file cannot be read: embedded null byte: check the path"),
        ("x" * 5000, "the config file cannot be read: File name too long: check the path"),
    ],
    ids=range(9),
)
def test_sources_that_are_no_config(source, line):
    with pytest.raises(UserError) as caught:
        parse_config(source, {}, DPOConfig)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: !!timestamp x\n", "c.yaml: invalid YAML: AttributeError: "),
        ("a: !!int x\n", "c.yaml: invalid YAML: invalid literal for int()"),
        ("a: !!bool x\n", "c.yaml: invalid YAML: KeyError: 'x'"),
        (f"a: {'9' * 5000}\n", "c.yaml: invalid YAML: Exceeds the limit (4300 digits)"),
        ("a: " + "[" * 3000, "c.yaml: invalid YAML: RecursionError: "),
        ("a: *b\n", "c.yaml: line 1, column 4: invalid YAML: found undefined alias 'b'"),
        ("&a {*a : 1}\n", "c.yaml: line 1, column 1: invalid YAML: the key {} is not a string"),
        ("a: 1\nb: [\n", "c.yaml: line 3, column 1: invalid YAML: "),
        ("a: 1\nb: 2\na: 3\n", "c.yaml: line 3, column 1: invalid YAML: the key 'a' appears twice"),
        ("a: {1: x}\n", "c.yaml: line 1, column 5: invalid YAML: the key 1 is not a string"),
        ("a: !!python/name:os.system x\n", "c.yaml: line 1, column 4: invalid YAML: "),
        ("a: \x07\n", "c.yaml: invalid YAML: "),
        ("a: \xff\n", "c.yaml: byte 3 is not UTF-8"),
        ("", "c.yaml: must contain config sections, got nothing"),
        ("- a\n", "c.yaml: must contain config sections, got a list"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, line):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match=r"nope\.yaml: config file not found: check the path, relative to "):
        load_yaml(tmp_path / "nope.yaml")
    with pytest.raises(UserError, match=r"is a directory: give a config file, such as .*config\.yaml"):
        load_yaml(tmp_path)


@pytest.mark.parametrize("kind", [DPOConfig, SFTConfig, GenerateConfig, CompareConfig])
def test_every_field_and_section_says_what_it_is(kind):
    named = set()
    for section in help_sections(kind):
        assert section.meaning.endswith("."), section.name
        for field in section.fields:
            named.add(field.name)
            assert len(field.meaning) > 10, f"{field.name} has no text under it"
            assert "\n" not in field.meaning
    leaves = {
        name for name in field_names(kind) if not any(other.startswith(f"{name}.") for other in field_names(kind))
    }
    assert leaves == {name for name in named if not name.startswith(("data.train.", "methods."))}


def test_defaults_in_the_help_are_the_defaults():
    online = {"data.online.reward": "r"}  # opens a section that is not there by default
    config = parse(**online)
    for section in sections(DPOConfig):
        for field in section.fields:
            if field.default is None or field.name.startswith("data.online.reward."):
                continue
            value = config
            for part in field.name.split("."):
                value = getattr(value, part)
            overrides = online | {field.name: CommandLineText(field.default)}
            assert parse_config(LEAST, overrides, DPOConfig) == config, field.name
            texts = (str(value), json.dumps(value), yaml.safe_dump(value).split("\n")[0], "null", "[]")
            assert field.default in texts, field.name


def test_the_page_of_options_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference_page(), "write it again: python -m dpo_jax.config.docs > docs/configuration.md"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_right(path):
    named = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "generate": GenerateConfig}
    named |= {"compare": CompareConfig}
    kind = next((kind for name, kind in named.items() if name in path.stem.split("_")), DPOConfig)
    assert dataclasses.is_dataclass(parse_config(path, {}, kind))
