"""Configs: strict types, names, round trips, and one clear line for whatever is wrong."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from dpo_jax.config import DPOConfig, SFTConfig, SourceConfig
from dpo_jax.configdocs import help_sections, reference_page, sections
from dpo_jax.configfile import CommandLineText, config_to_yaml, field_names, load_yaml, parse_config
from dpo_jax.errors import UserError

ROOT = Path(__file__).parents[1]
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


# (overrides, what the line must hold): each another path through the code
BAD = [
    ({"batch__pairs": "8"}, "batch.pairs: '8' cannot be used: a whole number is needed; take away the quotes"),
    ({"batch__pairs": 8.0}, "batch.pairs: 8.0 cannot be used: a whole number is needed"),
    ({"batch__pairs": True}, "batch.pairs: True cannot be used: a whole number is needed"),
    ({"loss__beta": "5e-7"}, "loss.beta: '5e-7' cannot be used: a number is needed; take away the quotes"),
    ({"loss__beta": False}, "loss.beta: False cannot be used: a number is needed"),
    ({"optimizer__learning_rate": float("inf")}, "optimizer.learning_rate: inf cannot be used: a number is needed"),
    ({"run__epochs": float("nan")}, "run.epochs: nan cannot be used: a number or null is needed"),
    ({"run__export": "yes"}, "run.export: 'yes' cannot be used: true or false is needed"),
    ({"run__export": 1}, "run.export: 1 cannot be used: true or false is needed"),
    ({"model__path": 3}, "model.path: 3 cannot be used: text is needed; put it in quotes"),
    ({"model__path": None}, "model.path: None cannot be used: text is needed"),
    ({"loss__type": "sigmod"}, "did you mean sigmoid?"),
    ({"loss__type": "dpo"}, "did you mean sigmoid?"),
    ({"batch__row_length": "automatic"}, "batch.row_length: 'automatic' cannot be used: auto or a whole number"),
    ({"batch__pair": 8}, "batch.pair: unknown option: did you mean batch.pairs?"),
    ({"los": {"beta": 1}}, "los: unknown option: did you mean loss?"),
    ({"beta": 0.1}, "beta: unknown option: did you mean loss.beta?"),
    ({"run__learning_rate": 0.1}, "run.learning_rate: unknown option: did you mean optimizer.learning_rate?"),
    ({"mesh__zzz": 1}, "mesh.zzz: unknown option: choose from data, fsdp, tensor"),
    ({"batch__examples": 8}, "batch.examples: this belongs to `dpo-jax sft`, not to `dpo-jax train`: remove it"),
    ({"loss": 3}, "loss: 3 cannot be used: this is a section"),
    ({"loss": None}, "loss: None cannot be used: this is a section"),
    ({"data__eval": "held.jsonl"}, "data.eval: 'held.jsonl' cannot be used: write names with their values"),
    ({"data__train": []}, "data.train: () cannot be used: name at least one set"),
    (
        {"data__train": [{"path": "a", "limt": 1}]},
        "data.train.0.limt: unknown option: did you mean data.train.0.limit?",
    ),
    ({"data__train": [{"path": "a", "limit": 0}]}, "data.train.0.limit: 0 cannot be used: a positive number is needed"),
    ({"data__train": ["a", {"split": "x"}]}, "data.train.1.path: missing"),
    ({"data__eval": {"x": {"path": 1}}}, "data.eval.x.path: 1 cannot be used: text is needed"),
    ({"run__trackers": ["wandb", "wandbb"]}, "run.trackers.1: 'wandbb' cannot be used: tensorboard or wandb is needed"),
    ({"model__path__x": 1}, "model.path.x: model.path is 'm', which has no parts"),
    ({"data__train": ["a"], "data__train__1__path": "b"}, "data.train has 1 entries, numbered from 0: '1' is none"),
    ({"batch__pairs": 3, "batch__accumulation": 2}, "batch.accumulation: 2 cannot be used: it must divide batch.pairs"),
    ({"run__steps": 1, "run__epochs": 1}, "run.steps: 1 cannot be used: run.epochs 1.0 is given too"),
    ({"reference__mode": "cached", "reference__dtype": "bfloat16"}, "reference.dtype: 'bfloat16' cannot be used"),
    ({"reference__mode": "none"}, "reference.mode: 'none' cannot be used: loss sigmoid compares with a reference"),
    ({"reference__sync_every": 5, "reference__mode": "cached"}, "reference.sync_every: 5 cannot be used"),
    ({"lora__rank": -1}, "lora.rank: -1 cannot be used: it cannot be negative"),
    ({"lora__rank": 4, "lora__alpha": 0.0}, "lora.alpha: 0.0 cannot be used: it must be positive"),
    ({"lora__rank": 4, "lora__targets": []}, "lora.targets: () cannot be used"),
    ({"lora__rank": 4, "lora__targets": ["q_proj", "w1"]}, "lora.targets: 'w1' cannot be used: it fits none of q_proj"),
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
    ({"reference__sync_every": 5, "reference__sync_mix": 0.0}, "reference.sync_mix: 0.0 cannot be used"),
    ({"loss__type": "simpo", "reference__path": "x"}, "reference.path: 'x' cannot be used: reference.mode is none"),
    ({"loss__reference_free": True, "reference__mode": "live"}, "reference.mode: 'live' cannot be used"),
    ({"loss__type": "simpo", "loss__reference_free": True}, "loss.reference_free: True cannot be used: simpo has no"),
    ({"loss__type": "dpop", "loss__reference_free": True}, "loss.reference_free: True cannot be used: dpop is a"),
    ({"loss__type": "hinge", "loss__types": ["ipo"]}, "loss.types: ('ipo',) cannot be used: loss.type hinge is given"),
    ({"loss__types": ["ipo", "ipo"]}, "loss.types: ('ipo', 'ipo') cannot be used: name each loss once"),
    ({"loss__types": ["ipo"], "loss__weights": [1, 2]}, "loss.weights: (1.0, 2.0) cannot be used: give one for each"),
    ({"loss__weights": [1.0]}, "loss.weights: (1.0,) cannot be used: give one for each of loss.types, 0"),
    ({"loss__types": ["ipo"], "loss__weights": [0]}, "loss.weights: (0.0,) cannot be used: positive numbers"),
    ({"loss__type": "exo_pair"}, "loss.label_smoothing: 0.0 cannot be used: exo_pair is infinite at 0"),
    ({"loss__type": "hinge", "loss__label_smoothing": 0.1}, "loss.label_smoothing: 0.1 cannot be used: hinge has no"),
    ({"loss__discopop_tau": 0.1}, "loss.discopop_tau: 0.1 cannot be used: sigmoid has no such option"),
    ({"loss__ipo_average": False}, "loss.ipo_average: False cannot be used: sigmoid has no such option"),
    ({"loss__simpo_gamma": 1.0}, "loss.simpo_gamma: 1.0 cannot be used: sigmoid has no such option"),
    ({"loss__type": "ipo", "loss__f_divergence": "js"}, "loss.f_divergence: 'js' cannot be used: it is defined for"),
    ({"loss__f_alpha": 0.7}, "loss.f_alpha: 0.7 cannot be used: f_divergence reverse_kl has no coefficient"),
    ({"loss__type": "ipo", "loss__ld_alpha": 0.5}, "loss.ld_alpha: 0.5 cannot be used: ipo divides by the lengths"),
    ({"loss__ld_alpha": 1.5}, "loss.ld_alpha: 1.5 cannot be used: it lies in [0, 1]"),
    (
        {"loss__type": "aot", "loss__weighting": "wpo"},
        "loss.weighting: 'wpo' cannot be used: aot has no loss of a pair",
    ),
    ({"loss__type": "dpop", "loss__dpop_lambda": -1.0}, "loss.dpop_lambda: -1.0 cannot be used"),
    ({"loss__wpo_gradient": True}, "loss.wpo_gradient: True cannot be used: weighting none has no weights"),
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


@pytest.mark.parametrize(("overrides", "line"), BAD, ids=[line[:40] for _, line in BAD])
def test_what_is_wrong_is_one_line(overrides, line):
    assert line in refused(**overrides)


def test_missing_fields_are_named():
    for name in ("model.path", "data.train", "run.dir"):
        section = name.split(".")[0]
        with pytest.raises(UserError, match=f"^{re.escape(name)}: missing: set it in the config or with --{name}$"):
            parse_config({key: value for key, value in LEAST.items() if key != section}, {}, DPOConfig)


def test_sft_refuses_what_is_of_dpo():
    for name in ("loss__beta", "reference__mode", "batch__pairs", "batch__layout"):
        assert "this belongs to `dpo-jax train`, not to `dpo-jax sft`: remove it" in refused(SFTConfig, **{name: 1})
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
        ("batch__pairs", '"8"', "take away the quotes"),
        ("batch__pairs", "8.0", "a whole number is needed"),
        ("batch__pairs", "[", "batch.pairs: line 1, column 2: this is not YAML"),
        ("batch", "{pairs: 8}", "this is a section; set its options by name"),
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


def test_overrides_leave_the_source_as_it_was():
    source = {**LEAST, "data": {"train": [{"path": "a"}]}}
    parse_config(source, {"data.train.0.path": "b", "loss.beta": 1.0}, DPOConfig)
    assert source == {**LEAST, "data": {"train": [{"path": "a"}]}}


@pytest.mark.parametrize("kind", [DPOConfig, SFTConfig])
def test_yaml_out_and_in_again_is_equal(kind, tmp_path):
    strange = [
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
        data__train=[{"path": text, "columns": {text: text}} for text in strange],
        data__eval={text: text for text in strange},
        optimizer__learning_rate=5e-7,
        run__epochs=1e22,
        run__trackers=["wandb"],
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    assert parse_config(file, {}, kind) == config
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == load_yaml(file)  # other programs read the same


def test_every_default_is_spelled_out(tmp_path):
    tree = yaml.safe_load(config_to_yaml(parse()))
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


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [\n", "c.yaml: line 3, column 1: this is not YAML: "),
        ("a: 1\nb: 2\na: 3\n", "c.yaml: line 3, column 1: this is not YAML: 'a' is given twice"),
        ("a: {1: x}\n", "c.yaml: line 1, column 5: this is not YAML: the name 1 is not text"),
        ("a: !!python/name:os.system x\n", "c.yaml: line 1, column 4: this is not YAML: "),
        ("a: \x07\n", "c.yaml: this is not YAML: "),
        ("a: \xff\n", "c.yaml: byte 3 is not UTF-8"),
        ("", "c.yaml: it holds nothing, not sections"),
        ("- a\n", "c.yaml: it holds a list, not sections"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, line):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match=r"nope\.yaml: there is no such config file: check the path, seen from "):
        load_yaml(tmp_path / "nope.yaml")
    with pytest.raises(UserError, match=r"this is a directory: give a config file, such as .*config\.yaml"):
        load_yaml(tmp_path)


@pytest.mark.parametrize("kind", [DPOConfig, SFTConfig])
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
    assert leaves == {name for name in named if not name.startswith("data.train.")}


def test_defaults_in_the_help_are_the_defaults():
    config = parse()
    for section in sections(DPOConfig):
        for field in section.fields:
            if field.default is None:
                continue
            value = config
            for part in field.name.split("."):
                value = getattr(value, part)
            assert parse_config(LEAST, {field.name: CommandLineText(field.default)}, DPOConfig) == config, field.name
            texts = (str(value), json.dumps(value), yaml.safe_dump(value).split("\n")[0], "null", "[]")
            assert field.default in texts, field.name


def test_the_page_of_options_is_current():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference_page(), "write it anew: python -m dpo_jax.configdocs > docs/configuration.md"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_right(path):
    kind = SFTConfig if "sft" in path.stem.split("_") else DPOConfig
    assert dataclasses.is_dataclass(parse_config(path, {}, kind))
