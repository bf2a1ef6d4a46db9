"""Updates against PyTorch or the papers in float64; schedules at chosen steps; what decays; where moments lie."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import small_model

from dpo_jax.config import MeshConfig, OptimizerConfig
from dpo_jax.errors import UserError
from dpo_jax.methods.optimizer import make_optimizer, make_schedule
from dpo_jax.parallel.sharding import make_mesh, replicated
from dpo_jax.step import init_state, state_shardings
from dpo_jax.weights.open import param_shardings

STEPS = 4
DRAW = np.random.Generator(np.random.Philox(0))
START = {"kernel": DRAW.normal(0, 1, (3, 4)), "norm": DRAW.normal(1, 0.1, 4)}
GRADS = [{name: DRAW.normal(0, 0.1, value.shape) for name, value in START.items()} for _ in range(STEPS)]


def updated(config, start=None, grads=None):
    """Parameters after the steps."""
    optimizer = make_optimizer(config, 100)
    wide = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    params = wide(START if start is None else start)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for own in GRADS if grads is None else grads:
        updates, state = step(wide(own), state, params)
        params = optax.apply_updates(params, updates)
    return params


def config(name, **options):
    settled = {"learning_rate": 0.05, "schedule": "constant", "weight_decay": 0.2, "max_grad_norm": None} | options
    return OptimizerConfig(name=name, **settled)


def of_torch(make):
    """The same steps by PyTorch; ``make`` takes the decaying and the other parameters."""
    import torch

    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in START.items()}
    optimizer = make([params["kernel"]], [params["norm"]])
    for grads in GRADS:
        for name, grad in grads.items():
            params[name].grad = torch.tensor(grad)
        optimizer.step()
    return {name: param.detach().numpy() for name, param in params.items()}


def by_equation(step):
    """The same steps by ``step(x, gradient, memory, count, decay) -> x``."""
    params, memory = {name: value.copy() for name, value in START.items()}, {name: {} for name in START}
    for count, grads in enumerate(GRADS, start=1):
        for name, value in params.items():
            decay = 0.2 if name == "kernel" else 0.0
            params[name] = step(value, grads[name], memory[name], count, decay)
    return params


def assert_close(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


# --------------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("options", [{}, {"b1": 0.8, "b2": 0.9, "eps": 1e-3}], ids=str)
def test_adamw_is_that_of_torch(torch, options):
    betas = (options.get("b1", 0.9), options.get("b2", 0.999))
    make = lambda decaying, others: torch.optim.AdamW(  # noqa: E731
        [{"params": decaying, "weight_decay": 0.2}, {"params": others, "weight_decay": 0}],
        lr=0.05, betas=betas, eps=options.get("eps", 1e-8),
    )  # fmt: skip
    assert_close(updated(config("adamw", **options)), of_torch(make))


def test_rmsprop_is_that_of_torch(torch):
    make = lambda decaying, others: torch.optim.RMSprop(decaying + others, lr=0.05)  # noqa: E731
    assert_close(updated(config("rmsprop", weight_decay=0.0)), of_torch(make))


def test_rmsprop_decays_apart_from_the_gradient():
    def step(x, gradient, memory, count, decay):
        memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * gradient**2
        return x - 0.05 * (gradient / (np.sqrt(memory["v"]) + 1e-8) + decay * x)

    assert_close(updated(config("rmsprop")), by_equation(step))


def test_lion_is_its_paper():
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2."""

    def step(x, gradient, memory, count, decay):
        m = memory.get("m", 0)
        memory["m"] = 0.99 * m + 0.01 * gradient
        return x - 0.05 * (np.sign(0.9 * m + 0.1 * gradient) + decay * x)

    assert_close(updated(config("lion")), by_equation(step))


def adafactor(x, gradient, memory, count, decay):
    """Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5; the decay is scaled by the rate alone."""
    mean = lambda name, value: memory.__setitem__(  # noqa: E731
        name, (1 - count**-0.8) * memory.get(name, 0) + count**-0.8 * value
    )
    square = gradient**2 + 1e-30
    if min(gradient.shape[-2:]) >= 128:
        mean("rows", square.mean(-1))
        mean("columns", square.mean(-2))
        v = memory["rows"][:, None] * memory["columns"] / memory["rows"].mean()
    else:
        mean("v", square)
        v = memory["v"]
    update = gradient / np.sqrt(v)
    update /= max(1, np.sqrt((update**2).mean()))
    return x - 0.05 * (update * max(1e-3, np.sqrt((x**2).mean())) + decay * x)


def test_adafactor_is_its_paper():
    assert_close(updated(config("adafactor")), by_equation(adafactor))


def test_adafactor_keeps_rows_and_columns_of_large_matrices():
    x, grads = DRAW.normal(0, 1, (128, 130)), [DRAW.normal(0, 0.1, (128, 130)) for _ in range(2)]
    found = updated(config("adafactor"), {"kernel": x}, [{"kernel": grad} for grad in grads])
    memory: dict = {}
    for count, grad in enumerate(grads, start=1):
        x = adafactor(x, grad, memory, count, 0.2)
    assert_close(found, {"kernel": x})
    state = make_optimizer(config("adafactor"), 1).init({"kernel": jnp.zeros((128, 130))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (128 + 130)


def test_gradients_are_clipped_by_their_global_norm():
    norm = math.sqrt(sum((grad**2).sum() for grad in GRADS[0].values()))
    small = [jax.tree.map(lambda x: x * (0.01 / norm), GRADS[0])]
    plain = {"name": "lion", "weight_decay": 0.0, "schedule": "constant"}
    for name in ("adamw", "rmsprop"):
        own = plain | {"name": name, "eps": 1e-2}  # so that the size of the gradient matters
        clipped = updated(OptimizerConfig(**own, max_grad_norm=0.01, learning_rate=1.0), grads=GRADS[:1])
        assert_close(clipped, updated(OptimizerConfig(**own, max_grad_norm=None, learning_rate=1.0), grads=small))
        free = updated(OptimizerConfig(**own, max_grad_norm=None, learning_rate=1.0), grads=GRADS[:1])
        assert not np.allclose(clipped["kernel"], free["kernel"], rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "rmsprop"])
@pytest.mark.parametrize("mask", ["matrices", "all"])
def test_decay_is_the_rate_times_the_weights_of_matrices(name, mask):
    """Without a gradient only the decay acts; of a real model, norms and biases are left out."""
    shapes = small_model().param_shapes()
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    ones["layers"]["query_bias"] = np.ones((2, 8, 8), np.float32)
    optimizer = make_optimizer(config(name, decay_mask=mask, schedule="linear"), 10)
    state, step, zeros = jax.jit(optimizer.init)(ones), jax.jit(optimizer.update), jax.tree.map(np.zeros_like, ones)
    for rate in (0.05, 0.045):  # it follows the schedule
        updates, state = step(zeros, state, ones)
        for path, update in jax.tree.leaves_with_path(updates):
            leaf = jax.tree_util.keystr(path, simple=True, separator="/")
            matrix = not leaf.endswith(("norm", "bias"))
            expected = -rate * 0.2 if matrix or mask == "all" else 0.0
            np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=leaf)


def test_moments_are_float32_but_the_first_if_told():
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    kinds = lambda options: [  # noqa: E731
        str(leaf.dtype) for leaf in jax.tree.leaves(make_optimizer(options, 1).init(params)) if leaf.ndim
    ]
    assert kinds(config("adamw")) == ["float32", "float32"]
    assert sorted(kinds(config("adamw", moment_dtype="bfloat16"))) == ["bfloat16", "float32"]
    assert kinds(config("lion", moment_dtype="bfloat16")) == ["bfloat16"]
    assert set(kinds(config("rmsprop")) + kinds(config("adafactor"))) == {"float32"}


# -------------------------------------------------------------------------------------------------------- schedules

# (options, {update counted from 0: share of the peak}) in a run of 100 steps
SCHEDULES = [
    ({"schedule": "constant"}, {0: 1, 50: 1, 99: 1}),
    ({"schedule": "constant", "warmup_steps": 10}, {0: 0, 5: 0.5, 10: 1, 99: 1}),
    ({"schedule": "linear"}, {0: 1, 50: 0.5, 99: 0.01, 100: 0}),
    ({"schedule": "linear", "warmup_steps": 20, "final_fraction": 0.1}, {0: 0, 10: 0.5, 20: 1, 60: 0.55, 100: 0.1}),
    ({"schedule": "cosine"}, {0: 1, 50: 0.5, 25: (1 + math.cos(math.pi / 4)) / 2, 100: 0}),
    ({"schedule": "cosine", "warmup_steps": 20, "final_fraction": 0.2}, {0: 0, 19: 0.95, 20: 1, 60: 0.6, 100: 0.2}),
    ({"schedule": "wsd"}, {0: 1, 90: 1, 95: 0.5, 100: 0}),
    ({"schedule": "wsd", "warmup_steps": 10, "decay_steps": 40, "final_fraction": 0.5},
     {0: 0, 5: 0.5, 10: 1, 60: 1, 80: 0.75, 100: 0.5, 200: 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), SCHEDULES, ids=str)
def test_schedules(options, expected):
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **options), 100)
    for step, share in expected.items():
        assert float(schedule(step)) == pytest.approx(2 * share, abs=1e-6), step


def test_the_first_update_is_at_the_rate_of_step_0():
    found = updated(config("lion", warmup_steps=2, weight_decay=0.0), grads=GRADS[:1])
    np.testing.assert_array_equal(found["kernel"], np.float32(START["kernel"]))
    two = updated(config("lion", warmup_steps=2, weight_decay=0.0), grads=GRADS[:2])
    np.testing.assert_allclose(np.abs(two["kernel"] - START["kernel"]), 0.025, rtol=1e-4)


def test_a_fall_that_is_longer_than_the_run_is_refused():
    options = OptimizerConfig(schedule="wsd", warmup_steps=10, decay_steps=91)
    with pytest.raises(UserError, match=r"optimizer.decay_steps: 91 cannot be used: 90 steps follow the warmup"):
        make_schedule(options, 100)
    with pytest.raises(UserError, match=r"0 steps follow the warmup; lower decay_steps"):
        make_schedule(options, 5)


# -------------------------------------------------------------------------------------------------------- shardings


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "rmsprop"])
def test_moments_lie_as_their_weights(name):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    model = small_model()
    own, whole = param_shardings(model, mesh), replicated(mesh)
    optimizer = make_optimizer(config(name), 10)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), model.param_shapes())
    shardings = state_shardings(state, own, whole, optimizer)
    assert shardings.params == own
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    like_weights = 0
    specs = {shape.shape: sharding for shape, sharding in zip(*map(jax.tree.leaves, (state.params, own)), strict=True)}
    for leaf, sharding in zip(*map(jax.tree.leaves, (state.opt_state, shardings.opt_state)), strict=True):
        if leaf.shape in specs and leaf.ndim > 1:
            assert sharding == specs[leaf.shape]
            like_weights += 1
        elif leaf.shape not in specs:
            assert sharding == whole
    assert like_weights >= 10


def test_factored_moments_are_whole():
    mesh = make_mesh(MeshConfig(fsdp=8))
    spread = jax.NamedSharding(mesh, jax.P("fsdp", None))
    optimizer = make_optimizer(config("adafactor"), 10)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), {"kernel": jnp.zeros((256, 128))})
    shardings = state_shardings(state, {"kernel": spread}, replicated(mesh), optimizer)
    assert set(jax.tree.leaves(shardings.opt_state)) == {replicated(mesh)}
    made = jax.jit(lambda: init_state({"kernel": jnp.zeros((256, 128))}, optimizer), out_shardings=shardings)()
    assert made.params["kernel"].sharding == spread
