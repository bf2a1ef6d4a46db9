"""Reward models on disk, for tests of what scores answers."""

from dataclasses import replace
from pathlib import Path

import jax

from dpo_jax.config import MeshConfig
from dpo_jax.models.heads import reward_hf_config
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.weights.huggingface import export_params
from dpo_jax.weights.open import OpenModel


def save_reward_model(policy: OpenModel, folder: Path, chat_template: str | None = None) -> None:
    """A reward model with the policy's layers and a random head."""
    model = replace(policy.model, config=replace(policy.model.config, scores=1))
    params = policy.load(make_mesh(MeshConfig(), jax.devices()[:1]))
    params["score"] = jax.random.normal(jax.random.key(0), (1, model.config.hidden))
    params = {name: params[name] for name in model.param_shapes()}
    hf_config, source_dir = reward_hf_config(policy.source.hf_config, 0), policy.source.folder
    export_params(
        params, model, hf_config=hf_config, out_dir=folder, dtype="float32", source_dir=source_dir, overwrite=True
    )
    tokenizer = policy.tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
