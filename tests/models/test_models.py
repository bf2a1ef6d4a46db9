"""The decoder against `transformers` on torch, and against itself in every layout of the program."""

import copy
import json
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from dpo_jax.batch import PreferenceBatch
from dpo_jax.config import MeshConfig, ModelConfig
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.errors import UserError
from dpo_jax.inference.generate import generate, rollout_weights
from dpo_jax.models.decoder import Model, count_params, make_model, plain_batch
from dpo_jax.models.families import decoder_config, refuse_positions
from dpo_jax.models.options import LayerKind, LinearScaling, Llama3Scaling, Rope
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.weights.hub import read_hf_config
from dpo_jax.weights.huggingface import load_params
from dpo_jax.weights.known import builtin_model

VOCAB, LENGTH = 128, 40
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4}
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3.2_tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear_rope": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "head_dim": 24}
    ),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mistral_no_window": ("Mistral", {"sliding_window": None, "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}  # fmt: skip


def hf_model(name: str) -> transformers.PreTrainedModel:
    """A random model whose every parameter, biases and norms too, matters."""
    import torch

    kind, options = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in key else 0.0))
    return model


def some_tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length), dtype=np.int32)


def plain(tokens: np.ndarray) -> PreferenceBatch:
    return plain_batch(jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1]))


def logits(model: Model, params, tokens: np.ndarray) -> np.ndarray:
    compute = jax.jit(lambda params, rows: model.hidden(params, rows) @ model.unembedding(params).T)
    return np.asarray(compute(params, plain(tokens)))


def hf_logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@pytest.fixture(scope="module")
def tiny() -> tuple[Model, dict]:
    """A model with every option that changes the layer, and parameters that all matter."""
    config = decoder_config(SIZES | {"model_type": "qwen3", "head_dim": 24, "attention_bias": True})
    model = Model(config=config, attention="xla")
    generator = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(generator.normal(0, 0.15, leaf.shape).astype(np.float32))  # noqa: E731
    params = jax.tree.map(draw, model.param_shapes())
    norms = lambda path, leaf: leaf + 1 if "norm" in path[-1].key else leaf  # noqa: E731
    return model, jax.tree_util.tree_map_with_path(norms, params)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    model = Model(config=decoder_config(read_hf_config(tmp_path)), attention="xla")
    params = load_params(tmp_path, model, shardings=None, dtype="float32")
    tokens = some_tokens()
    want = hf_logits(theirs, tokens)
    assert np.abs(want).max() > 3  # or the tolerance would say little
    np.testing.assert_allclose(logits(model, params, tokens), want, atol=1e-4, rtol=0)
    assert count_params(model) == sum(p.numel() for p in theirs.parameters())


def test_trained_model_scores_and_continues_as_in_transformers(shared, torch):
    folder = shared / "models" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = Model(config=decoder_config(read_hf_config(folder)), attention="xla")
    params = load_params(folder, model, shardings=None, dtype="float32")
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    tokens = np.array([tokenizer(text).input_ids], np.int32)
    np.testing.assert_allclose(logits(model, params, tokens), hf_logits(theirs, tokens), atol=1e-4, rtol=0)

    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "Tom had a big red ball. One day")]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    options = SamplingConfig(temperature=0, max_tokens=30)
    answers = generate(model, rollout_weights(model, params, mesh), prompts, options, mesh, end_ids=[1])
    for prompt, answer in zip(prompts, answers, strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :]
        assert answer.tokens == want.tolist()


def shared_row(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> PreferenceBatch:
    """Two copies of [prompt][chosen][rejected], and two tokens of padding."""
    p, c, r = len(prompt), len(chosen), len(rejected)
    tokens = np.concatenate([prompt, chosen, rejected] * 2 + [[0, 0]])[None].astype(np.int32)
    unit = [*range(p + c), *range(p, p + r)]
    return plain(tokens).replace(
        positions=jnp.array([unit * 2 + [0, 0]]),
        segments=jnp.array([[1] * len(unit) + [2] * len(unit) + [0, 0]]),
        branches=jnp.array([([0] * p + [1] * c + [2] * r) * 2 + [0, 0]]),
    )


@pytest.mark.parametrize("window", [None, 6])
def test_an_answer_is_scored_in_a_shared_row_as_alone(tiny, window):
    model, params = tiny
    model = replace(model, config=replace(model.config, pattern=(LayerKind(window=window),)))
    hidden = jax.jit(model.hidden)
    prompt, chosen, rejected = np.split(some_tokens(1, 25)[0], [11, 18])
    row = np.asarray(hidden(params, shared_row(prompt, chosen, rejected)))[0]
    for start, answer in ((11, chosen), (18, rejected), (25 + 18, rejected)):
        alone = np.asarray(hidden(params, plain(np.concatenate([prompt, answer])[None])))[0]
        np.testing.assert_allclose(row[start : start + len(answer)], alone[11:], atol=2e-6 * np.abs(alone).max())


def loss_and_gradient(model: Model, params):
    def loss(params):
        scores = model.hidden(params, plain(some_tokens())) @ model.unembedding(params).T
        return jax.nn.logsumexp(scores.astype(jnp.float32), axis=-1).mean()

    return jax.value_and_grad(loss)(params)


def distance(tree, other) -> float:
    """Norm of the difference, relative to the other's norm."""
    norm = lambda tree: np.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree)))  # noqa: E731
    return norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y), tree, other)) / norm(other)


@pytest.mark.slow
def test_scan_and_remat_change_only_what_is_recomputed(tiny):
    model, params = tiny
    compiled = {
        (scan, remat): jax.jit(partial(loss_and_gradient, replace(model, scan=scan, remat=remat)))
        .lower(params)
        .compile()
        for scan, remat in [(True, "none"), (True, "dots"), (True, "full"), (False, "none")]
    }
    want, want_gradient = compiled[True, "none"](params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want_gradient))
    for options, step in compiled.items():
        got, gradient = step(params)
        np.testing.assert_allclose(got, want, rtol=2e-6)
        assert distance(gradient, want_gradient) < 2e-6, options
    # dots: attention's own products are computed again; full: all of them. And the compiler does not undo it.
    flops = {options: step.cost_analysis()["flops"] for options, step in compiled.items()}
    assert flops[True, "none"] < flops[True, "dots"] < flops[True, "full"]


def test_bfloat16_computes_in_it_and_keeps_parameters_float32(tiny):
    model, params = tiny
    half = replace(model, dtype="bfloat16")
    hidden = jax.jit(half.hidden)(params, plain(some_tokens()))
    assert hidden.dtype == jnp.bfloat16
    assert distance(hidden, jax.jit(model.hidden)(params, plain(some_tokens()))) < 0.03
    _, gradient = jax.jit(partial(loss_and_gradient, half))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    stored = replace(model, param_dtype="bfloat16").param_shapes()
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


def test_matmul_precision_reaches_every_product_forward_and_backward(tiny):
    model, params = tiny

    def precisions(setting):
        model_ = replace(model, matmul_precision=setting)
        loss = lambda params: model_.hidden(params, plain(some_tokens())).sum()  # noqa: E731
        lines = jax.jit(jax.grad(loss)).lower(params).as_text().splitlines()
        products = [line for line in lines if "stablehlo.dot_general" in line]
        return len(products), sum("precision = [HIGHEST, HIGHEST]" in line for line in products)

    assert precisions("highest")[0] == precisions("highest")[1] > 20
    assert precisions("default")[1] == 0


def test_axes_and_shapes_describe_the_parameters(tiny):
    for kind, options in FAMILIES.values():
        config = decoder_config(getattr(transformers, f"{kind}Config")(**(SIZES | options)).to_dict())
        model = Model(config=config)
        params = jax.eval_shape(model.init, jax.random.key(0))
        assert params == model.param_shapes()
        sizes = {"layers": config.layers, "vocab": config.vocab, "embed": config.hidden, "heads": config.heads,
                 "kv_heads": config.kv_heads, "head_dim": config.head_dim, "ffn": config.ffn}  # fmt: skip
        shapes = jax.tree.map(
            lambda axes, sizes=sizes: tuple(sizes[axis] for axis in axes), model.param_axes(),
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )  # fmt: skip
        assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)


def test_init_is_of_the_key_and_the_configs_deviation():
    config = decoder_config(builtin_model("builtin:tiny") | {"initializer_range": 0.05})
    init = jax.jit(Model(config=config).init)
    first, again, other = (init(jax.random.key(seed)) for seed in (7, 7, 8))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), first, again)))
    assert not np.array_equal(first["embed"], other["embed"])
    assert float(first["layers"]["gate"].std()) == pytest.approx(0.05, rel=0.02)
    assert not np.array_equal(first["layers"]["gate"][0], first["layers"]["gate"][1])
    assert (first["final_norm"] == 1).all()


@pytest.mark.parametrize(("name", "count"), [("llama3-8b", 8_030_261_248), ("qwen3-1.7b", 1_720_574_976)])
def test_known_models_have_their_parameter_counts(shared, name, count):
    hf = json.loads((shared / "model_configs" / f"{name}.json").read_text())
    assert count_params(Model(config=decoder_config(hf))) == count


def test_auto_options_are_settled():
    model = make_model(decoder_config(builtin_model("builtin:tiny")), ModelConfig(path="unused"), "cpu")
    assert (model.dtype, model.attention) == ("float32", "blocks")
    assert hash(model) == hash(replace(model))


LLAMA = {**SIZES, "model_type": "llama"}


def only_rope(hf: dict) -> Rope:
    """The rotary options of a model whose layers are all alike."""
    (kind,) = decoder_config(hf).pattern
    assert kind.rope is not None
    return kind.rope


def test_the_longest_defined_sequence_is_that_of_rope_scaling_or_learned_positions():
    limits = lambda hf: decoder_config(hf).max_positions  # noqa: E731
    assert limits(LLAMA) is None
    assert limits(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}) == 256
    assert limits(GPT2_SIZES | {"model_type": "gpt2", "n_positions": 48}) == 48
    longrope = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi3 = SIZES | {"model_type": "phi3", "rope_scaling": longrope}
    assert limits(phi3 | {"original_max_position_embeddings": 64}) == 64
    assert limits(phi3) == 4096
    config = decoder_config(GPT2_SIZES | {"model_type": "gpt2", "n_positions": 48})
    refuse_positions(config, 48, "data.max_length", 48)
    with pytest.raises(UserError, match=r"data\.max_length: 49 cannot be used: .* for up to 48 tokens"):
        refuse_positions(config, 49, "data.max_length", 49)


def test_both_spellings_of_rotary_options_are_read():
    old = {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}}
    want = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    for options in (old, {"rope_parameters": LLAMA3_ROPE}):
        config = decoder_config(LLAMA | options)
        assert config.pattern == (LayerKind(rope=Rope(theta=500.0, scaling=want)),)
    oldest = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert only_rope(LLAMA | oldest) == Rope(theta=10000.0, scaling=LinearScaling(factor=2.0))
    assert only_rope(LLAMA) == Rope(theta=10000.0)


REFUSED = [
    ("llama", "model_type", "mamba2", "llama, mistral, qwen2, qwen3"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "no such option"),
    ("gpt2", "reorder_and_upcast_attn", True, "no such option"),
    ("gpt2", "add_cross_attention", True, "no such option"),
    ("gpt2", "hidden_size", 64, "no such option"),  # there it is n_embd
    ("gpt2", "n_positions", None, "positive number"),
    ("gpt2", "n_embd", "64", "positive number"),
    ("gpt_neox", "hidden_act", "relu", "silu, gelu, gelu_pytorch_tanh"),
    ("gpt_neox", "rotary_pct", 0.2, "an even number must rotate"),
    ("gpt_neox", "rotary_pct", 2, "at most 1"),
    ("gpt_neox", "rope_theta", 500.0, "no such option"),  # there it is rotary_emb_base
    ("gpt_neox", "use_parallel_residual", None, "true or false"),
    ("phi", "qk_layernorm", True, "no such option"),
    ("phi3", "rope_scaling", {"type": "su", "short_factor": 1.0, "long_factor": [1.0]}, "a list of positive numbers"),
    ("phi3", "rope_scaling", {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}, "pair of the 16 dims"),
    ("starcoder2", "use_bias", "no", "true or false"),
    ("cohere2", "use_qk_norm", True, "no such option"),
    ("cohere2", "layer_types", ["full_attention"], "2 names (num_hidden_layers)"),
    ("cohere2", "logit_scale", 0, "positive number"),
    ("glm4", "mlp_bias", True, "no such option"),
    ("stablelm", "qk_layernorm", True, "no such option"),
    ("stablelm", "rms_norm_eps", 1e-6, "no such option"),  # there it is layer_norm_eps
    ("stablelm", "num_key_value_heads", None, "positive number"),
    ("stablelm", "use_parallel_residual", None, "true or false"),
    ("stablelm", "partial_rotary_factor", 0.2, "an even number must rotate"),
    ("gemma3", "text_config", None, "gemma3_text"),
    ("gemma3", "text_config", {"model_type": "llama"}, "gemma3_text"),
    ("llama", "architectures", ["LlamaForTokenClassification"], "LlamaForCausalLM"),
    ("llama", "quantization_config", {"bits": 4}, "no such option"),
    ("llama", "partial_rotary_factor", 0.5, "no such option"),
    ("llama", "final_logit_softcapping", 30.0, "no such option"),
    ("llama", "sliding_window", 8, "no such option"),
    ("llama", "auto_map", {"AutoModelForCausalLM": "m.M"}, "no such option"),
    ("llama", "hidden_act", "relu2", "silu"),
    ("llama", "hidden_size", "64", "positive number"),
    ("llama", "num_hidden_layers", None, "positive number"),
    ("llama", "num_key_value_heads", 3, "must divide num_attention_heads, 4"),
    ("llama", "head_dim", 15, "even"),
    ("llama", "attention_bias", "yes", "true or false"),
    ("llama", "rope_scaling", {"rope_type": "longrope", "factor": 4.0}, "short_factor"),
    ("llama", "rope_scaling", {"rope_type": "dynamic"}, "positive number"),
    ("llama", "rope_scaling", {"rope_type": "proportional", "factor": 4.0}, "default, linear, llama3"),
    ("llama", "rope_parameters", LLAMA3_ROPE | {"partial_rotary_factor": 0.5}, "no such option"),
    ("llama", "rope_parameters", LLAMA3_ROPE | {"high_freq_factor": 1.0}, "exceed"),
    ("mistral", "layer_types", ["sliding_attention", "full_attention"], "no such option"),
    ("qwen2", "layer_types", ["sliding_attention", "full_attention"], "needs use_sliding_window"),
    ("qwen3", "mlp_bias", True, "no such option"),
    # mixtures of experts
    ("mixtral", "router_jitter_noise", 0.1, "set it to 0"),
    ("mixtral", "num_experts_per_tok", 9, "at most the number of experts, 8"),
    ("mixtral", "hidden_act", "gelu", "silu"),
    ("mixtral", "router_aux_loss_coef", -1, "positive number"),
    ("qwen3_moe", "decoder_sparse_step", 2, "all layers must have experts"),
    ("qwen3_moe", "mlp_only_layers", [0], "all layers must have experts"),
    ("qwen3_moe", "norm_topk_prob", None, "true or false"),
    ("qwen2_moe", "shared_expert_intermediate_size", 0, "positive number"),
    ("olmoe", "clip_qkv", 8.0, "no such option"),
    ("gpt_oss", "quantization_config", {"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)"),
    ("gpt_oss", "experts_per_token", 3, "it must equal num_experts_per_tok, 4"),
    ("gpt_oss", "swiglu_limit", None, "positive number"),
    # values that are empty, and change the computation
    ("llama", "is_causal", False, "no such option"),
    ("llama", "partial_rotary_factor", 0, "no such option"),
    ("llama", "original_max_position_embeddings", 0, "no such option"),
    ("llama", "rope_theta", 0, "positive number"),
    ("llama", "rope_theta", None, "positive number"),
    ("llama", "rope_scaling", [], "dictionary"),
    ("llama", "rope_parameters", LLAMA3_ROPE | {"partial_rotary_factor": False}, "no such option"),
    ("mistral", "sliding_window", 0, "positive number"),
    ("mistral", "num_key_value_heads", None, "positive number"),
    ("qwen2", "head_dim", None, "positive number"),
    ("qwen3", "head_dim", None, "positive number"),
    ("qwen2", "max_window_layers", None, "an integer"),
    ("qwen2", "layer_types", [], "2 names (num_hidden_layers)"),
    # values of odd types and sizes
    ("llama", "model_type", ["llama"], "llama, mistral, qwen2, qwen3"),
    ("llama", "hidden_act", ["silu"], "silu"),
    ("llama", "rope_scaling", {"rope_type": ["linear"], "factor": 2.0}, "default, linear, llama3"),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": {}}, "positive number"),
    ("llama", "rms_norm_eps", float("nan"), "positive number"),
    ("llama", "rms_norm_eps", float("inf"), "positive number"),
    ("llama", "rope_theta", 10**400, "positive number"),
    ("llama", "vocab_size", 10**400, "positive number"),
    ("llama", "vocab_size", -1, "positive number"),
    ("llama", "vocab_size", True, "positive number"),
    ("llama", "num_hidden_layers", 2e9, "positive number"),
    ("llama", "num_attention_heads", 4.0, "an integer"),
    ("llama", "max_position_embeddings", "256", "positive number"),
    ("llama", "something", "x" * 100_000, "no such option"),
    ("qwen2", "layer_types", 3, "2 names (num_hidden_layers)"),
    ("qwen2", "layer_types", [["full_attention"], {}], "choose from full_attention"),
    ("qwen2", "use_sliding_window", 1, "true or false"),
    ("phi3", "rope_scaling", {"type": ["su"], "short_factor": [1.0]}, "choose the rope scaling"),
    ("starcoder2", "norm_type", "rms", "it must be layer_norm"),
    ("gemma", "hidden_activation", "silu", "it must be gelu_pytorch_tanh, as hidden_act"),
]


@pytest.mark.parametrize(("model_type", "key", "value", "why"), REFUSED)
def test_what_the_decoder_does_not_compute_is_refused_by_name(model_type, key, value, why):
    with pytest.raises(UserError) as error:
        decoder_config((GPT2_SIZES if model_type == "gpt2" else SIZES) | {"model_type": model_type} | {key: value})
    assert all(part in str(error.value) for part in (key, why))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


LINEAR = {"rope_type": "linear", "factor": 2.0}
ROPES = [
    {},
    {"rope_theta": 5e5},
    {"rope_scaling": LINEAR},
    {"rope_scaling": LINEAR, "rope_theta": 5e5},
    {"rope_scaling": LINEAR | {"rope_theta": 100.0}, "rope_theta": 5e5},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": LINEAR | {"rope_theta": 100.0}, "rope_theta": 5e5},
    {"rope_parameters": LINEAR, "rope_scaling": None},
    {"rope_parameters": LINEAR, "rope_scaling": {}},
    {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
]


@pytest.mark.parametrize("options", ROPES, ids=str)
def test_rotary_options_are_those_that_transformers_reads(options):
    expected = transformers.LlamaConfig(**copy.deepcopy(LLAMA | options)).rope_parameters
    actual = only_rope(LLAMA | options)
    assert actual.theta == expected["rope_theta"]
    kinds = {type(None): "default", LinearScaling: "linear", Llama3Scaling: "llama3"}
    assert kinds[type(actual.scaling)] == expected["rope_type"]
    if actual.scaling is not None:
        assert all(expected[name] == value for name, value in asdict(actual.scaling).items())


@pytest.mark.parametrize("new", [
    {"rope_type": "default"},  # transformers reads the linear one
    LINEAR | {"factor": 4.0},
    LINEAR | {"rope_theta": 5e5},  # and forgets this base
], ids=str)  # fmt: skip
def test_two_rotary_options_that_disagree_are_refused(new):
    with pytest.raises(UserError, match="differs"):
        decoder_config(LLAMA | {"rope_scaling": LINEAR, "rope_parameters": new})


@pytest.mark.parametrize(("kind", "options"), [
    ("Llama", {"num_key_value_heads": None, "head_dim": None}),
    ("Mistral", {"head_dim": None, "sliding_window": None}),
    ("Qwen2", {"num_key_value_heads": None, "use_sliding_window": True, "sliding_window": None}),
    ("Qwen3", {"num_key_value_heads": None, "max_window_layers": 0}),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
], ids=str)  # fmt: skip
def test_sizes_and_windows_are_those_that_transformers_reads(kind, options):
    hf = SIZES | options
    expected = getattr(transformers, f"{kind}Config")(**hf)
    actual = decoder_config(hf | {"model_type": kind.lower()})
    assert actual.kv_heads == expected.num_key_value_heads
    assert actual.head_dim == getattr(expected, "head_dim", SIZES["hidden_size"] // SIZES["num_attention_heads"])
    assert set(actual.windows) == {getattr(expected, "sliding_window", None)}


@pytest.mark.parametrize(("options", "windows"), [
    ({"max_window_layers": 1}, (None, 8)),
    ({"max_window_layers": 2}, (None, None)),
    ({"max_window_layers": 0}, (8, 8)),
    ({"max_window_layers": 0, "use_sliding_window": False}, (None, None)),
    ({"layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
], ids=str)  # fmt: skip
def test_windows_of_layers_are_read(options, windows):
    qwen2 = SIZES | {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
    assert decoder_config(qwen2 | options).windows == windows


GEMMA3_TEXT = {"model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
               "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024,
               "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), [
    ({**SIZES, "model_type": "starcoder2", "mlp_type": "default", "norm_type": "layer_norm", "rms_norm_eps": 1e-3,
      "norm_epsilon": 1e-5}, {"norm_eps": 1e-5}),
    ({**SIZES, "model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
     {"activation": "gelu_pytorch_tanh"}),
    ({"model_type": "gemma3", "text_config": GEMMA3_TEXT, "vision_config": {}}, {"vocab": 262_208}),
], ids=["starcoder2", "gemma", "gemma3"])  # fmt: skip
def test_keys_of_published_files_are_read(options, expected):
    config = decoder_config(options)
    assert {field: getattr(config, field) for field in expected} == expected


def test_harmless_keys_pass():
    harmless = {"attention_dropout": 0.1, "_commit": "x", "partial_rotary_factor": 1.0, "quantization_config": None}
    assert decoder_config(LLAMA | harmless) == decoder_config(LLAMA)


def test_an_unknown_builtin_model_is_refused():
    with pytest.raises(UserError, match="builtin:tiny"):
        builtin_model("builtin:huge")
