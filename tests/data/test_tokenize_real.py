"""Tokens of real data with real tokenizers and templates; and that they are those of TRL."""

import hashlib
import json
from collections import Counter

import pytest
import tokenizers
import transformers

from dpo_jax.config import DataConfig, InvalidRowsConfig, SourceConfig
from dpo_jax.data.infer_schema import parser_of
from dpo_jax.data.schemas import Example, Problem
from dpo_jax.data.sources import load_rows
from dpo_jax.data.tokenize import TokenizedExample, make_tokenize
from dpo_jax.data.tokenizer import load_tokenizer


def config(**options) -> DataConfig:
    return DataConfig(train=(SourceConfig(path="pairs.jsonl"),), **options)


def test_straddling_with_gpt2(shared):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "tokenizers" / "gpt2" / "gpt2.json"), eos_token="<|endoftext|>"
    )
    made = make_tokenize(config(), tokenizer, "dpo")(Example(0, "The capital is ", ("Paris.", "1.")))
    assert [tokenizer.decode(ids) for ids in (made.prompt, *made.answers)] == [
        "The capital is",
        " Paris.<|endoftext|>",
        " 1.<|endoftext|>",
    ]
    assert [note.cause for note in made.notes] == ["straddling_token"]


def tokenized(path, tokenizer, stage="dpo", limit=None, **options):
    """(examples, dropped by cause, notes by cause) of a file."""
    rows = load_rows(SourceConfig(path=str(path), limit=limit))
    parse = parser_of("auto", list(rows[0]), rows[:3], stage)
    tokenize = make_tokenize(config(**options), tokenizer, stage)
    parsed = [parse(number, row) for number, row in enumerate(rows)]
    made = [tokenize(example) if isinstance(example, Example) else example for example in parsed]
    examples = [one for one in made if isinstance(one, TokenizedExample)]
    counts = Counter(one.cause for one in made if isinstance(one, Problem))
    assert len(examples) + counts.total() == len(rows)
    return examples, dict(counts), dict(Counter(note.cause for one in examples for note in one.notes))


def digest(examples) -> str:
    return hashlib.sha256(json.dumps([[one.prompt, *one.answers] for one in examples]).encode()).hexdigest()


def test_tokens_are_those_of_trl(shared):
    """The hashes are of what TRL 1.16.0's DPOTrainer makes of the same rows."""
    stories = load_tokenizer(str(shared / "models" / "stories260K"), None, None)
    examples, dropped, notes = tokenized(shared / "reference_curves" / "pairs.jsonl", stories)
    assert (len(examples), dropped, notes) == (160, {}, {})
    assert digest(examples) == "ef52e390bd25c22bae2860c73470edd7fc6312dff590dc971f5b6932a65c6015"
    template = str(shared / "chat_templates" / "qwen3.jinja")
    qwen = load_tokenizer(str(shared / "tokenizers" / "qwen3"), None, template)
    conversations = shared / "preference" / "dpo_en_sharegpt_form.json"
    examples, _, _ = tokenized(conversations, qwen, limit=100, max_length=100_000)
    assert digest(examples) == "2355f85cc4967fdf4cc4187088a8675ce71fd0838da89879b9512be9296f3eeb"


@pytest.mark.slow
def test_every_row_of_real_data_is_accounted_for(shared):
    stories = load_tokenizer(str(shared / "models" / "stories260K"), None, None)
    preference = shared / "preference"
    examples, dropped, notes = tokenized(preference / "hh_harmless_dev.jsonl", stories, max_length=768)
    assert (len(examples), dropped, notes) == (1587, {"too_long": 110}, {"too_long": 130})
    for one in examples:
        assert one.prompt[0] == 1
        assert all(1 not in answer[:-1] for answer in one.answers)
    minimind = load_tokenizer(str(shared / "tokenizers" / "minimind"), None, None)
    found = tokenized(preference / "instruction_preference_alpaca_form.json", minimind)
    assert (len(found[0]), found[1]) == (1094, {"equal_answers": 6})
    examples, dropped, _ = tokenized(shared / "text" / "tinystories_dev.jsonl", stories, "sft", max_length=512)
    assert (len(examples), dropped) == (1900, {})


@pytest.mark.parametrize("template", ["llama3", "llama3_1", "qwen2_5", "qwen3", "gemma"])
def test_real_templates_end_each_answer_once(shared, template):
    """BOS once at most, the answer's turn ended once, in each published template."""
    tokenizer = load_tokenizer(
        str(shared / "tokenizers" / "minimind"), None, str(shared / "chat_templates" / f"{template}.jinja")
    )
    tokenizer.add_special_tokens({"bos_token": "<BOS>", "additional_special_tokens": ["<|eot_id|>", "<end_of_turn>"]})
    core = tokenizer.backend_tokenizer  # this one adds BOS to each text, as Llama's does
    bos = ("<BOS>", tokenizer.bos_token_id)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<BOS> $A", special_tokens=[bos])
    writes_bos = template in ("llama3", "llama3_1", "gemma")
    end = {"llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(template, "<|im_end|>")
    rows = load_rows(SourceConfig(path=str(shared / "preference" / "dpo_en_sharegpt_form.json"), limit=40))
    parse = parser_of("auto", list(rows[0]), rows[:1], "dpo")
    options = {"invalid_rows": InvalidRowsConfig(template_refused="drop"), "max_length": 100_000}
    for stage in ("dpo", "sft"):
        tokenize = make_tokenize(config(**options), tokenizer, stage)
        for number, row in enumerate(rows):
            example = parse(number, row)
            if stage == "sft":
                example = Example(number, None, (example.prompt + example.answers[0],))
            made = tokenize(example)
            if template == "gemma" and row["conversations"][0]["from"] == "system":
                assert made == Problem(number, "template_refused", "System role not supported")
                continue
            for answer in made.answers:
                assert (made.prompt + answer).count(tokenizer.bos_token_id) == writes_bos
                assert answer[-2:].count(tokenizer.convert_tokens_to_ids(end)) == 1
                if stage == "dpo":
                    assert answer.count(tokenizer.convert_tokens_to_ids(end)) == 1


@pytest.mark.parametrize("content", ["<answer>4</answer>", "<", "<think", "4"])
def test_all_of_an_earlier_turn_is_learned_however_it_begins(shared, content):
    """Qwen3 writes ``<think>`` before an answer and takes it out of earlier turns; a content may begin alike."""
    qwen = load_tokenizer(str(shared / "tokenizers" / "qwen3"), None, str(shared / "chat_templates" / "qwen3.jinja"))
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "q"), ("assistant", content), ("user", "p"), ("assistant", "x"))
    ]
    example = Example(0, None, (messages,), template_kwargs={"enable_thinking": False})
    made = make_tokenize(config(), qwen, "sft")(example)
    learned = [token for token, flag in zip(made.answers[0], made.targets, strict=True) if flag]
    assert qwen.decode(learned).startswith(f"{content}<|im_end|>")
