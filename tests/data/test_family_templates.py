"""Chat templates as the families have them: where the assistant's turn starts, and what ends it.

The templates are this file's own, each with what is peculiar to the published ones of its family.
"""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from test_tokenize import assistant, config, make_tokenizer, pair, texts, turns, user

from dpo_jax.data.schemas import Example, Problem
from dpo_jax.data.tokenize import make_tokenize, make_tokenize_prompt
from dpo_jax.weights.reward_model import stop_tokens


@dataclass(frozen=True)
class Chat:
    """A template, and how it renders the parts of a conversation."""

    template: str
    user: str  # a turn of the user, {} being its content
    start: str  # what comes before an answer
    end: str  # what ends an answer that another turn follows; the model learns it
    last: str  # what ends the last one
    stop: str  # the token by which a sampled answer ends
    first: str = ""  # what comes before the first turn
    eos: str = "</s>"
    separator: str = ""  # between an answer's end and the next turn, not to be learned


CHATS = {
    # the model's role has another name, a system turn becomes part of the first turn of the user
    "gemma3": Chat(
        """{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}\
{% set ns.system = m.content + '\n\n' %}{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ ns.system if m.role == 'user' else '' }}{% set ns.system = '' %}{{ m.content | trim }}<end_of_turn>
{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
        first="<s>", user="<start_of_turn>user\n{}<end_of_turn>\n", start="<start_of_turn>model\n",
        end="<end_of_turn>\n", last="<end_of_turn>\n", stop="<end_of_turn>",
    ),
    # EOS itself ends a turn, and a newline comes after it where another turn follows
    "olmo2": Chat(
        """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}{{ '\n' if not loop.last or m.role == 'user' else '' }}\
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
        first="<|endoftext|>", user="<|user|>\n{}\n", start="<|assistant|>\n", end="<|endoftext|>", separator="\n",
        last="<|endoftext|>", stop="<|endoftext|>", eos="<|endoftext|>",
    ),
    # without thoughts, empty ones stand before every answer, in the generation prompt too
    "smollm3": Chat(
        """<|im_start|>system
today<|im_end|>
{% for m in messages %}<|im_start|>{{ m.role }}
{{ '<think>\n\n</think>\n' if m.role == 'assistant' else '' }}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{{ '<think>\n\n</think>\n' }}{% endif %}""",
        first="<|im_start|>system\ntoday<|im_end|>\n", user="<|im_start|>user\n{}<|im_end|>\n", eos="<|im_end|>",
        start="<|im_start|>assistant\n<think>\n\n</think>\n", end="<|im_end|>\n", last="<|im_end|>\n",
        stop="<|im_end|>",
    ),
    "phi4": Chat(
        """{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}""",
        user="<|im_start|>user<|im_sep|>{}<|im_end|>", start="<|im_start|>assistant<|im_sep|>", end="<|im_end|>",
        last="<|im_end|>", stop="<|im_end|>", eos="<|im_end|>",
    ),
    # EOS stands once, at the end of the whole conversation
    "phi3": Chat(
        """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}""",
        user="<|user|>\n{}<|end|>\n", start="<|assistant|>\n", end="<|end|>\n", last="<|end|>\n<|endoftext|>",
        stop="<|end|>", eos="<|endoftext|>",
    ),
    # the last answer ends with a token of its own; that of the earlier ones is no target, or both would be learned
    "gpt_oss": Chat(
        """{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}\
{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}""",
        user="<|start|>user<|message|>{}<|end|>", start="<|start|>assistant<|message|>", end="", separator="<|end|>",
        last="<|return|>", stop="<|return|>", eos="<|return|>",
    ),
    "granite": Chat(
        """{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>
{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}""",
        user="<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n", eos="<|end_of_text|>",
        start="<|start_of_role|>assistant<|end_of_role|>", end="<|end_of_text|>\n", last="<|end_of_text|>\n",
        stop="<|end_of_text|>",
    ),
    "cohere2": Chat(
        """{{ bos_token }}{% for m in messages %}<|START|>{{ '<|USER|>' if m.role == 'user' else '<|CHATBOT|>' }}\
{{ m.content | trim }}<|END|>{% endfor %}{% if add_generation_prompt %}<|START|><|CHATBOT|>{% endif %}""",
        first="<s>", user="<|START|><|USER|>{}<|END|>", start="<|START|><|CHATBOT|>", end="<|END|>", last="<|END|>",
        stop="<|END|>", eos="<|END|>",
    ),
    # no turn has an end, and the last answer learns none, as in TRL: a sampled one ends by EOS
    "glm4": Chat(
        """[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
        first="[gMASK]<sop>", user="<|user|>\n{}", start="<|assistant|>\n", end="", last="",
        stop="<|endoftext|>", eos="<|endoftext|>",
    ),
    "stablelm": Chat(
        """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
        user="<|user|>\n{}<|endoftext|>\n", start="<|assistant|>\n", end="<|endoftext|>\n", last="<|endoftext|>\n",
        stop="<|endoftext|>", eos="<|endoftext|>",
    ),
    "mixtral": Chat(
        """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}\
{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}""",
        first="<s>", user="[INST] {} [/INST]", start="", end="</s>", last="</s>", stop="</s>",
    ),
}  # fmt: skip


@pytest.fixture(params=CHATS)
def chat(request) -> Chat:
    return CHATS[request.param]


def tokenizer_of(chat: Chat):
    """The small tokenizer with every token of the template, EOS among them."""
    tokenizer = make_tokenizer(bos=False, template=chat.template)
    tokens = sorted({*re.findall(r"<[|/\w]+>|\[/?INST\]|\[gMASK\]", chat.template), chat.eos})
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "eos_token": chat.eos})
    if chat.first == chat.eos:
        tokenizer.bos_token = chat.eos
    return tokenizer


def answer(chat: Chat, text: str) -> str:
    return f"{chat.start}{text}{chat.end}{chat.separator}"


def test_an_answer_starts_after_the_start_of_its_turn_and_ends_with_its_end(chat):
    tokenizer = tokenizer_of(chat)
    example = pair(turns("What", "is", "the"), assistant("capital"), assistant("Paris."))
    made = make_tokenize(config(), tokenizer, "dpo")(example)
    before = chat.first + chat.user.format("What") + answer(chat, "is") + chat.user.format("the") + chat.start
    assert texts(tokenizer, made) == [before, "capital" + chat.last, "Paris." + chat.last]
    assert made.notes == ()


def test_every_answer_of_a_conversation_is_learned_with_its_end(chat):
    tokenizer = tokenizer_of(chat)
    messages = turns("What", "is", "the", "capital", "of", "France")
    made = make_tokenize(config(), tokenizer, "sft")(Example(3, None, (messages,)))
    assert made.notes == ()
    targets = made.targets or [True] * len(made.answers[0])
    learned = [token for token, flag in zip(made.answers[0], targets, strict=True) if flag]
    assert tokenizer.decode(learned) == f"is{chat.end}capital{chat.end}France{chat.last}"
    assert made.prompt + made.answers[0] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_a_sampled_answer_starts_where_training_does_and_stops_at_the_end_of_the_turn(chat):
    tokenizer = tokenizer_of(chat)
    prompt = make_tokenize_prompt("2024-07-26", tokenizer)(Example(3, turns("What", "is", "the"), ()))
    example = pair(turns("What", "is", "the"), assistant("capital"), assistant("Paris."))
    made = make_tokenize(config(), tokenizer, "dpo")(example)
    assert prompt.tokens == made.prompt
    assert tokenizer.decode(prompt.tail) == chat.last
    stops = stop_tokens(SimpleNamespace(folder=None), tokenizer, [prompt.tail])
    assert set(tokenizer.convert_ids_to_tokens(stops)) == {chat.stop, chat.eos}


def test_the_system_turn_of_gemma_3_becomes_part_of_the_first_turn():
    tokenizer = tokenizer_of(CHATS["gemma3"])
    system = [{"role": "system", "content": "It is"}]
    made = make_tokenize(config(), tokenizer, "dpo")(pair(system + user("What"), assistant("one"), assistant("two")))
    before = "<s><start_of_turn>user\nIt is\n\nWhat<end_of_turn>\n<start_of_turn>model\n"
    assert texts(tokenizer, made)[0] == before
    assert made.notes == ()


def test_a_tool_call_that_is_rendered_differently_is_not_taken_for_an_end():
    template = """{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for call in m.tool_calls or [] %}\
{{ 'last' if loop.index0 == 0 and messages[-1].tool_calls else 'earlier' }}{{ call.function.name }}\
{{ call.function.arguments.city }}{% endfor %};{% endfor %}"""
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    asked = [*user("Rain?"), {"role": "assistant", "content": "I look", "tool_calls": [call]}]
    sft = make_tokenize(config(), make_tokenizer(template=template), "sft")
    problem = sft(Example(3, None, ([*asked, {"role": "tool", "content": "no"}, *assistant("No.")],)))
    assert isinstance(problem, Problem)
    assert problem.cause == "template_not_prefix"
