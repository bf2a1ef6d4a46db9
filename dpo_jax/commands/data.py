"""What the data of a config holds, before anything is trained on it."""

from collections.abc import Set
from typing import Any

from dpo_jax.config import DPOConfig, SFTConfig
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.methods.setup import sets_of
from dpo_jax.reports.data_audit import audit, render, show_step
from dpo_jax.weights.hub import end_tokens
from dpo_jax.weights.open import find_model, find_tokenizer


def describe_data(config: DPOConfig | SFTConfig, step: int | None) -> str:
    """Counts, findings and an example of the config's data as text; or the examples of ``step``, counted from 1."""
    source = find_model(config.model.path, config.model.revision, config.model.checkpoint, weights=False)
    tokenizer = find_tokenizer(source, config.model, config.data.chat_template)
    if step is not None:
        return show_step(sets_of(config, tokenizer), step, tokenizer)
    positions, ends = source.hf_config.get("max_position_embeddings"), end_tokens(source.folder, source.hf_config)
    return render(audit_config(config, tokenizer, positions, ends))


def audit_config(
    config: DPOConfig | SFTConfig, tokenizer: Any = None, positions: Any = None, ends: Set[int] | None = None
) -> dict[str, Any]:
    """``audit`` of the sets of a config; without ``tokenizer`` the one that the model section names.

    ``positions``: the model's ``max_position_embeddings``; `max_length` beyond it becomes a finding.

    Raises:
        UserError: whatever keeps the tokenizer or a set from being read.
    """
    model, data = config.model, config.data
    tokenizer = tokenizer or load_tokenizer(model.tokenizer or model.path, model.revision, data.chat_template)
    sets = sets_of(config, tokenizer)
    result = audit(sets, tokenizer, ends)
    if isinstance(positions, int) and data.max_length > positions:
        lengths = sets.train.lengths
        longer = int((lengths[:, 0] + lengths[:, 1:].max(1) > positions).sum())
        result["positions"] = {"max_length": data.max_length, "made_for": positions, "longer": longer}
    return result
