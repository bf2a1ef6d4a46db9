"""Tables of a layer's weight matrices: the einsum that applies each, and its tensor name in Hugging Face files.

They have one row per matrix. Parameters, biases, adapters, LoRA targets, tensor names, mesh axes, operation counts and
memory bounds are all derived from it.
"""

from operator import attrgetter
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
    # mixtures of experts: an expert's matrices are sharded by experts, and so not by D; nor is the router's E sharded
    "E": "experts",
    "d": "expert_embed",
    "e": "routes",
    "U": "shared_ffn",
    "u": "single",
    "P": "learned_positions",
}


class Projection(NamedTuple):
    """A weight matrix of a layer, or one for each expert, with its optional bias."""

    name: str  # name of the layer's parameter; its bias is NAME_bias
    spec: str  # "x,matrix->y" for `jnp.einsum`; its matrix letters give the order of the parameter's dims
    module: str  # module of a layer in the files, with tensors MODULE.weight and MODULE.bias
    bias: str | None = None  # option of `DecoderConfig` that enables the bias; None: there is none
    stack: str = ""  # letter of a leading dim of the parameter, which has a matrix for each index; "E": experts
    adaptable: bool = True  # can have an adapter

    @property
    def letters(self) -> tuple[str, str, str]:
        """Dim letters of the einsum's operands x and matrix, and of its result y."""
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
        """Whether the parameter has its input dims first."""
        return self.letters[1].startswith(self.inputs)

    def has_bias(self, config: DecoderConfig) -> bool:
        """Return whether the model has this bias."""
        return self.bias is not None and attrgetter(self.bias)(config)


# In order of computation.
ATTENTION = {row.name: row for row in (
    Projection("query", "RTD,NHD->RTNH", "self_attn.q_proj", "qkv_bias"),
    Projection("key", "RTD,KHD->RTKH", "self_attn.k_proj", "qkv_bias"),
    Projection("value", "RTD,KHD->RTKH", "self_attn.v_proj", "qkv_bias"),
    Projection("out", "RTNH,DNH->RTD", "self_attn.o_proj", "out_bias"),
)}  # fmt: skip
FEED_FORWARD = {row.name: row for row in (
    Projection("gate", "RTD,DF->RTF", "mlp.gate_proj", "mlp_bias"),
    Projection("up", "RTD,DF->RTF", "mlp.up_proj", "mlp_bias"),
    Projection("down", "RTF,DF->RTD", "mlp.down_proj", "mlp_bias"),
)}  # fmt: skip
LAYER = ATTENTION | FEED_FORWARD
# In place of FEED_FORWARD in a mixture of experts; the last four belong to the shared expert.
EXPERTS = {row.name: row for row in (
    Projection("router", "RTD,eD->RTe", "mlp.gate", "experts.router_bias", adaptable=False),
    Projection("gate", "RTd,dF->RTF", "mlp.experts.{}.gate_proj", "mlp_bias", "E"),
    Projection("up", "RTd,dF->RTF", "mlp.experts.{}.up_proj", "mlp_bias", "E"),
    Projection("down", "RTF,Fd->RTd", "mlp.experts.{}.down_proj", "mlp_bias", "E"),
    Projection("shared_router", "RTD,uD->RTu", "mlp.shared_expert_gate"),
    Projection("shared_gate", "RTD,DU->RTU", "mlp.shared_expert.gate_proj"),
    Projection("shared_up", "RTD,DU->RTU", "mlp.shared_expert.up_proj"),
    Projection("shared_down", "RTU,DU->RTD", "mlp.shared_expert.down_proj"),
)}  # fmt: skip
# In transformers a module holds the matrices of all experts of a layer, as these parameters; most files have a tensor
# for each expert instead.
EXPERT_MODULE = "model.layers.{}.mlp.experts"
EXPERT_PARAMETERS = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


def layer_projections(config: DecoderConfig) -> dict[str, Projection]:
    """Return the `Projection` of each matrix in the model's layers, by name, in order of computation."""
    if config.experts is None:
        return {name: row for name, row in LAYER.items() if name != "gate" or config.gated}
    has_shared = config.experts.shared_ffn > 0
    experts = {name: row for name, row in EXPERTS.items() if has_shared or not name.startswith("shared_")}
    return ATTENTION | experts


_LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "attention_norm_bias": "input_layernorm.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
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
