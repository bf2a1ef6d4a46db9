"""Where a policy's answers end, and the reward model that scores them there."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dpo_jax.config import ModelConfig
from dpo_jax.config.generate import RewardModelConfig
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.errors import UserError, require
from dpo_jax.models.decoder import Model
from dpo_jax.weights.hub import end_tokens
from dpo_jax.weights.open import ModelSource, OpenModel, open_model


def stop_tokens(source: ModelSource, tokenizer: Any, tails: Iterable[list[int]]) -> list[int]:
    """Return the tokens that end an answer: EOS, those of generation_config.json, and the chat template's end of turn.

    ``tails``: what training puts after the text of answers. An end of turn counts only if it is a token of its own
    kind, such as ``<|im_end|>``, not ordinary text.
    """
    ends = {tokenizer.eos_token_id} - {None}
    if source.folder is not None and (source.folder / "generation_config.json").is_file():
        ends |= end_tokens(source.folder, source.hf_config)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(ends | ({tail[0] for tail in tails if tail} & special))


def refuse_reward_model(model: Model, path: str) -> None:
    """Raise ``UserError`` if the model of ``model.path`` predicts no tokens."""
    remedy = "it is a reward model, without an unembedding; choose a language model"
    require(model.config.scores == 0, "model.path", path, remedy)


def with_tail(tokens: list[int], ended: bool, tail: list[int]) -> list[int]:
    """Return an answer's tokens up to the one where a reward model was trained to score it.

    Chat templates may write something after the end of a turn, such as a newline, which is then the last token.
    """
    is_turn = ended and tokens[-1:] == tail[:1]
    return tokens + tail[1:] * is_turn


def open_reward_model(
    config: RewardModelConfig, policy: ModelConfig, platform: str, tokenizer: Any, chat_template: str | None
) -> OpenModel:
    """Find the reward model of ``reward.path``, to be computed as the policy is; ``tokenizer`` is the policy's.

    Raises:
        UserError: it is a language model, or has another tokenizer or chat template than the policy.
    """
    assert config.path is not None
    option = f"{config.section}.path"
    model = replace(policy, path=config.path, revision=config.revision, checkpoint=config.checkpoint, tokenizer=None)
    try:
        reward = open_model(model, platform)
        remedy = "it is a language model, without a score; train a reward model with dpo-jax reward"
        require(reward.model.config.scores == 1, "model.path", config.path, remedy)
    except UserError as error:
        if not str(error).startswith(("model.path", "model.revision", "model.checkpoint")):
            raise
        raise UserError(f"{config.section}.{str(error).removeprefix('model.')}") from error
    try:
        other_tokenizer = reward.tokenizer(chat_template)
    except UserError as error:
        remedy = "fix the tokenizer in its directory, or choose another reward model"
        raise UserError(f"{option}: {config.path}: its tokenizer cannot be loaded: {error}; {remedy}") from error
    if tokenizer_hash(other_tokenizer) != tokenizer_hash(tokenizer):
        is_template = other_tokenizer.chat_template != tokenizer.chat_template
        difference, remedy = "tokenizer", "use a reward model of the same family"
        if is_template:
            difference, remedy = "chat template", "name a file as data.chat_template for both"
        raise UserError(option, config.path, f"its {difference} is not that of {policy.path}; {remedy}")
    return reward
