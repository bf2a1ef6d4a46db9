"""One call from what a user names to a model, its tokenizer and its weights."""

import jax
import numpy as np
import pytest

from dpo_jax.config import LoraConfig, MeshConfig, ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.models.adapters import make_lora
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.weights.known import builtin_model
from dpo_jax.weights.open import open_model


def test_an_opened_model_has_its_options_adapters_and_weights():
    lora = LoraConfig(rank=2)
    opened = open_model(ModelConfig(path="builtin:tiny", remat="dots"), "cpu", lora)
    decoder = decoder_config(builtin_model("builtin:tiny"))
    adapters = make_lora(lora, decoder)
    assert opened.model == Model(config=decoder, remat="dots", attention="blocks", lora=adapters)
    expected = jax.jit(opened.model.init)(jax.random.key(0))
    actual = opened.load(make_mesh(MeshConfig(), jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    with pytest.raises(UserError, match=r"model\.tokenizer: builtin:tiny has no tokenizer"):
        opened.tokenizer()


def test_what_is_not_asked_for_is_not_made():
    opened = open_model(ModelConfig(path="builtin:tiny", attention="cudnn"), "cpu")
    assert opened.source.hf_config == builtin_model("builtin:tiny")
    with pytest.raises(UserError, match="cudnn runs on GPUs"):
        _ = opened.model
