"""Mixtures of experts against all experts for all tokens, and against `transformers`; what they cost and hold."""

import math
import re
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.balance import balance_loss
from dpo_jax.config import MeshConfig
from dpo_jax.ops import experts as experts_module
from dpo_jax.ops import grouped
from dpo_jax.ops.experts import (
    SPECS,
    ExpertLinear,
    ExpertWeights,
    Glu,
    Router,
    Routing,
    balance_sums,
    feed_forward,
    route,
)
from dpo_jax.parallel.sharding import EMBED, ROWS, make_mesh
from dpo_jax.plan.hlo import collectives

ROW_COUNT, LENGTH, HIDDEN, FEATURES, EXPERTS, TOP_K = 8, 12, 16, 24, 16, 3
GPT_OSS = Glu(alpha=1.702, offset=1.0, limit=0.7)  # a limit that bites
CASES = {"silu": (Glu(), ()), "biases and adapters": (GPT_OSS, ("bias", "a", "b"))}
RANK, SCALE = 5, 0.7  # of adapters
MESHES = {
    "expert 4, tensor 2": MeshConfig(expert=4, tensor=2),
    "expert 8": MeshConfig(expert=8),
    "fsdp 2, expert 4": MeshConfig(expert=4),
    "data 2, fsdp 2, expert 2": MeshConfig(data=2, expert=2),
    "fsdp 2, expert 2, tensor 2": MeshConfig(expert=2, tensor=2),
}


def normal(seed, *shape, scale=1.0):
    return np.random.Generator(np.random.Philox(seed)).normal(0, scale, shape).astype(np.float32)


def device_normal(seed, *shape, scale=1.0):
    return jnp.asarray(normal(seed, *shape, scale=scale))


def random_experts(optional=(), num_experts=EXPERTS, hidden=HIDDEN, features=FEATURES) -> ExpertWeights:
    def linear(seed, inputs, outputs):
        shapes = {"matrix": (inputs, outputs), "bias": (outputs,), "a": (RANK, inputs), "b": (outputs, RANK)}
        names = ("matrix", *optional)
        return ExpertLinear(**{name: normal(seed + i, num_experts, *shapes[name], scale=0.3)
                               for i, name in enumerate(names)})  # fmt: skip

    up = linear(20, hidden, features)._replace(a=None)  # that of the gate
    return ExpertWeights(linear(10, hidden, features), up, linear(30, features, hidden))


def uneven_routing() -> tuple[np.ndarray, np.ndarray]:
    """ExpertWeights and weights: every token chose 1, most 2 and 3, none 0, 4 or the last; two rows end in padding."""
    draw = np.random.Generator(np.random.Philox(3))
    others = [expert for expert in range(EXPERTS) if expert not in (0, 1, 4, EXPERTS - 1)]
    chosen = [[1, *draw.permutation(others)[: TOP_K - 1]] for _ in range(ROW_COUNT * LENGTH)]
    experts = np.array(chosen, np.int32).reshape(ROW_COUNT, LENGTH, TOP_K)
    experts[:6] = [1, 3, 2]
    weights = draw.uniform(0.1, 1, experts.shape).astype(np.float32)
    experts[2, 5:], weights[2, 5:] = EXPERTS, 0
    experts[7], weights[7] = EXPERTS, 0
    return experts, weights


def all_experts(x, indices, weights, experts, glu):
    """Every expert for every token, in x's dtype, weighted by 0 where it was not chosen."""

    def linear(x, layer, a):
        matrix = layer.matrix if a is None else layer.matrix + SCALE * (layer.b @ a).T
        y = x @ matrix.astype(x.dtype)
        return y if layer.bias is None else y + layer.bias.astype(x.dtype)

    def expert(layers):
        hidden = glu(linear(x, layers.gate, layers.gate.a), linear(x, layers.up, layers.gate.a))
        return linear(hidden.astype(x.dtype), layers.down, layers.down.a)

    share = jnp.where(indices[..., None] == jnp.arange(len(experts.gate.matrix)), weights[..., None], 0).sum(-2)
    return jnp.einsum("ertd,rte->rtd", jax.vmap(expert)(experts), share)


def sorted_experts(x, indices, weights, experts, glu):
    return feed_forward(x, Routing(indices, weights, jnp.zeros(())), experts, glu, SCALE)


def computed(fn, case, dtype=np.float32):
    """The output, and the gradients of a random weighting of it with respect to x, weights and experts."""
    glu, optional = CASES[case]
    indices, weights = uneven_routing()
    x, weighting = (normal(seed, ROW_COUNT, LENGTH, HIDDEN) for seed in (1, 2))

    def weighted(x, weights, experts):
        out = fn(x, indices, weights, experts, glu)
        return (out.astype(jnp.float32) * weighting).sum(), out

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(x.astype(dtype), weights, random_experts(optional))
    return jax.device_get((out, grads))


expected = cache(partial(computed, all_experts))


def assert_equal(actual, expected):
    for (path, array), other in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(array, other, atol=3e-6 * scale, err_msg=jax.tree_util.keystr(path))
        assert scale > 0.1


@pytest.mark.parametrize("case", CASES)
def test_sorted_rows_are_all_experts_masked(case):
    actual = computed(sorted_experts, case)
    assert_equal(actual, expected(case))
    out, (x_grad, _, experts_grad) = actual
    for array in (out, x_grad):
        assert not array[2, 5:].any()
        assert not array[7].any()
    for array in jax.tree.leaves(experts_grad):
        is_idle = np.isin(np.arange(EXPERTS), (0, 4, EXPERTS - 1))
        assert not array[is_idle].any()


def test_kernels_are_all_experts_masked(monkeypatch):
    monkeypatch.setattr(experts_module, "_on_platform", lambda fn, *arrays: fn("kernels", *arrays))
    assert_equal(computed(sorted_experts, "biases and adapters"), expected("biases and adapters"))


@pytest.mark.parametrize(
    ("mesh", "implementation"),
    [
        ("expert 4, tensor 2", "blocks"),
        *(pytest.param(mesh, "blocks", marks=pytest.mark.slow) for mesh in list(MESHES)[1:]),
        *(pytest.param(mesh, "kernels", marks=pytest.mark.slow) for mesh in MESHES),
    ],
)
def test_experts_may_be_sharded(mesh, implementation, monkeypatch):
    """Most tokens want the same shard: with 4 shards, it visits both windows of its rows, of 192 each."""
    assert (uneven_routing()[0] < EXPERTS // 4).sum() > 192
    monkeypatch.setattr(experts_module, "_on_platform", lambda fn, *arrays: fn(implementation, *arrays))
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        assert_equal(computed(sorted_experts, "biases and adapters"), expected("biases and adapters"))


def test_bfloat16_is_as_close_as_all_experts():
    """With float32 weights, whose gradient is not rounded to bfloat16."""
    exact, _ = expected("silu")
    errors = []
    for fn in (sorted_experts, all_experts):
        out, grads = computed(fn, "silu", jnp.bfloat16)
        assert grads[2].gate.matrix.dtype == np.float32
        errors.append(np.abs(np.asarray(out, np.float64) - exact).mean())
    assert errors[0] < 1.1 * errors[1]


# Rows


def block_groups(sizes, per_token=2):
    """Groups of experts with these numbers of rows, in a random order; the slots that remain have no expert."""
    slots = np.repeat(np.arange(len(sizes) + 1, dtype=np.int32), [*sizes, per_token + -sum(sizes) % per_token])
    slots = np.random.Generator(np.random.Philox(5)).permutation(slots).reshape(-1, per_token)
    return slots, jax.device_get(jax.jit(grouped.make_groups, static_argnums=(1, 2))(slots, len(sizes), "blocks"))


@pytest.mark.parametrize("sizes", [(0, 300, 1, 0, 64, 33), (0, 0, 0), (5,), (40,) * 50])
def test_blocks_in_use_follow_the_closed_form(sizes):
    slots, groups = block_groups(sizes)
    block = groups.block
    assert groups.num_blocks == sum(math.ceil(size / block) for size in sizes)
    assert len(groups.slots) <= slots.size + len(sizes) * (block - 1)
    used = groups.slots[groups.is_used]
    assert np.array_equal(np.sort(used), np.flatnonzero(slots.reshape(-1) < len(sizes)))  # each slot once, none dropped
    assert np.array_equal(slots.reshape(-1)[used], np.sort(slots[slots < len(sizes)]))
    assert np.array_equal(groups.slots[groups.rows[groups.is_routed]], np.flatnonzero(groups.is_routed))


def test_compiled_operations_are_those_of_the_blocks(monkeypatch):
    """XLA counts a loop's body once: here the loop is unrolled."""

    def unrolled(start, stop, visit, carry):
        for i in range(int(start), int(stop)):
            carry = visit(i, carry)
        return carry

    _, groups = block_groups((0, 90, 1, 17, 64, 33))
    num_rows = len(groups.slots)
    x, g, matrices = device_normal(0, num_rows, 32), device_normal(1, num_rows, 48), device_normal(2, 6, 32, 48)
    monkeypatch.setattr(jax.lax, "fori_loop", unrolled)
    forward, backward = ((lambda x, w, t=t: grouped.PRODUCTS["blocks"](x, w, groups, t, None)) for t in (False, True))
    outer = lambda x, g: grouped.OUTER_PRODUCTS["blocks"](x, g, groups, None)  # noqa: E731
    for program, arrays in ((forward, (x, matrices)), (backward, (g, matrices)), (outer, (x, g))):
        count = jax.jit(program).lower(*arrays).compile().cost_analysis()["flops"]
        assert count == pytest.approx(2 * int(groups.num_blocks) * groups.block * 32 * 48, rel=0.05)


def mixture_structs(
    mesh=None, *, num_experts=16, top_k=2, rows=4, length=256, hidden=64, features=96, dtype=jnp.float32
):
    """Arguments of `mixture_loss` as shapes, and `tokens x experts x width`."""

    def struct(shape, dtype, spec):
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    linear = lambda spec, *shape: ExpertLinear(struct((num_experts, *shape), jnp.float32, spec["matrix"]))  # noqa: E731
    experts = ExpertWeights(
        linear(SPECS["gate"], hidden, features),
        linear(SPECS["up"], hidden, features),
        linear(SPECS["down"], features, hidden),
    )
    x = struct((rows, length, hidden), dtype, PartitionSpec(ROWS))
    router = struct((num_experts, hidden), jnp.float32, PartitionSpec(None, EMBED))
    return x, router, experts


def mixture_loss(x, router, experts, top_k=2):
    mask = jnp.ones(x.shape[:2], bool)
    routing = route(x, router, None, mask, Router(top_k))
    loss = balance_loss(balance_sums(routing, mask.astype(jnp.int32)))
    return loss + (feed_forward(x, routing, experts).astype(jnp.float32) ** 2).sum()


def compile_gradient(arguments, mesh=None):
    gradient = jax.jit(jax.grad(mixture_loss, argnums=(0, 1, 2)))
    if mesh is None:
        return gradient.lower(*arguments).compile().as_text()
    with jax.set_mesh(mesh):
        return gradient.lower(*arguments).compile().as_text()


def array_sizes(text):
    """Elements of every array of more than one dim in a program; a fusion's inner arrays are counted, too."""
    return {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\d*\[(\d+,[\d,]+)\]", text)}


def test_cpu_program_holds_no_array_of_tokens_by_experts_by_width(optimized):
    x, router, experts = mixture_structs()
    tokens, slots, num_experts = 4 * 256, 4 * 256 * 2, 16
    block = grouped.block_size(slots, num_experts)
    assert max(array_sizes(compile_gradient((x, router, experts)))) <= (slots + num_experts * (block - 1)) * 96
    assert (slots + num_experts * (block - 1)) * 96 < tokens * num_experts * 64


def check_sharded(text, mesh, *, tokens, experts, hidden, features, window):
    """What is gathered are tokens, the router and, along fsdp, the matrices of a device's own experts, in bfloat16.

    The largest array is a window or a shard.
    """
    gathered = [op for op in collectives(text, mesh.size) if op.kind in ("all-gather", "all-to-all")]
    shard = experts // mesh.shape["expert"]
    matrix_bytes = shard * hidden * features * 2
    num_matrices = [op.num_bytes for op in gathered].count(matrix_bytes)
    assert num_matrices >= 3 if mesh.shape["fsdp"] > 1 else num_matrices == 0
    assert max(op.num_bytes for op in gathered) <= max(tokens * hidden * 4, matrix_bytes * (num_matrices > 0))
    largest = max(window * max(hidden, features), shard * hidden * features, tokens * hidden)
    assert max(array_sizes(text)) <= largest < tokens * shard * features / 2


@pytest.mark.slow
def test_frozen_experts_with_adapters_have_no_gradient(optimized):
    """A step of adapters reads a device's matrices and makes nothing of their shape."""
    mesh = make_mesh(MeshConfig(expert=8))
    struct = lambda spec, *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))  # noqa: E731
    x, router, experts = mixture_structs(mesh, rows=8, num_experts=16, hidden=80, features=96, length=32)
    a, b = struct(SPECS["down"]["a"], 16, 4, 96), struct(SPECS["down"]["b"], 16, 80, 4)

    def loss(a, b, x, router, experts):
        return mixture_loss(x, router, experts._replace(down=experts.down._replace(a=a, b=b)))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(a, b, x, router, experts).compile().as_text()
    made = re.findall(r"= f32\[2,(?:80,96|96,80)\]\S* (\S+?)\(", text)
    assert set(made) <= {"parameter", "get-tuple-element"}
    assert made


def test_no_expert_is_gathered(optimized):
    mesh = make_mesh(MeshConfig(expert=8))
    text = compile_gradient(mixture_structs(mesh, rows=8, num_experts=64, length=32), mesh)
    window = 2 * (8 * 32 * 2 // 8) + 64  # twice a balanced routing, and padding of blocks: of any routing, 512 rows
    check_sharded(text, mesh, tokens=8 * 32, experts=64, hidden=64, features=96, window=window)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "expert"), [("v5e:2x2", 4), ("v5p:2x2x1", 2), ("v6e:2x2", 4)])
def test_tpu_program_has_kernels_and_gathers_no_other_expert(topology, expert, for_tpus):
    mesh = make_mesh(MeshConfig(expert=expert), for_tpus(topology))
    arguments = mixture_structs(mesh, num_experts=32, hidden=128, features=128, length=128, dtype=jnp.bfloat16)
    text = compile_gradient(arguments, mesh)
    # three products forward, two of them again backward (of a single window, those are merged with the first), three
    # gradients of rows and three of matrices
    num_recomputed = 2 if expert > 2 else 0
    assert len(re.findall(r"= .*custom_call_target=\"tpu_custom_call\"", text)) >= 3 + num_recomputed + 3 + 3
    check_sharded(text, mesh, tokens=4 * 128, experts=32, hidden=128, features=128, window=2 * 4 * 128 * 2 // expert)


@pytest.mark.slow
def test_twice_the_experts_cost_little(optimized):
    """At the same number of experts per token, in the processor time of this process: others may keep it waiting."""

    def seconds(num_experts):
        x = normal(0, 4, 512, 256)
        experts = random_experts(num_experts=num_experts, hidden=256, features=384)
        run = jax.jit(jax.grad(mixture_loss, argnums=(0, 1, 2)))
        router = normal(1, num_experts, 256, scale=0.1)

        def once():
            start = time.process_time()
            jax.block_until_ready(run(x, router, experts))
            return time.process_time() - start

        once()
        return min(once() for _ in range(6))

    assert seconds(16) < 1.3 * seconds(8)


# Routing, the loss and the blocks of transformers


def test_equal_logits_go_to_the_first_expert_and_padding_to_none():
    x = device_normal(0, 2, 3, 4)
    mask = np.array([[True, True, False], [False, True, True]])
    routing = route(x, jnp.zeros((5, 4)), None, mask, Router(2))
    assert np.array_equal(routing.experts[mask], [[0, 1]] * 4)
    assert (routing.experts[~mask] == 5).all()
    assert not routing.weights[~mask].any()
    np.testing.assert_allclose(routing.weights[mask], 0.2)


def test_gradient_of_routing_is_that_of_the_whole_softmax():
    """Against log-probs of all experts, masked; the chosen ones are constants."""
    x, matrix, bias = device_normal(0, 2, 3, 4), device_normal(1, 5, 4), device_normal(2, 5)
    mask, weighting = np.ones((2, 3), bool), device_normal(3, 2, 3, 2)

    def routed(matrix, router):
        return (route(x, matrix, bias, mask, router).weights * weighting).sum()

    def masked(matrix, router):
        logits = jnp.einsum("rtd,ed->rte", x, matrix, precision="highest") + bias
        chosen = route(x, matrix, bias, mask, router).experts[..., None] == jnp.arange(5)
        probs = jax.nn.softmax(jnp.where(chosen.any(-2), logits, -jnp.inf) if router.softmax == "chosen" else logits)
        if router.renormalize:
            probs /= jnp.where(chosen.any(-2), probs, 0).sum(-1, keepdims=True)
        return (jnp.where(chosen, probs[..., None, :], 0).sum(-1) * weighting).sum()

    for router in (Router(2), Router(2, renormalize=True), Router(2, softmax="chosen")):
        actual, wanted = (jax.jit(jax.grad(fn), static_argnums=1)(matrix, router) for fn in (routed, masked))
        np.testing.assert_allclose(actual, wanted, atol=1e-6)
        assert np.abs(wanted).max() > 0.01


def test_balance_loss_is_that_of_transformers(torch):
    """Two layers together, padding masked; sums of rows, added, are the sums of all."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    mask = np.random.Generator(np.random.Philox(1)).random((4, 10)) > 0.3
    x, matrices = device_normal(2, 4, 10, 8), [device_normal(seed, 6, 8) for seed in (3, 4)]
    logits = tuple(torch.tensor(np.asarray(x.reshape(40, 8) @ matrix.T)) for matrix in matrices)
    expected = load_balancing_loss_func(logits, 6, 2, torch.tensor(mask))

    @partial(jax.jit, static_argnums=0)
    def sums(rows):
        layers = [
            balance_sums(route(x[np.array(rows)], m, None, mask[rows], Router(2)), mask[rows].astype(int))
            for m in matrices
        ]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)

    np.testing.assert_allclose(balance_loss(sums(range(4))), expected.item(), rtol=1e-6)
    halves = jax.tree.map(jnp.add, sums(range(2)), sums(range(2, 4)))
    np.testing.assert_allclose(balance_loss(halves), expected.item(), rtol=1e-6)


def test_a_shared_token_counts_once_per_answer():
    x, matrix = device_normal(0, 1, 6, 8), device_normal(1, 5, 8)
    weights = np.array([[2, 2, 1, 0, 1, 3]])
    repeated = jnp.repeat(x, weights[0], axis=1)

    def loss(matrix, x, weights):
        return balance_loss(balance_sums(route(x, matrix, None, weights > 0, Router(2)), weights))

    run = jax.jit(jax.value_and_grad(loss))
    actual, expected = run(matrix, x, weights), run(matrix, repeated, np.ones(repeated.shape[:2], int))
    for array, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-7)
    assert np.abs(expected[1]).max() > 0.01


HF_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_experts_per_tok": 3}
HF_BLOCKS = {  # module, class, config, router, activation
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", {"num_local_experts": 6}, Router(3, renormalize=True), Glu()),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeSparseMoeBlock",
                  {"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": True},
                  Router(3, renormalize=True), Glu()),
    "qwen3_moe_plain": ("qwen3_moe", "Qwen3MoeSparseMoeBlock",
                        {"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": False}, Router(3), Glu()),
    "gpt_oss": ("gpt_oss", "GptOssMLP", {"num_local_experts": 6}, Router(3, softmax="chosen"),
                Glu(alpha=1.702, offset=1.0, limit=7.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", HF_BLOCKS)
def test_block_is_that_of_transformers(name, torch):
    family, block, options, router, glu = HF_BLOCKS[name]
    module = getattr(transformers.models, family)
    config_name = next(key for key in dir(module) if key.endswith("Config"))
    block = getattr(getattr(module, f"modeling_{family}"), block)(getattr(module, config_name)(**HF_SIZES, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = normal(0, 2, 9, 16, scale=2.0)
    inputs = torch.tensor(x, requires_grad=True)
    out = block(inputs)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.tensor(normal(1, *x.shape))).sum().backward()

    array = lambda parameter: parameter.detach().numpy()  # noqa: E731
    gate_up, down = array(block.experts.gate_up_proj), array(block.experts.down_proj)
    if family == "gpt_oss":  # inputs first, gate and up interleaved
        biases = array(block.experts.gate_up_proj_bias)
        layers = [ExpertLinear(gate_up[..., i::2], biases[..., i::2]) for i in (0, 1)]
        experts = ExpertWeights(*layers, ExpertLinear(down, array(block.experts.down_proj_bias)))
        matrix, bias = array(block.router.weight), jnp.asarray(array(block.router.bias))
    else:
        gate, up = np.split(gate_up.swapaxes(1, 2), 2, axis=-1)
        experts = ExpertWeights(ExpertLinear(gate), ExpertLinear(up), ExpertLinear(down.swapaxes(1, 2)))
        matrix, bias = array(block.gate.weight), None

    def weighted(x, matrix):
        routing = route(x, matrix, bias, np.ones(x.shape[:2], bool), router)
        actual = feed_forward(x, routing, experts, glu)
        return (actual * device_normal(1, *x.shape)).sum(), actual

    (_, actual), grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(x, matrix)
    router_weight = block.router.weight if family == "gpt_oss" else block.gate.weight
    wanted = (array(out), inputs.grad.numpy(), router_weight.grad.numpy())
    for array_, other in zip((actual, *grads), wanted, strict=True):
        np.testing.assert_allclose(array_, other, atol=5e-6 * np.abs(other).max())
