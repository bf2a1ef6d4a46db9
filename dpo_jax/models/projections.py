"""Table of a layer's weight matrices: the einsum that applies each, and its tensor name in Hugging Face files.

It has one row per matrix. Parameters, biases, adapters, LoRA targets, tensor names, mesh axes, operation counts and
memory bounds are all derived from it.
"""

from typing import NamedTuple

from dpo_jax.models.options import DecoderConfig

# Letter of an einsum (see layers.py) -> logical axis of a parameter, which parallel/sharding.py maps to the mesh.
AXES = {
    "V": "vocab",
    "D": "embed",
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "F": "ffn",
    "r": "rank",
    "S": "scores",
    "P": "learned_positions",
}


class Projection(NamedTuple):
    """A weight matrix that every layer has, with its optional bias."""

    name: str  # name of the layer's parameter; its bias is NAME_bias
    spec: str  # "x,matrix->y" for `jnp.einsum`; its matrix letters give the order of the parameter's dims
    module: str  # module of a layer in the files, with tensors MODULE.weight and MODULE.bias
    bias: str  # option of `DecoderConfig` that enables the bias

    @property
    def letters(self) -> tuple[str, str, str]:
        """Dim letters of x, of the matrix and of y."""
        x, matrix, y = self.spec.replace("->", ",").split(",")
        return x, matrix, y

    @property
    def inputs(self) -> str:
        """Dim letters of the matrix that the einsum contracts."""
        _, matrix_letters, y_letters = self.letters
        return "".join(letter for letter in matrix_letters if letter not in y_letters)

    @property
    def outputs(self) -> str:
        """Dim letters of the matrix that remain in y; these are the dims of the bias."""
        _, matrix_letters, y_letters = self.letters
        return "".join(letter for letter in matrix_letters if letter in y_letters)

    @property
    def transposed(self) -> bool:
        """Whether the parameter has its input dims first; in Hugging Face files the output dims always come first."""
        return self.letters[1].startswith(self.inputs)


# In order of computation.
LAYER = {row.name: row for row in (
    Projection("query", "RTD,NHD->RTNH", "self_attn.q_proj", "qkv_bias"),
    Projection("key", "RTD,KHD->RTKH", "self_attn.k_proj", "qkv_bias"),
    Projection("value", "RTD,KHD->RTKH", "self_attn.v_proj", "qkv_bias"),
    Projection("out", "RTNH,DNH->RTD", "self_attn.o_proj", "out_bias"),
    Projection("gate", "RTD,DF->RTF", "mlp.gate_proj", "mlp_bias"),
    Projection("up", "RTD,DF->RTF", "mlp.up_proj", "mlp_bias"),
    Projection("down", "RTF,DF->RTD", "mlp.down_proj", "mlp_bias"),
)}  # fmt: skip


def layer_projections(config: DecoderConfig) -> dict[str, Projection]:
    """Return the rows of ``LAYER`` that the layers of this decoder have."""
    return {name: row for name, row in LAYER.items() if name != "gate" or config.gated}


_LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "attention_norm_bias": "input_layernorm.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn_norm_bias": "post_attention_layernorm.bias",
    **{row.name: f"{row.module}.weight" for row in LAYER.values()},
    **{f"{row.name}_bias": f"{row.module}.bias" for row in LAYER.values()},
}
# Parameter -> tensor in the file; {} stands for the layer index.
TENSORS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
    "unembed": "lm_head.weight",
    "unembed_bias": "lm_head.bias",
    "score": "score.weight",
    **{f"layers/{name}": f"model.layers.{{}}.{tensor}" for name, tensor in _LAYER_TENSORS.items()},
}
TRANSPOSED = {f"layers/{row.name}" for row in LAYER.values() if row.transposed}
