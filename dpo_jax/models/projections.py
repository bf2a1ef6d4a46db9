"""The table of a layer: what its matrices multiply, and where they lie in Hugging Face files.

One row a matrix. Parameters, biases, adapters, LoRA targets, names in files, axes for the mesh, operation counts and
memory bounds all follow from it.
"""

from typing import NamedTuple

# Letter of an einsum (see layers.py) -> logical axis of a parameter, which parallel/sharding.py maps to the mesh.
AXES = {"V": "vocab", "D": "embed", "N": "heads", "K": "kv_heads", "H": "head_dim", "F": "ffn", "r": "rank"}


class Projection(NamedTuple):
    """A matrix that every layer has, and its bias."""

    name: str  # parameter of the layer; that of the bias is NAME_bias
    spec: str  # "x,matrix->y" as `jnp.einsum` takes it: the order of the letters is that of the parameter's dims
    module: str  # of a layer in the files, with tensors MODULE.weight and MODULE.bias
    bias: str  # the option of `DecoderConfig` that says whether there is one

    @property
    def letters(self) -> tuple[str, str, str]:
        """Letters of x, of the matrix and of y."""
        x, matrix, y = self.spec.replace("->", ",").split(",")
        return x, matrix, y

    @property
    def inputs(self) -> str:
        """Letters of the matrix over which the product sums."""
        _, matrix, y = self.letters
        return "".join(letter for letter in matrix if letter not in y)

    @property
    def outputs(self) -> str:
        """Letters of the matrix that the result has; the bias has these."""
        _, matrix, y = self.letters
        return "".join(letter for letter in matrix if letter in y)

    @property
    def turned(self) -> bool:
        """Whether the matrix lies inputs first; in the files outputs are first always."""
        return self.letters[1].startswith(self.inputs)

    @property
    def target(self) -> str:
        """What `config.LoraConfig` calls it, as PEFT does."""
        return self.module.rpartition(".")[2]


# In the order of the computation.
LAYER = {row.name: row for row in (
    Projection("query", "RTD,NHD->RTNH", "self_attn.q_proj", "qkv_bias"),
    Projection("key", "RTD,KHD->RTKH", "self_attn.k_proj", "qkv_bias"),
    Projection("value", "RTD,KHD->RTKH", "self_attn.v_proj", "qkv_bias"),
    Projection("out", "RTNH,DNH->RTD", "self_attn.o_proj", "out_bias"),
    Projection("gate", "RTD,DF->RTF", "mlp.gate_proj", "mlp_bias"),
    Projection("up", "RTD,DF->RTF", "mlp.up_proj", "mlp_bias"),
    Projection("down", "RTF,DF->RTD", "mlp.down_proj", "mlp_bias"),
)}  # fmt: skip
BY_TARGET = {row.target: row for row in LAYER.values()}

_OF_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    **{row.name: f"{row.module}.weight" for row in LAYER.values()},
    **{f"{row.name}_bias": f"{row.module}.bias" for row in LAYER.values()},
}
# Parameter -> tensor of the file; {} is the layer.
TENSORS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
    **{f"layers/{name}": f"model.layers.{{}}.{tensor}" for name, tensor in _OF_LAYER.items()},
}
TURNED = {f"layers/{row.name}" for row in LAYER.values() if row.turned}
