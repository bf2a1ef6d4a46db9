"""Kernels on unshared rows equal the dense oracle on CPU, on meshes too; and compile for real TPUs, ahead of time."""

import os
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from small import Pair, logps_fn, pack, random_pairs, small_model, small_params

from dpo_jax.batch import PreferenceBatch
from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.config import LossConfig, MeshConfig
from dpo_jax.errors import UserError
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.ops import attention
from dpo_jax.ops.attention import attend, choose, make_inputs
from dpo_jax.ops.kernels import splash_sizes
from dpo_jax.ops.unpack import share, unshare
from dpo_jax.parallel.sharding import make_mesh, platform_of, replicated, row_sharding
from dpo_jax.step import init_state, train_step

os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")

GEMMA2 = {
    "model_type": "gemma2", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 1024, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def uneven_pairs(count: int = 9, seed: int = 3) -> list[Pair]:
    """Lengths spread as those of dialogues are: most short, some long, answers shorter than prompts."""
    draw = np.random.Generator(np.random.Philox(seed))
    ids = lambda n: np.ones(n, np.int32)  # noqa: E731
    lengths = np.maximum(draw.lognormal([4.3, 3.3, 3.3], 0.8, (count, 3)), 1).astype(int)
    return [(ids(prompt), (ids(chosen), ids(rejected)), None) for prompt, chosen, rejected in lengths]


def one_answer(batch: PreferenceBatch) -> PreferenceBatch:
    """The same tokens as fine-tuning has them, one answer a prompt: in layout `repeated` every unit has but one."""
    branches, slots = np.minimum(batch.branches, 1), batch.answer_slots[:, :1]
    return replace(batch, branches=branches, answer_slots=slots, branch_length=batch.tokens.shape[1])


BATCHES = {
    "random": lambda: pack(random_pairs(5), rows=2),
    "uneven": lambda: pack(uneven_pairs(), rows=2),
    "repeated": lambda: pack(random_pairs(4), rows=2, layout="repeated"),
    "one answer": lambda: one_answer(pack(random_pairs(2), rows=6, layout="repeated")),
}
CASES = {  # batch, query heads, key heads, head, options
    "grouped, head 64": ("uneven", 4, 2, 64, {}),
    "head 128, soft cap, window of a block": ("random", 2, 2, 128, {"softcap": 2.0, "window": 128}),
    "one key head, a unit an answer, window": ("repeated", 4, 1, 24, {"window": 23}),
    "one answer, empty rows": ("one answer", 2, 1, 8, {}),
}


@cache
def case(name):
    """Batch, inputs, a weighting of the output, and options."""
    batch, num_heads, num_kv_heads, head, options = CASES[name]
    batch = BATCHES[batch]()
    draw = np.random.Generator(np.random.Philox(1))
    make = lambda n: draw.normal(0, 1, (*batch.tokens.shape, n, head)).astype(np.float32)  # noqa: E731
    inputs = make(num_heads), make(num_kv_heads), make(num_kv_heads)
    return batch, inputs, make(num_heads), {"scale": head**-0.5, **options}


def computed(name, implementation):
    """Attention and the gradients of a random weighting of it, padding's included."""
    batch, inputs, weighting, options = case(name)

    @jax.jit
    def run(q, k, v, batch):
        inputs = make_inputs(batch, implementation)
        fn = partial(attend, inputs=inputs, implementation=implementation, longest=batch.longest, **options)
        out, pull = jax.vjp(fn, q, k, v)
        return out, *pull(jnp.asarray(weighting))

    return jax.device_get(run(*inputs, batch))


expected = cache(partial(computed, implementation="xla"))


def assert_equal(found, wanted):
    """The output within 2e-6, its gradients within 1e-5."""
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 if place == 0 else 1e-5, err_msg=f"result {place}")
        assert np.abs(theirs).max() > 0.1


@cache
def with_sinks(implementation):
    """Attention with a sink of each head, and its gradients, those of the sinks last."""
    batch, inputs, weighting, options = case("grouped, head 64")
    sinks = np.random.Generator(np.random.Philox(2)).normal(2, 1, inputs[0].shape[2]).astype(np.float32)

    @jax.jit
    def run(q, k, v, sinks, batch):
        def fn(q, k, v, sinks):
            prepared = make_inputs(batch, implementation, q.shape[-1])
            options_here = {"implementation": implementation, "longest": batch.longest, **options}
            return attend(q, k, v, prepared, sinks=sinks, **options_here)

        out, pull = jax.vjp(fn, q, k, v, sinks)
        return out, *pull(jnp.asarray(weighting))

    return jax.device_get(run(*inputs, sinks, batch))


@pytest.mark.parametrize("implementation", ["blocks", "splash"])
def test_sinks_are_those_of_the_dense_softmax(implementation):
    found, wanted = with_sinks(implementation), with_sinks("xla")
    assert np.abs(wanted[0] - expected("grouped, head 64")[0]).max() > 0.1
    *others, sinks = found
    assert_equal(others, wanted[:-1])
    np.testing.assert_allclose(sinks, wanted[-1], rtol=1e-5, atol=1e-5)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """The layout and the call of `cudnn`, in the implementation that JAX has of that call on a CPU."""
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "cudnn", partial(attention.IMPLEMENTATIONS["cudnn"], implementation="xla")
    )


@pytest.mark.parametrize("name", CASES)
def test_splash_is_the_rule(name):
    assert_equal(computed(name, "splash"), expected(name))


@pytest.mark.parametrize("name", [name for name, (*_, options) in CASES.items() if "softcap" not in options])
def test_cudnn_layout_is_the_rule(name, cudnn_by_xla):
    assert_equal(computed(name, "cudnn"), expected(name))


def test_cudnn_has_no_soft_cap():
    gpu = {"platform": "gpu", "dtype": "bfloat16", "head_dim": 128, "softcap": 30.0}
    assert choose("auto", **gpu) == "blocks"
    with pytest.raises(UserError, match="cannot soft-cap"):
        choose("cudnn", **gpu)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_gathers_are_the_transposes_of_what_they_pull_back(name):
    """<unshare x, g> = <x, unshare^T g> where g is 0 in padding; the same of share, which undoes it."""
    batch = BATCHES["uneven"]()
    draw = np.random.Generator(np.random.Philox(2))
    x = jnp.asarray(draw.normal(size=(*batch.tokens.shape, 1, 2)), jnp.float32)

    @jax.jit
    def run(x, batch):
        to = make_inputs(batch, name).unpacked
        y, pull = jax.vjp(lambda x: unshare(x, to), x)
        g = jnp.where(to.segments.reshape(*y.shape[:2], 1, 1) > 0, y**3, 0)
        z, pull_back = jax.vjp(lambda y: share(y, to), g)
        return ((y * g).sum(), (x * pull(g)[0]).sum()), ((z * x).sum(), (g * pull_back(x)[0]).sum()), share(y, to)

    (*pairs, back) = run(x, batch)
    for one, other in pairs:
        assert abs(one) > 10
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_array_equal(back, jnp.where(batch.segments[..., None, None] > 0, x, 0))


@pytest.mark.parametrize("implementation", ["splash", "cudnn", "blocks"])
def test_a_mesh_changes_nothing(implementation, cudnn_by_xla):
    """Two devices of rows by two of heads, which share one key head."""
    name = "one key head, a unit an answer, window"
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = computed(name, implementation)
    assert_equal(found, expected(name))


def test_key_heads_are_repeated_just_enough():
    """Six query and two key heads over three devices: each has two query heads and two key heads of six."""
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=3), jax.devices()[:3])
    batch = BATCHES["random"]()
    draw = np.random.Generator(np.random.Philox(1))
    q, k, v = (jnp.asarray(draw.normal(size=(*batch.tokens.shape, n, 8)), jnp.float32) for n in (6, 2, 2))
    seen, dense = [], partial(attention.IMPLEMENTATIONS["xla"], longest=batch.longest, scale=1.0, window=None)

    def watched(q, k, v, inputs):
        seen.append((q.shape[2], k.shape[2]))
        return dense(q, k, v, inputs, softcap=None)

    inputs = make_inputs(batch, "xla")
    wanted = jax.jit(watched)(q, k, v, inputs)
    with jax.set_mesh(mesh):
        found = jax.jit(partial(attention.on_each_device, watched))(q, k, v, inputs)
    assert seen == [(6, 2), (2, 2)]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def one_step(model, mesh=None):
    """Weights and loss after a step of gradient descent."""
    optimizer = optax.sgd(1.0)

    def step(params, reference, batch):
        state = init_state(params, optimizer)
        options = {"logps_fn": logps_fn(model), "loss": LossConfig(beta=0.3), "optimizer": optimizer}
        state, metrics = train_step(state, reference, batch, **options)
        return state.params, metrics["loss"]

    inputs = small_params(0), small_params(1), pack(random_pairs(4), rows=2)
    if mesh is None:
        return jax.device_get(jax.jit(step)(*inputs))
    with jax.set_mesh(mesh):
        place = make_to_devices(mesh)
        return jax.device_get(jax.jit(step)(*inputs[:2], place(inputs[2])))


@pytest.mark.slow
@pytest.mark.parametrize("on_mesh", [True, False], ids=["mesh", "one device"])
def test_a_step_with_splash_is_the_step(on_mesh):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]) if on_mesh else None
    params, value = one_step(small_model(attention="splash", remat="full"), mesh)
    params_0, value_0 = one_step(small_model(attention="xla"))
    assert abs(value - value_0) <= 2e-5
    moved = jax.tree.map(np.subtract, params_0, jax.device_get(small_params(0)))
    change = optax.tree.norm(jax.tree.map(np.subtract, params, params_0)) / optax.tree.norm(moved)
    assert float(change) <= 2e-5


def grids(jaxpr) -> set[tuple[int, ...]]:
    """Grids of all kernels in a program."""
    own = {tuple(eqn.params["grid_mapping"].grid) for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"}
    return own.union(*(grids(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)))


def test_splash_visits_only_the_band():
    """Two blocks of keys a block of queries, however many pairs a row holds; without the bound it would be all ten."""
    batch = pack([pair for seed in range(8) for pair in random_pairs(8, seed)])
    assert (batch.longest, batch.branch_length) == (192, 5120)
    q = jnp.zeros((*batch.tokens.shape, 2, 8))
    options = {"inputs": make_inputs(batch, "splash"), "implementation": "splash", "scale": 1.0}
    seen = lambda **more: grids(jax.make_jaxpr(lambda q: attend(q, q, q, **options, **more))(q).jaxpr)  # noqa: E731
    assert seen(longest=batch.longest) == {(2, 10, 2)}
    assert seen(longest=1100) == {(2, 10, 4)}
    assert seen(longest=1100, window=100) == {(2, 10, 2)}


def test_blocks_are_few_and_waste_little():
    for longest in (64, 2048):
        for length in range(longest, 20000, 64):
            block, whole = splash_sizes(length, longest)
            assert block % 128 == 0
            assert block <= 512 * (1 + (longest == 2048))
            assert whole % block == 0
            assert length <= whole < length + 128 * (whole // block)
            assert splash_sizes(whole, longest) == (block, whole)
    assert splash_sizes(4096, 4096) == (1024, 4096)
    assert splash_sizes(4096, 700) == (512, 4096)
    assert splash_sizes(1088, 1088) == (384, 1152)
    assert splash_sizes(4096, 4096, head_dim=256) == (512, 4096)


def test_auto_follows_the_devices():
    auto = partial(choose, "auto", head_dim=128)
    assert auto(platform="tpu", dtype="bfloat16") == auto(platform="tpu", dtype="float32") == "splash"
    assert auto(platform="gpu", dtype="bfloat16") == "cudnn"
    assert auto(platform="gpu", dtype="float32") == auto(platform="cpu", dtype="bfloat16") == "blocks"
    assert choose("auto", platform="gpu", dtype="bfloat16", head_dim=256) == "blocks"
    assert choose("xla", platform="tpu", dtype="bfloat16", head_dim=128) == "xla"


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "said"),
    [
        ("cudnn", "gpu", "float32", "bfloat16"),
        ("cudnn", "cpu", "bfloat16", "cudnn runs on GPUs, but the devices are cpu"),
        ("splash", "gpu", "bfloat16", "splash runs on TPUs, but the devices are gpu"),
    ],
)
def test_kernels_are_refused_where_they_do_not_run(asked, platform, dtype, said):
    with pytest.raises(UserError, match=said):
        choose(asked, platform=platform, dtype=dtype, head_dim=128)


def test_a_plain_batch_is_refused_where_it_says_too_little():
    batch = BATCHES["random"]()
    with pytest.raises(ValueError, match="no block pairs"):
        make_inputs(replace(batch, blocks=batch.blocks[:, :0]), "blocks")
    with pytest.raises(ValueError, match="no answer slots"):
        make_inputs(replace(batch, answers_per_row=0), "cudnn")


def layer_of(batch, implementation):
    """Attention of one layer and its gradients, as a function of q, k, v and the batch."""

    def run(q, k, v, batch):
        inputs = make_inputs(batch, implementation)
        options = {"implementation": implementation, "longest": batch.longest, "scale": 0.1}
        out, pull = jax.vjp(partial(attend, inputs=inputs, **options), q, k, v)
        return out, pull(out)

    return jax.jit(run)


def llama_inputs(batch, mesh=None):
    """Shapes of Llama-3-8B's attention over two rows of 4096 tokens."""
    rows, whole = (None, None) if mesh is None else (row_sharding(mesh), replicated(mesh))
    shape = jax.ShapeDtypeStruct
    qkv = (shape((2, 4096, n, 128), jnp.bfloat16, sharding=rows) for n in (32, 8, 8))
    places = {name: shape((2, 4096), jnp.int32, sharding=rows) for name in ("segments", "branches", "positions")}
    others = jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=whole), batch)
    return *qkv, others.replace(**places, longest=1024, branch_length=3072)


def test_the_platform_compiled_for_decides():
    """On a CPU: interpreted for a CPU, three Mosaic kernels (forward, two backward) for a TPU."""
    batch = BATCHES["random"]()
    traced = layer_of(batch, "splash").trace(*llama_inputs(batch))
    kernels = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")  # noqa: E731
    assert kernels("tpu") == 3
    assert kernels("cpu") == 0


@pytest.mark.slow
@pytest.mark.parametrize("chips", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_splash_compiles_for_tpu(chips, for_tpus):
    """At most 800 MiB with arguments and results (256); were all sequences at once in the kernel, it would be 880."""
    batch = BATCHES["random"]()
    mesh = make_mesh(MeshConfig(), for_tpus(chips)[:1])
    with jax.set_mesh(mesh):
        compiled = layer_of(batch, "splash").lower(*llama_inputs(batch, mesh)).compile()
    assert compiled.memory_analysis().peak_memory_in_bytes < 800 * 2**20
    assert platform_of(mesh) == "tpu"


@pytest.mark.parametrize(
    "chips",
    [
        pytest.param("v6e:2x2", marks=pytest.mark.slow),
        pytest.param("v5e:2x2", marks=pytest.mark.weekly),
        pytest.param("v5p:2x2x1", marks=pytest.mark.weekly),
    ],
)
def test_splash_compiles_capped_and_with_windows_of_two_kinds(chips, for_tpus):
    """The gradient of two layers of Gemma 2, heads of 256, over 4096 tokens a row: a call of each kernel a kind."""
    model = Model(config=decoder_config(GEMMA2), dtype="bfloat16", attention="splash", remat="full")
    mesh = make_mesh(MeshConfig(), for_tpus(chips)[:1])
    *_, batch = llama_inputs(pack(random_pairs(5), rows=2), mesh)
    batch = batch.replace(tokens=batch.segments)
    params = jax.tree.map(lambda x: x.update(sharding=replicated(mesh)), model.param_shapes())
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda params, batch: logps_fn(model, chunk=512)(params, batch).sum.mean()))
        compiled = gradient.lower(params, batch).compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels >= 2 * 4  # of each kind: forward, again for the gradient, and the two of the gradient
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_cudnn_is_called_on_cuda(monkeypatch):
    """The program for CUDA calls cuDNN forward and backward. Its version, asked when traced, is a GPU machine's."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    batch = BATCHES["random"]()
    text = layer_of(batch, "cudnn").trace(*llama_inputs(batch)).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@(__cudnn\S+?)\(", text)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
