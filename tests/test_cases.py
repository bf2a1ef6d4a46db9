"""Small inputs out of public bug reports, each read as transformers and PEFT read it, or refused in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_jax.commands.evaluate import evaluate
from dpo_jax.config import DPOConfig
from dpo_jax.config.file import parse_config
from dpo_jax.errors import UserError
from dpo_jax.methods.setup import sets_of
from dpo_jax.runs.directory import RunDir
from dpo_jax.weights.open import find_model, find_tokenizer, keep_model_files


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def calls(name, arguments):
    return says("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["city"],
        },
    },
}
DISCOUNT = {  # ShareGPT files give the function alone
    "type": "function",
    "function": {
        "name": "calculate_discount",
        "description": "x",
        "parameters": {"type": "object", "properties": {"price": {"type": "number"}}},
    },
}
PARIS = [
    user("Weather in Paris?"),
    calls("get_weather", {"city": "Paris"}),
    {"role": "tool", "name": "get_weather", "content": '{"temp": 21}'},
]
DRESS = [
    user("Price of a 200 dollar dress with 20 percent off?"),
    calls("calculate_discount", {"price": 200, "percent": 20}),
    {"role": "tool", "content": '{"price": 160}'},
]
KNOWN, UNKNOWN = says("It is 21 degrees in Paris."), says("I can not know that.")

# The first row as the messages and tools that it means: prompt, chosen, rejected, tools.
CONVERSATIONS = {
    "d00-tools-ok": (PARIS, KNOWN, UNKNOWN, [WEATHER]),
    "d01-toolcalls-json-text": (PARIS, KNOWN, UNKNOWN, [WEATHER]),
    "d02-tools-list-of-json-text": (PARIS, KNOWN, UNKNOWN, [WEATHER]),
    "d03-sharegpt-function-call": (DRESS, says("It costs 160 dollars."), says("It costs 200 dollars."), [DISCOUNT]),
    "d04-json-args-null-answer": (
        [user("Weather in Paris, default unit?")],
        calls("get_weather", {"city": "Paris", "unit": None}),
        calls("get_weather", {"city": "Paris"}),
        [WEATHER],
    ),
    "d06-reasoning-content": (
        [user("2+2?")],
        says("4", reasoning_content="Two and two is four."),
        says("5", reasoning_content="Guess."),
        None,
    ),
    "d07-messages-chosen-rejected": (
        [{"role": "system", "content": "Be brief."}, user("Capital of France?")],
        says("Paris."),
        says("Lyon."),
        None,
    ),
    "d28-toolcalls-dict": (PARIS, KNOWN, UNKNOWN, None),
}
# The first row as text that is read as it stands: prompt, chosen, rejected.
EOS = "<|im_end|>"
TEXTS = {
    "d14-unicode": ("line\u2028sep\x85 nel", f" a\x00b{EOS}", f" 👨\u200d👩\u200d👧{EOS}"),
    "d21-implicit-text": ("The sky is", f" blue.{EOS}", f" green.{EOS}"),
}
# Token ids of the first row: prompt, chosen.
TOKENS = {"d18-protein-bos": ([1, 3, 16, 14, 23], [5, 28, 13, 5, 14, 2])}
# Log-probs of chosen and rejected of the second row, by transformers, with PEFT where there are adapters.
LOGPS = {
    "m01-stale-index": (-234.7887, -193.6290),
    "l01-all-linear": (-275.6524, -208.7386),
}
REFUSED = {
    "d05-args-free-text": "row 0",
    "d09-named-templates-no-default": "chat template",
    "d15-parquet-types": "row 0: missing_field: chat_template_kwargs",
    "d16-datasetdict-splits": "test_prefs",
    "m02-rope-both": "rope_parameters, {'rope_theta': 10000.0, 'rope_type': 'default'}, differs",
    "m04-pad-beyond-embedding": "513 tokens and the model 512 embeddings",
    "m10-mistral-kv-null": "num_key_value_heads",
    "l04-embeddings-saved": "merge",
    "l06-trainable-tokens": "merge",
    "l08-lm-head": "merge",
}


@pytest.fixture
def case(shared, tmp_path, monkeypatch):
    """Copies a case and goes into its folder."""

    def enter(name: str) -> Path:
        for folder in (name, "minimind-model"):
            shutil.copytree(shared / "cases" / folder, tmp_path / folder, dirs_exist_ok=True, copy_function=shutil.copy)
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name

    return enter


def case_sets(folder: Path, **overrides):
    """The config's tokenizer and sets."""
    config = parse_config(folder / "c.yaml", overrides, DPOConfig)
    tokenizer = find_tokenizer(
        find_model(config.model.path, None, weights=False), config.model, config.data.chat_template
    )
    return tokenizer, sets_of(config, tokenizer)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_rendered_as_by_transformers(case, name):
    prompt, chosen, rejected, tools = CONVERSATIONS[name]
    tokenizer, sets = case_sets(case(name))
    ids, answers, _ = sets.train.example(0)
    for answer, message in zip(answers, (chosen, rejected), strict=True):
        expected = tokenizer.apply_chat_template([*prompt, message], tools=tools, tokenize=False)
        assert tokenizer.decode([*ids, *answer]) == expected
    assert sets.train.report[0]["dropped"] == {}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_kept_to_the_character(case, name):
    tokenizer, sets = case_sets(case(name))
    ids, answers, _ = sets.train.example(0)
    assert tuple(map(tokenizer.decode, (ids, *answers))) == TEXTS[name]


@pytest.mark.parametrize("name", TOKENS)
def test_no_token_of_a_text_is_lost(case, name):
    _, sets = case_sets(case(name))
    prompt, (chosen, _), _ = sets.train.example(0)
    assert (prompt.tolist(), chosen.tolist()) == TOKENS[name]


def test_a_split_is_found_by_its_name(case):
    _, sets = case_sets(case("d16-datasetdict-splits"), **{"data.train.split": "train_prefs"})
    assert sets.train.report[0]["rows"] == 4


@pytest.mark.parametrize("name", LOGPS)
def test_logps_are_those_of_transformers(case, name):
    folder = case(name)
    config = parse_config(folder / "c.yaml", {"data.eval.e": "pairs.jsonl"}, DPOConfig)
    evaluate(config, folder / "scored.jsonl")
    line = json.loads((folder / "scored.jsonl").read_text().splitlines()[1])
    assert (line["logps/chosen"], line["logps/rejected"]) == pytest.approx(LOGPS[name], abs=1e-3)


def test_a_run_keeps_the_template_that_its_config_names(case):
    folder = case("m09-template-export")
    config = parse_config(folder / "c.yaml", {}, DPOConfig)
    source = find_model(config.model.path, None, weights=False)
    tokenizer = find_tokenizer(source, config.model, config.data.chat_template)
    keep_model_files(RunDir(folder / "run"), source, source.hf_config, tokenizer)
    kept = AutoTokenizer.from_pretrained(folder / "run" / "model")
    assert kept.chat_template == (folder / "t.jinja").read_text()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case, name):
    folder = case(name)
    config = parse_config(folder / "c.yaml", {"data.eval.e": "pairs.jsonl"}, DPOConfig)
    with pytest.raises(UserError, match=re.escape(REFUSED[name])) as refused:
        evaluate(config, folder / "scored.jsonl")
    assert "\n" not in str(refused.value)


def test_every_case_is_read(shared):
    named = {*CONVERSATIONS, *TEXTS, *TOKENS, *LOGPS, *REFUSED, "m09-template-export"}
    assert {path.name for path in (shared / "cases").iterdir() if path.is_dir()} - {"minimind-model"} == named
