"""Tokens of examples: boundary, special tokens, templates, truncation, invalid rows."""

import pickle

import pytest
import tokenizers
import transformers

from dpo_jax.config import DataConfig, InvalidRowsConfig, SourceConfig
from dpo_jax.data.schemas import Example, Problem
from dpo_jax.data.tokenize import NOTES, TokenizedExample, make_tokenize, make_tokenize_prompt
from dpo_jax.errors import UserError

TEXT = "What is the capital of France? Paris. It is Lyon. user assistant system one two three four five six seven\n"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}\
{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ONE_TURN = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"  # no generation prompt
)
# Thoughts stand in the last message alone, as Qwen3 has it.
THOUGHTS = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer(bos=True, eos=False, template=None, **special):
    """A small byte-level tokenizer that knows every word of TEXT; `bos`, `eos`: what it adds to a text by itself."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([TEXT] * 9, trainer)
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | special
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = template
    return tokenizer


def config(**options) -> DataConfig:
    return DataConfig(train=(SourceConfig(path="pairs.jsonl"),), **options)


def pair(prompt, chosen, rejected, **rest):
    return Example(3, prompt, (chosen, rejected), **rest)


def texts(tokenizer, made: TokenizedExample) -> list[str]:
    return [tokenizer.decode(ids) for ids in (made.prompt, *made.answers)]


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


# ------------------------------------------------------------------------------------------- text, special tokens


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("append_eos", [False, True])
def test_bos_and_eos_come_once_where_they_belong(bos, eos, append_eos):
    tokenizer = make_tokenizer(bos, eos)
    tokenize = make_tokenize(config(append_eos=append_eos), tokenizer, "dpo")
    start, end = "<s>" if bos else "", "</s>" if append_eos else ""
    for prompt in ("What is", "<s>What is"):
        made = tokenize(pair(prompt, " Paris.", " Lyon.</s>"))
        first = "<s>" if prompt.startswith("<s>") else start
        assert texts(tokenizer, made) == [first + "What is", " Paris." + end, " Lyon.</s>"]
        assert made.notes == ()
    sft = make_tokenize(config(append_eos=append_eos), tokenizer, "sft")
    assert texts(tokenizer, sft(Example(3, "What", (" is",)))) == [start + "What", " is" + end]
    text = sft(Example(3, None, ("What is Paris",)))
    assert len(text.prompt) == 1
    assert text.targets is None
    assert "".join(texts(tokenizer, text)) == start + "What is Paris" + end


def test_bos_that_is_eos_too():
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="<s>")
    made = make_tokenize(config(), tokenizer, "dpo")(pair("", "Paris", "Lyon"))
    assert (made.prompt, [answer.count(0) for answer in made.answers]) == ([0], [1, 1])


def test_a_token_that_straddles_belongs_to_both_answers():
    tokenizer = make_tokenizer()
    tokenize = make_tokenize(config(), tokenizer, "dpo")
    made = tokenize(pair("What is the ", "capital", "2"))
    assert texts(tokenizer, made) == ["<s>What is the", " capital</s>", " 2</s>"]
    assert texts(tokenizer, tokenize(pair("What is the ", "2", "capital")))[1:] == [" 2</s>", " capital</s>"]
    assert texts(tokenizer, tokenize(pair("What is the ", "2", "3")))[0] == "<s>What is the "
    (note,) = made.notes
    assert note.cause == "straddling_token"
    assert note.cause in NOTES
    assert "' '" in note.detail


def test_prompt_and_answer_are_the_encoding_of_their_text():
    """The tokens are those of the whole text, whatever the boundary; and the prompt is as long as both allow."""
    tokenizer = make_tokenizer()
    tokenize = make_tokenize(config(), tokenizer, "dpo")
    for cut in range(1, len(TEXT) - 1):
        prompt, chosen, rejected = TEXT[:cut], TEXT[cut:], "seven six five"
        made = tokenize(pair(prompt, chosen, rejected))
        whole = [tokenizer(prompt + answer)["input_ids"] for answer in (chosen, rejected)]
        assert [made.prompt + answer for answer in made.answers] == [[*ids, 1] for ids in whole]
        size, alone = len(made.prompt), tokenizer(prompt)["input_ids"]
        assert alone[:size] == made.prompt
        assert size == len(alone) or any(ids[: size + 1] != alone[: size + 1] for ids in whole)
        assert bool(made.notes) == (size < len(alone))


@pytest.mark.parametrize(
    ("example", "cause"),
    [
        (pair("", "Paris", "Lyon"), "empty_prompt"),
        (pair("What", " is", " is"), "equal_answers"),
        (pair("What", " is", " is</s>"), "equal_answers"),
        (pair(user("What"), assistant("is"), assistant("is")), "equal_answers"),
    ],
)
def test_how_invalid_rows_are_handled(example, cause):
    tokenizer = make_tokenizer(bos=False, template=CHATML)
    for handling in ("drop", "error"):
        problem = make_tokenize(config(invalid_rows=InvalidRowsConfig(**{cause: handling})), tokenizer, "dpo")(example)
        assert isinstance(problem, Problem)
        assert (problem.row, problem.cause) == (3, cause)


def test_equal_answers_can_be_kept_and_are_counted():
    tokenize = make_tokenize(config(invalid_rows=InvalidRowsConfig(equal_answers="keep")), make_tokenizer(), "dpo")
    made = tokenize(pair("What", " is", " is"))
    assert made.answers[0] == made.answers[1]
    assert [note.cause for note in made.notes] == ["equal_answers"]


def test_a_missing_eos_or_template_is_said():
    with pytest.raises(UserError, match=r"row 3: the tokenizer has no EOS .* set data.append_eos to false"):
        make_tokenize(config(), make_tokenizer(eos_token=None), "dpo")(pair("What", " is", " the"))
    with pytest.raises(
        UserError, match=r"row 3: the row holds messages, but the tokenizer has no chat template; .* data\.chat"
    ):
        make_tokenize(config(), make_tokenizer(), "dpo")(pair(user("What"), assistant("is"), assistant("the")))


# ------------------------------------------------------------------------------------------------- conversations


def test_a_conversation_is_what_its_template_writes():
    tokenizer = make_tokenizer(eos=True, template="{{ bos_token }}" + CHATML)
    prompt = turns("What", "is", "the")
    made = make_tokenize(config(), tokenizer, "dpo")(pair(prompt, assistant("capital"), assistant("Lyon")))
    before = """<s><|im_start|>user\nWhat<|im_end|>\n<|im_start|>assistant\nis<|im_end|>
<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"""
    assert texts(tokenizer, made) == [before, "capital<|im_end|>\n", "Lyon<|im_end|>\n"]
    assert made.notes == ()


def test_tools_and_kwargs_reach_the_template():
    template = "{{ tools[0]['name'] }}{{ mood }}" + CHATML
    example = pair(user("x"), assistant("a"), assistant("b"), tools=[{"name": "f"}], template_kwargs={"mood": "g"})
    tokenizer = make_tokenizer(template=template)
    made = make_tokenize(config(), tokenizer, "dpo")(example)
    assert texts(tokenizer, made)[0].startswith("fg<|im_start|>user")


def test_a_template_that_is_no_prefix_of_itself():
    template = """{{ messages[0]['content'] }}{% if add_generation_prompt %} one two{% else %}\
 one{{ messages[1]['content'] }}{% endif %}"""
    tokenizer = make_tokenizer(template=template)
    example = pair(user("What is"), assistant(" Paris."), assistant(" Lyon."))
    made = make_tokenize(config(), tokenizer, "dpo")(example)
    assert texts(tokenizer, made) == ["What is one", " Paris.", " Lyon."]
    assert [(note.cause, "'two'" in note.detail) for note in made.notes] == [("template_not_prefix", True)]
    for handling in ("drop", "error"):
        tokenize = make_tokenize(config(invalid_rows=InvalidRowsConfig(template_not_prefix=handling)), tokenizer, "dpo")
        assert tokenize(example).cause == "template_not_prefix"


CONVERSATIONS = [
    turns("What is", "the capital"),
    turns("What", "is", "the", "capital of", "France"),
    turns("is", "What", "the", "Paris.", roles=("assistant", "user")),
    [*turns("one", "two"), *assistant("three"), *turns("four", "five")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_sft_learns_what_the_template_marks_as_the_assistants(messages):
    """Found by rendering step by step; templates that mark their assistant turns say the same."""
    tokenizer = make_tokenizer(template=CHATML)
    made = make_tokenize(config(), tokenizer, "sft")(Example(3, None, (messages,)))
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = whole["assistant_masks"]
    if messages[0]["role"] == "assistant":  # nothing comes before it: context
        marked = [mark if place > whole["input_ids"].index(3) + 1 else 0 for place, mark in enumerate(marked)]
    ids = made.prompt + made.answers[0]
    learned = [False] * len(made.prompt) + (made.targets or [True] * len(made.answers[0]))
    size = max(place for place, mark in enumerate(marked) if mark) + 1  # what follows the last turn is left out
    assert ids == whole["input_ids"][:size]
    assert learned == [bool(mark) for mark in marked[:size]]
    assert learned[len(made.prompt)]
    assert made.notes == ()


def learned_text(tokenizer, made):
    targets = made.targets or [True] * len(made.answers[0])
    return tokenizer.decode([token for token, learned in zip(made.answers[0], targets, strict=True) if learned])


def test_sft_reads_a_turn_of_weight_0_and_does_not_learn_it():
    tokenizer = make_tokenizer(template=CHATML)
    sft = make_tokenize(config(), tokenizer, "sft")
    messages = turns("What", "is", "the", "capital")
    whole = sft(Example(3, None, (messages,)))
    messages[1]["weight"] = 0
    made = sft(Example(3, None, (messages,)))
    assert made.prompt + made.answers[0] == whole.prompt + whole.answers[0]
    assert learned_text(tokenizer, made) == "capital<|im_end|>\n"
    messages[3]["weight"] = 0
    assert sft(Example(3, None, (messages,))).cause == "empty_answer"


def test_sft_with_a_template_that_rewrites_history():
    tokenizer = make_tokenizer(template=THOUGHTS)
    sft = make_tokenize(config(), tokenizer, "sft")
    made = sft(Example(3, None, (turns("What", "is", "the", "capital", "of"),)))
    assert learned_text(tokenizer, made) == "is<|im_end|>\ncapital<|im_end|>\n"
    assert [note.cause for note in made.notes] == ["template_not_prefix"]
    made = sft(Example(3, None, (turns("What", "is", "the", "capital"),)))
    assert learned_text(tokenizer, made) == "is<|im_end|>\n<think></think>capital<|im_end|>\n"
    assert sft(Example(3, None, (turns("What", "is"),))).notes == ()
    tokenize = make_tokenize(config(invalid_rows=InvalidRowsConfig(template_not_prefix="drop")), tokenizer, "sft")
    assert tokenize(Example(3, None, (turns("What", "is", "the", "capital"),))).cause == "template_not_prefix"


def test_sft_turns_that_cannot_be_found_drop_the_row():
    template = (
        "{% for m in messages %}{{ m['role'] }}{{ m['content'] if loop.last else m['content']|upper }}{% endfor %}"
    )
    sft = make_tokenize(config(), make_tokenizer(template=template), "sft")
    problem = sft(Example(3, None, (turns("What", "is", "the", "capital"),)))
    assert problem == Problem(3, "template_not_prefix", "message 1 cannot be found in the rendered conversation")


def test_sft_without_a_turn_to_learn():
    sft = make_tokenize(config(), make_tokenizer(template=CHATML), "sft")
    assert sft(Example(3, None, (assistant("is"),))).cause == "empty_answer"


# ---------------------------------------------------------------------------------------------------- truncation

NUMBERS = [" one", " two", " three", " four", " five", " six", " seven"]


def numbers(count):
    return "".join(NUMBERS[:count])


@pytest.mark.parametrize(
    ("truncation", "limit", "bos", "expected"),
    [  # prompt of 4 (+ BOS), answers of 3 and 5 (EOS included)
        ("keep_start", 10, True, ["<s>" + numbers(4), numbers(2) + "</s>", numbers(4) + "</s>"]),
        ("keep_start", 9, True, ["<s>" + numbers(4), numbers(2) + "</s>", numbers(4)]),
        ("keep_start", 7, True, ["<s>" + numbers(4), numbers(2), "".join(NUMBERS[:2])]),
        ("keep_start", 5, True, None),
        ("keep_end", 9, True, ["<s> two three four", numbers(2) + "</s>", numbers(4) + "</s>"]),
        ("keep_end", 6, True, ["<s>", numbers(2) + "</s>", numbers(4) + "</s>"]),
        ("keep_end", 5, True, None),
        ("keep_end", 7, False, [" three four", numbers(2) + "</s>", numbers(4) + "</s>"]),
        ("keep_end", 6, False, [" four", numbers(2) + "</s>", numbers(4) + "</s>"]),
    ],
)
def test_truncation(truncation, limit, bos, expected):
    tokenizer = make_tokenizer(bos)
    invalid_rows = InvalidRowsConfig(equal_answers="keep")
    tokenize = make_tokenize(
        config(max_length=limit, truncation=truncation, invalid_rows=invalid_rows), tokenizer, "dpo"
    )
    made = tokenize(pair(numbers(4), numbers(2), numbers(4)))
    if expected is None:
        assert made.cause == "too_long"
        assert made.detail.startswith(f"10 tokens, but max_length is {limit}, and the ")
        return
    assert texts(tokenizer, made) == expected
    longest = max(len(made.prompt) + len(answer) for answer in made.answers)
    assert longest <= limit
    assert [note.cause for note in made.notes].count("too_long") == (limit < 10)


def test_answers_that_truncation_makes_equal_are_dropped():
    tokenize = make_tokenize(config(max_length=7), make_tokenizer(), "dpo")
    assert tokenize(pair(numbers(4), numbers(5), numbers(6))).cause == "equal_answers"


def test_truncation_of_a_prompt_without_answers():
    tokenizer = make_tokenizer()
    tokenize = make_tokenize(config(max_length=4, truncation="keep_end"), tokenizer, "prompts")
    assert tokenizer.decode(tokenize(Example(3, numbers(7), ())).prompt) == "<s> five six seven"
    tokenize = make_tokenize(config(max_length=4), tokenizer, "prompts")
    assert tokenize(Example(3, numbers(7), ())).cause == "too_long"


def test_too_long_can_be_dropped():
    for handling in ("drop", "error"):
        tokenize = make_tokenize(
            config(max_length=9, invalid_rows=InvalidRowsConfig(too_long=handling)), make_tokenizer(), "dpo"
        )
        assert tokenize(pair(numbers(4), numbers(2), numbers(4))).cause == "too_long"
        assert isinstance(tokenize(pair(numbers(4), numbers(2), numbers(3))), TokenizedExample)


@pytest.mark.parametrize(
    ("truncation", "expected"), [("keep_start", ["<s>", numbers(4)]), ("keep_end", ["<s>", " five six seven</s>"])]
)
def test_truncation_of_a_text(truncation, expected):
    tokenizer = make_tokenizer()
    tokenize = make_tokenize(config(max_length=5, truncation=truncation), tokenizer, "sft")
    assert texts(tokenizer, tokenize(Example(3, None, (numbers(7),)))) == expected


def test_truncation_of_a_conversation():
    """What is left learns what it learned before; without a learned token the row goes."""
    tokenizer = make_tokenizer(bos=False, template=CHATML)
    example = Example(3, None, (turns("one", "two", "three", "four", "five", "six"),))
    whole = make_tokenize(config(), tokenizer, "sft")(example)
    ids = whole.prompt + whole.answers[0]
    learned = [False] * len(whole.prompt) + whole.targets
    for truncation in ("keep_start", "keep_end"):
        for limit in range(2, len(ids)):
            cut = slice(0, limit) if truncation == "keep_start" else slice(len(ids) - limit, None)
            made = make_tokenize(config(max_length=limit, truncation=truncation), tokenizer, "sft")(example)
            if not any(learned[cut][1:]):
                assert made.cause == "too_long"
                continue
            got = made.prompt + made.answers[0]
            targets = [False] * len(made.prompt) + (made.targets or [True] * len(made.answers[0]))
            assert got == ids[cut][: len(got)]
            assert targets[1:] == learned[cut][1 : len(got)]
            assert not any(learned[cut][len(got) :])


def test_the_function_travels_to_other_processes():
    example = pair("What is", " Paris.", " Lyon.", weight=0.5)
    tokenize = make_tokenize(config(), make_tokenizer(), "dpo")
    made = tokenize(example)
    assert pickle.loads(pickle.dumps(tokenize))(example) == made
    assert made.weight == 0.5


@pytest.mark.parametrize("template", [CHATML, THOUGHTS])
def test_a_prompt_to_answer_is_that_of_training_and_its_tail_what_ends_an_answer(template):
    tokenizer = make_tokenizer(template=template)
    messages = [{"role": "system", "content": "Paris"}, {"role": "user", "content": "What is the capital of France?"}]
    answer = [{"role": "assistant", "content": "Paris."}]
    for prompt, answers in (("What is the capital of France?", (" Paris.",)), (messages, (answer,))):
        trained = make_tokenize(DataConfig(train=(SourceConfig(path="p"),)), tokenizer, "sft")(
            Example(0, prompt, answers)
        )
        asked = make_tokenize_prompt("2024-07-26", tokenizer)(Example(0, prompt, ()))
        assert asked.tokens == trained.prompt
        assert asked.tail == trained.answers[0][-len(asked.tail) :]
        assert asked.tail[0] == (1 if isinstance(prompt, str) else SPECIAL.index("<|im_end|>"))


def test_prompts_that_cannot_be_tokenized():
    tokenize_prompt = make_tokenize_prompt(
        "2024-07-26", make_tokenizer(bos=False, template="{{ raise_exception('no') }}")
    )
    messages = [{"role": "user", "content": "one"}]
    assert tokenize_prompt(Example(0, "", ())) == Problem(0, "empty_prompt", "the prompt has no token")
    assert tokenize_prompt(Example(0, messages, ())) == Problem(0, "template_refused", "no")
    with pytest.raises(UserError, match="the row holds messages, but the tokenizer has no chat template"):
        make_tokenize_prompt("2024-07-26", make_tokenizer())(Example(0, messages, ()))
