"""The tokens that end a policy's answers, and the reward model that scores the answers at their end."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from dpo_jax.config import DataConfig, ModelConfig, SourceConfig
from dpo_jax.config.generate import RewardModelConfig
from dpo_jax.data.schemas import Example, Problem
from dpo_jax.data.template import reads_clock
from dpo_jax.data.tokenize import TokenizedExample, TokenizedPrompt, make_tokenize, make_tokenize_prompt
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.errors import UserError, require
from dpo_jax.inference.generate import Answer
from dpo_jax.models.decoder import Model
from dpo_jax.weights.hub import end_tokens
from dpo_jax.weights.open import ModelSource, OpenModel, open_model


def stop_tokens(source: ModelSource, tokenizer: Any, tails: Iterable[list[int]]) -> list[int]:
    """Return the tokens that end an answer: EOS, those of generation_config.json, and the chat template's end of turn.

    ``tails``: tokens that training appends to the text of answers. An end of turn counts only if it is a special or
    added token, such as ``<|im_end|>``, not ordinary text.
    """
    end_ids = {tokenizer.eos_token_id} - {None}
    if source.folder is not None and (source.folder / "generation_config.json").is_file():
        end_ids |= end_tokens(source.folder, source.hf_config)
    special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(end_ids | ({tail[0] for tail in tails if tail} & special_ids))


def refuse_reward_model(model: Model, path: str) -> None:
    """Raise ``UserError`` if the model of ``model.path`` predicts no tokens."""
    remedy = "it is a reward model, without an unembedding; choose a language model"
    require(model.config.scores == 0, "model.path", path, remedy)


def with_tail(tokens: list[int], ended: bool, tail: list[int]) -> list[int]:
    """Return an answer's tokens, extended to the token at which a reward model was trained to score it.

    Chat templates may write something after the end of a turn, such as a newline, which is then the last token.
    """
    is_turn = ended and tokens[-1:] == tail[:1]
    return tokens + tail[1:] * is_turn


ReadAnswer = Callable[[TokenizedPrompt, Answer, Callable[[], Example]], tuple[list[int], list[int]]]
"""(prompt, answer, function that returns the prompt's row) -> tokens of prompt and answer for the reward model."""


class RewardModel(NamedTuple):
    """A reward model whose files were found, and how it reads the policy's answers."""

    opened: OpenModel
    read_answer: ReadAnswer
    reading: str  # identity of how it reads text, for manifests; empty if it reads the policy's tokens

    @property
    def reads_tokens(self) -> bool:
        """Whether the reward model has the policy's tokenizer and chat template, and so reads the policy's tokens."""
        return self.read_answer is _read_tokens


def reward_model_config(config: RewardModelConfig, policy: ModelConfig) -> ModelConfig:
    """Return the options of the reward model at ``config.path``, with the policy's compute options."""
    assert config.path is not None
    return replace(policy, path=config.path, revision=config.revision, checkpoint=config.checkpoint, tokenizer=None)


def refuse_language_model(model: Model, config: RewardModelConfig) -> None:
    """Raise ``UserError`` if the model at ``config.path`` gives no scores."""
    remedy = "it is a language model, which has no score head; train a reward model with dpo-jax reward"
    require(model.config.scores == 1, f"{config.section}.path", config.path, remedy)


def open_reward_model(
    config: RewardModelConfig, policy: ModelConfig, platform: str, tokenizer: Any, template_date: str
) -> RewardModel:
    """Open the reward model of ``config.path`` with the policy's compute options; ``tokenizer`` is the policy's.

    Raises:
        UserError: it is a language model, or its tokenizer cannot be loaded.
    """
    assert config.path is not None
    section = config.section
    opened = open_model(reward_model_config(config, policy), platform, section=section)
    refuse_language_model(opened.model, config)
    try:
        reward_tokenizer = opened.tokenizer(None)
    except UserError as error:
        remedy = "fix the tokenizer in its directory, or choose another reward model"
        raise UserError(f"{section}.path: {config.path}: its tokenizer cannot be loaded: {error}; {remedy}") from error
    if reward_tokenizer.chat_template is None:
        reward_tokenizer.chat_template = tokenizer.chat_template
    reading_id = f" {tokenizer_hash(reward_tokenizer)}"
    if reading_id == f" {tokenizer_hash(tokenizer)}":
        return RewardModel(opened, _read_tokens, "")
    if reads_clock(reward_tokenizer.chat_template):
        reading_id += f" {template_date}"
    return RewardModel(opened, _make_read_text(config, reward_tokenizer, tokenizer, template_date), reading_id)


def _read_tokens(prompt: TokenizedPrompt, answer: Answer, _: Callable[[], Example]) -> tuple[list[int], list[int]]:
    return prompt.tokens, with_tail(answer.tokens, answer.ended, prompt.tail)


def _make_read_text(config: RewardModelConfig, reward_tokenizer: Any, tokenizer: Any, template_date: str) -> ReadAnswer:
    """Return a function that tokenizes an answer's text as in the training of the reward model.

    An answer that was cut off has none of the tokens that end one.
    """
    tokenize_prompt = make_tokenize_prompt(template_date, reward_tokenizer)
    data = DataConfig(
        train=(SourceConfig(path="answers"),),
        max_length=sys.maxsize,
        template_date=template_date,
        append_eos=reward_tokenizer.eos_token_id is not None,
    )
    tokenize = make_tokenize(data, reward_tokenizer, "sft")

    def read_text(prompt: TokenizedPrompt, answer: Answer, row: Callable[[], Example]) -> tuple[list[int], list[int]]:
        example, text = row(), answer.text(tokenizer, prompt.tokens)
        message = text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
        context = tokenize_prompt(example)
        tokenized = context if isinstance(context, Problem) else tokenize(replace(example, answers=(message,)))
        tail = [] if isinstance(context, Problem) else context.tail
        if isinstance(tokenized, TokenizedExample):
            tokens = tokenized.answers[0]
            is_cut = not answer.ended and 0 < len(tail) < len(tokens) and tokens[-len(tail) :] == tail
            return tokenized.prompt, tokens[: -len(tail)] if is_cut else tokens
        if tokenized.cause == "empty_answer" and isinstance(context, TokenizedPrompt):  # scored where an answer begins
            return (context.tokens, tail) if tail else (context.tokens[:-1], context.tokens[-1:])
        problem = f"{config.path} cannot read row {example.row}: {tokenized.detail}"
        raise UserError(f"{config.section}.path: {problem}; remove the row, or choose another reward model")

    return read_text
