"""Audit the data of a config before training on it."""

from dpo_jax.config import AnyConfig
from dpo_jax.methods.setup import sets_of
from dpo_jax.models.families import context_length
from dpo_jax.reports.data_audit import audit, render, show_step
from dpo_jax.weights.hub import end_tokens
from dpo_jax.weights.open import open_model


def describe_data(config: AnyConfig, step: int | None) -> str:
    """Return the audit of all data sets as text, or the examples of step ``step``, counted from 1.

    Raises:
        UserError: the model, its tokenizer or a set cannot be read, or the run has no such step.
    """
    opened = open_model(config.model, "cpu", weights=False)
    source, tokenizer = opened.source, opened.tokenizer(config.data.chat_template)
    sets = sets_of(config, tokenizer)
    if step is not None:
        return show_step(sets, step, tokenizer)
    max_positions, end_ids = context_length(source.hf_config), end_tokens(source.folder, source.hf_config)
    limits = {"max_length": config.data.max_length, "max_positions": max_positions}
    return render(audit(sets, tokenizer, ends=end_ids, num_sampled=config.planned.num_tokens, **limits))
