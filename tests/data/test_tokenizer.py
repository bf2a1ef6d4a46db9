"""Tokenizers as they come: what they add by themselves, what identifies them, and what does not load."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers
from test_tokenize import CHATML, ONE_TURN, assistant, config, make_tokenizer, pair, user

from dpo_jax.data.schemas import Example
from dpo_jax.data.tokenize import make_tokenize
from dpo_jax.data.tokenizer import added_around, load_tokenizer, tokenizer_hash
from dpo_jax.errors import UserError


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_what_a_tokenizer_adds(bos, eos):
    assert added_around(make_tokenizer(bos, eos)) == ([0] * bos, [1] * eos)


def words(*known, **options):
    """A tokenizer of whole words, without a token for others."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(known)}, **options))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=known[0])


def test_a_tokenizer_of_capitals_loses_no_token(shared):
    """It encodes no small letter, and has no token for what it does not know."""
    tokenizer = load_tokenizer(str(shared / "cases" / "d18-protein-bos" / "model"), None, None)
    made = make_tokenize(config(), tokenizer, "dpo")(Example(0, "1MKT", ("AYIAK", "GGGGG")))
    assert made.prompt == [1, 3, 16, 14, 23]
    assert made.answers == ([5, 28, 13, 5, 14, 2], [11, 11, 11, 11, 11, 2])


def test_a_text_that_cannot_be_encoded_is_named():
    tokenizer = words("end", "What", "is")
    assert added_around(tokenizer) == ([], [])
    assert tokenizer_hash(tokenizer) != tokenizer_hash(words("end", "is", "What"))
    tokenize = make_tokenize(config(), tokenizer, "dpo")
    assert tokenize(pair("What", " is", " What")).answers == ([2, 0], [1, 0])
    with pytest.raises(
        UserError, match=r"row 3: the tokenizer cannot encode the text: .*UNK.*: remove the row, or set"
    ):
        tokenize(pair("What", " is", " unheard"))


def test_a_tokenizer_that_encodes_nothing_is_refused():
    with pytest.raises(UserError, match="does not encode its own vocabulary"):
        added_around(words("end"))


def test_the_hash_of_a_tokenizer_is_that_of_its_behavior(tmp_path):
    tokenizer = make_tokenizer(template=CHATML)
    first = tokenizer_hash(tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=5)  # leaves its settings in the tokenizer
    assert tokenizer_hash(tokenizer) == first
    tokenizer.save_pretrained(tmp_path)
    code = f"from dpo_jax.data.tokenizer import *; print(tokenizer_hash(load_tokenizer({str(tmp_path)!r}, None, None)))"
    other = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    assert other == tokenizer_hash(load_tokenizer(str(tmp_path), None, None)) == first
    added = make_tokenizer(template=CHATML)
    added.add_tokens(["<new>"])
    split = make_tokenizer(template=CHATML)
    split.split_special_tokens = True
    others = [make_tokenizer(template=ONE_TURN), make_tokenizer(eos=True), make_tokenizer(eos_token="<s>")]
    assert len({first, *map(tokenizer_hash, [added, split, *others])}) == 6


def test_a_template_from_a_file(tmp_path):
    make_tokenizer(template=CHATML).save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text(ONE_TURN)
    assert load_tokenizer(str(tmp_path), None, None).chat_template == CHATML
    assert load_tokenizer(str(tmp_path), None, str(tmp_path / "mine.jinja")).chat_template == ONE_TURN
    with pytest.raises(UserError, match=r"data.chat_template: '.*absent.jinja' cannot be read"):
        load_tokenizer(str(tmp_path), None, str(tmp_path / "absent.jinja"))


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(
        UserError, match=r"no tokenizer can be loaded: .*: fix its files, or set model.tokenizer"
    ) as caught:
        load_tokenizer(str(tmp_path), None, None)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- files of all kinds


def saved(folder, settings=(), template=CHATML, core=None, model=None):
    """A tokenizer's folder; `settings` go into its tokenizer_config.json, `core` into its tokenizer.json."""
    tokenizer = make_tokenizer(template=template)
    tokenizer.save_pretrained(folder)
    for name, changes in (("tokenizer_config.json", settings), ("tokenizer.json", core or {})):
        values = json.loads((folder / name).read_text()) | dict(changes)
        (folder / name).write_text(json.dumps(values))
    if model is not None:
        (folder / "config.json").write_text(json.dumps(model))
    return str(folder)


PLANTED = "open({path!r}, 'w').write('ran')\nfrom transformers import PreTrainedTokenizerFast as Planted\n"


def test_code_of_a_model_never_runs(tmp_path):
    """Also where someone answers yes: nobody is asked."""
    auto_map = {"AutoTokenizer": ["planted.Planted", "planted.Planted"], "AutoConfig": "planted.Planted"}
    model = {"model_type": "planted", "auto_map": auto_map}
    named = saved(tmp_path / "named", {"auto_map": auto_map, "tokenizer_class": "Planted"}, model=model)
    beside = saved(tmp_path / "beside", model=model)
    for folder in (named, beside):
        Path(folder, "planted.py").write_text(PLANTED.format(path=str(tmp_path / "ran")))
    load = "from dpo_jax.data.tokenizer import *; load_tokenizer"
    code = f"{load}({beside!r}, None, None); print('loaded'); load_tokenizer({named!r}, None, None)"
    done = subprocess.run([sys.executable, "-c", code], input="y\n" * 9, capture_output=True, text=True, check=False)
    assert not (tmp_path / "ran").exists()
    assert done.stdout == "loaded\n"
    assert f"UserError: {named}: no tokenizer can be loaded: " in done.stderr


@pytest.mark.parametrize(
    ("settings", "core", "model", "said"),
    [
        ({"chat_template": 5}, {}, None, "chat_template is not text: 5; correct it"),
        ({"bos_token": ""}, {}, None, "the special token '' is not in the vocabulary; correct it"),
        ({"unk_token": ""}, {}, None, "no tokenizer can be loaded: RecursionError: "),
        ({"extra_special_tokens": 5}, {}, None, "no tokenizer can be loaded: TypeError: extra_special_tokens must"),
        ({}, {"model": {"type": "None"}}, None, "no tokenizer can be loaded: "),
        ({}, {"added_tokens": 5}, None, "no tokenizer can be loaded: "),
        ({}, {}, {"model_type": "mistral", "num_key_value_heads": None}, "no tokenizer .* 'num_key_value_heads'.*int"),
    ],
)
def test_broken_files_are_one_line(tmp_path, settings, core, model, said):
    path = saved(tmp_path, settings, None if "chat_template" in settings else CHATML, core, model)
    with pytest.raises(UserError, match=f"^{path}: {said}.*model.tokenizer|{said}.*data.chat_template") as refused:
        load_tokenizer(path, None, None)
    assert "\n" not in str(refused.value)


def test_several_templates_by_name(tmp_path):
    templates = [{"name": "rag", "template": "rag {{ messages }}"}, {"name": "tool_use", "template": CHATML}]
    path = saved(tmp_path, {"chat_template": templates}, template=None)
    assert load_tokenizer(path, None, "rag").chat_template == "rag {{ messages }}"
    with pytest.raises(UserError, match=r"'chat' cannot be read: .*; the tokenizer has the templates rag, tool_use"):
        load_tokenizer(path, None, "chat")
    row = pair(user("What"), assistant("is"), assistant("the"))
    with pytest.raises(UserError, match=r"row 3: .*several chat templates and no default: rag, tool_use; set data"):
        make_tokenize(config(), load_tokenizer(path, None, None), "dpo")(row)
    (tmp_path / "own.jinja").write_text(ONE_TURN)
    assert load_tokenizer(path, None, str(tmp_path / "own.jinja")).chat_template == ONE_TURN


def test_a_class_that_splits_otherwise_than_the_file_says_is_named(tmp_path, caplog):
    """Of a model of type qwen2, transformers takes Qwen's own rules of splitting."""
    spaces = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ]}  # fmt: skip
    path = saved(tmp_path / "own", core={"pre_tokenizer": spaces}, model={"model_type": "qwen2"})
    with caplog.at_level(logging.WARNING, "dpo_jax"):
        swapped = load_tokenizer(path, None, None)
        (message,) = (record.getMessage() for record in caplog.records)
        assert f"{path}: transformers loads it as Qwen2Tokenizer, which splits " in message
        caplog.clear()
        shutil.copytree(path, tmp_path / "alone", ignore=shutil.ignore_patterns("config.json"))
        alone = load_tokenizer(str(tmp_path / "alone"), None, None)
        load_tokenizer(saved(tmp_path / "plain", model={"model_type": "qwen2"}), None, None)
        assert caplog.records == []
    stated = tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json").encode("What", add_special_tokens=False).ids
    bare = [tokenizer("What", add_special_tokens=False)["input_ids"] for tokenizer in (alone, swapped)]
    assert [ids == stated for ids in bare] == [True, False]
