"""The names of parameters here and in Hugging Face models."""

# Parameter -> tensor of the file. Biases are named after their matrix.
TENSORS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/query": "model.layers.{}.self_attn.q_proj.weight",
    "layers/query_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers/key": "model.layers.{}.self_attn.k_proj.weight",
    "layers/key_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/key_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers/value": "model.layers.{}.self_attn.v_proj.weight",
    "layers/value_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/out": "model.layers.{}.self_attn.o_proj.weight",
    "layers/out_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers/ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/gate_bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/up_bias": "model.layers.{}.mlp.up_proj.bias",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
    "layers/down_bias": "model.layers.{}.mlp.down_proj.bias",
}
# Parameters whose matrices lie the other way round in the files; see decoder.py.
TURNED = {"layers/gate", "layers/up"}
# q_proj -> query
PROJECTIONS = {
    name.split(".")[-2]: leaf.removeprefix("layers/") for leaf, name in TENSORS.items() if name.endswith("_proj.weight")
}
