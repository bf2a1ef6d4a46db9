"""Reward head: one score per answer, read at the hidden state of its last token.

Shape letters as in batch.py; S scores of a reward model (1).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dpo_jax.batch import Adapted, PairLogps, Params, PreferenceBatch
from dpo_jax.errors import UserError
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import FAMILIES


def answer_ends(batch: PreferenceBatch) -> Int[Array, "R A"]:
    """Return each answer slot's last token, as an index in its row; 0 for an unused slot.

    This does not follow from the targets: a one-token answer's only target has its source at the end of the prompt.
    """
    slots = jnp.cumsum(batch.answer_begins(), axis=1) - 1
    slots = jnp.where(batch.branches > 0, slots, batch.answers_per_row)  # else dropped
    rows, indices = jnp.indices(slots.shape)
    ends = jnp.zeros((len(slots), batch.answers_per_row), jnp.int32)
    return ends.at[rows, slots].max(indices, mode="drop")


def without_unembedding(weights: Params) -> Params:
    """Return a language model's weights without its unembedding, for a model with a head."""
    return {name: weight for name, weight in weights.items() if name not in ("unembed", "unembed_bias")}


def make_scores_fn(model: Model) -> Callable[[Params | Adapted, PreferenceBatch], PairLogps]:
    """Make a `LogpsFn` whose ``sum`` is the reward model's score of each answer, so that ``train_step`` trains it.

    The score is computed in float32, as the loss depends on differences of scores of similar size.
    """

    def scores_fn(weights: Params | Adapted, batch: PreferenceBatch) -> PairLogps:
        hidden = model.hidden(weights, batch)
        states = jnp.take_along_axis(hidden, answer_ends(batch)[..., None], axis=1).astype(jnp.float32)
        score = model.head(weights).astype(jnp.float32)
        scores = jnp.einsum("RAD,SD->RAS", states, score, precision=jax.lax.Precision.HIGHEST)[..., 0]
        rows = jnp.arange(len(scores))[:, None]
        counts = jnp.zeros_like(scores).at[rows, batch.target_answers].add(batch.target_mask)
        scores, counts = batch.gather_pairs(scores), batch.gather_pairs(counts)
        return PairLogps(scores, counts, batch.weight, batch.valid, margin=batch.margin, scored=True)

    return scores_fn


def reward_hf_config(hf_config: Mapping[str, Any], pad_id: int) -> dict[str, Any]:
    """Return the ``config.json`` of a reward model with the given language model's decoder.

    ``pad_id``: transformers reads the score at the last token that is not padding, so no answer may end with it.

    Raises:
        UserError: transformers has no reward models of this family.
    """
    model_type = hf_config["model_type"]
    family = FAMILIES[model_type]
    if family.reward_architecture is None:
        remedy = "transformers has no class for reward models of this type; choose a model of another type"
        raise UserError("config.json: model_type", model_type, remedy)
    changes = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": pad_id}
    if family.wraps is not None:
        changes[family.wraps] = {**hf_config[family.wraps], "pad_token_id": pad_id}
    return {**hf_config, "architectures": [family.reward_architecture], **changes}
