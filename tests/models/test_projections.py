"""The table of a layer against what the config names and what the model declares."""

from dataclasses import fields, replace
from pathlib import Path

from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.models.families.docs import family_table
from dpo_jax.models.options import DecoderConfig, ExpertConfig
from dpo_jax.models.projections import LAYER, TENSORS, layer_projections

BIASED = {"model_type": "llama", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True,
          "mlp_bias": True}  # fmt: skip


def test_only_gate_and_up_are_stored_inputs_first():
    assert {name for name, row in LAYER.items() if row.transposed} == {"gate", "up"}
    assert [LAYER[name].inputs + ">" + LAYER[name].outputs for name in ("query", "out", "gate", "down")] == [
        "D>NH", "NH>D", "D>F", "F>D",
    ]  # fmt: skip


def test_each_row_is_a_parameter_with_its_axes_bias_and_tensor():
    axes = Model(config=decoder_config(BIASED)).param_axes()["layers"]
    for name, row in LAYER.items():
        assert row.bias in {field.name for field in fields(DecoderConfig)}
        sizes = {"D": "embed", "F": "ffn", "N": "heads", "K": "kv_heads", "H": "head_dim"}
        assert axes[name] == ("layers", *(sizes[letter] for letter in row.letters[1]))
        assert axes[f"{name}_bias"] == ("layers", *(sizes[letter] for letter in row.outputs))
        assert TENSORS[f"layers/{name}"] == f"model.layers.{{}}.{row.module}.weight"
        assert TENSORS[f"layers/{name}_bias"] == f"model.layers.{{}}.{row.module}.bias"


def test_a_mixture_has_other_rows():
    experts = ExpertConfig(number=4, per_token=2, shared_ffn=6)
    config = replace(decoder_config(BIASED | {"mlp_bias": False}), experts=experts)
    axes = Model(config=config).param_axes()["layers"]
    assert axes["gate"] == axes["up"] == ("layers", "experts", "expert_embed", "ffn")
    assert axes["down"] == ("layers", "experts", "ffn", "expert_embed")
    assert axes["router"] == ("layers", "routes", "embed")
    assert axes["shared_down"] == ("layers", "embed", "shared_ffn")
    rows = layer_projections(config)
    assert [name for name, row in rows.items() if not row.adaptable] == ["router"]


def test_the_table_of_families_is_written_as_the_code_has_it():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert family_table() in page, "write it again: python -m dpo_jax.models.families.docs"
