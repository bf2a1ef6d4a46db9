"""Mixtures of experts in training: the load-balancing loss and its gradient, and sampling with sharded experts."""

import copy
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import gradient_errors, hf_gradient, load_family, router_gap
from small import pack

from dpo_jax.balance import balance_metrics
from dpo_jax.batch import BalanceSums, PairLogps
from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.config import LossConfig, MeshConfig
from dpo_jax.config.model import ModelConfig
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.errors import UserError
from dpo_jax.inference.generate import generate, rollout_shardings, rollout_weights
from dpo_jax.logprobs import make_logps_fn
from dpo_jax.losses import preference_metrics
from dpo_jax.models.decoder import (
    Model,
    count_answers,
    gathers_all_experts,
    make_model,
    refuse_expert_axis,
    with_balance,
)
from dpo_jax.models.flops import Work, forward_flops, recomputed_projections
from dpo_jax.parallel.sharding import abstract_mesh, make_mesh, rollout_mesh
from dpo_jax.step import Frozen, pair_gradient
from dpo_jax.weights.open import param_shardings

pytestmark = pytest.mark.usefixtures("torch")
NAME, COEF, BETA = "qwen3_moe", 0.1, 0.3
LOSS = LossConfig(beta=BETA)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    loaded = load_family(NAME, tmp_path_factory.mktemp(NAME))
    return loaded._replace(model=Model(config=with_balance(loaded.model.config, COEF)))


def pairs() -> list:
    draw = np.random.default_rng(3)
    ids = lambda n: draw.integers(1, 125, n).astype(np.int32)  # noqa: E731
    return [(ids(p), (ids(c), ids(r)), None) for p, c, r in [(30, 9, 5), (1, 1, 12), (12, 20, 20), (45, 3, 8)] * 2]


def sequences() -> list[np.ndarray]:
    """Each prompt with its chosen answer, and then each with its rejected one, as TRL lines them up."""
    return [np.concatenate([prompt, answers[k]]) for k in range(2) for prompt, answers, _ in pairs()]


def padded():
    """Tokens and mask of `sequences`, as torch tensors."""
    import torch

    length = max(map(len, sequences()))
    tokens = np.stack([np.pad(x, (0, length - len(x))) for x in sequences()])
    mask = np.stack([np.arange(length) < len(x) for x in sequences()])
    return torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def their_logps(model):
    """Return the log-prob of each answer, [2, pairs], and the load-balancing loss over all of them."""
    import torch

    tokens, mask = padded()
    outputs = model(tokens, attention_mask=mask, output_router_logits=True)
    logps = torch.log_softmax(outputs.logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    prompts = torch.tensor([len(prompt) for prompt, _, _ in pairs()] * 2)
    is_answer = (torch.arange(tokens.shape[1] - 1) >= prompts[:, None] - 1) & (mask[:, 1:] > 0)
    return (logps * is_answer).sum(-1).reshape(2, -1), outputs.aux_loss


@partial(jax.jit, static_argnums=(0, 1))
def step(model, accumulation, params, batch):
    """Return metrics and gradient, with a tenth more of the last norm's weight as the reference."""
    fn = make_logps_fn(model.routed_hidden, model.unembedding, chunk=64, block=50, **model.logit_options)
    frozen = Frozen(reference=params | {"final_norm": 1.1 * params["final_norm"]})
    grads, policy, reference = pair_gradient(params, frozen, batch, logps_fn=fn, loss=LOSS, accumulation=accumulation)
    return preference_metrics(policy, reference, LOSS), grads


@pytest.fixture(scope="module")
def stepped(loaded):
    return jax.device_get(step(loaded.model, 1, loaded.params, pack(pairs())))


def assert_close(actual, expected):
    (metrics, grads), (metrics_0, grads_0) = jax.device_get(actual), expected
    for name in ("loss", "aux_loss", "router/max_share", "router/min_share", "router/entropy"):
        assert metrics[name] == pytest.approx(metrics_0[name], rel=5e-6), name
    change = optax.tree.norm(jax.tree.map(jnp.subtract, grads, grads_0)) / optax.tree.norm(grads_0)
    assert float(change) <= 2e-5


def test_a_step_is_that_of_torch(loaded, stepped):
    """Loss, load-balancing loss and gradient of policy and reference as TRL computes them, each prompt twice."""
    import torch

    assert min(router_gap(loaded.theirs, x[None]) for x in sequences()) > 1e-3
    policy, reference = copy.deepcopy(loaded.theirs), copy.deepcopy(loaded.theirs)
    reference.model.norm.weight.data *= 1.1
    with torch.no_grad():
        reference_logps, _ = their_logps(reference)
    logps, aux_loss = their_logps(policy)
    margins = (logps[0] - reference_logps[0]) - (logps[1] - reference_logps[1])
    loss = -torch.nn.functional.logsigmoid(BETA * margins).mean() + COEF * aux_loss

    metrics, grads = stepped
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["aux_loss"] == pytest.approx(aux_loss.item(), rel=1e-5)
    assert max(gradient_errors(grads, hf_gradient(policy, loss, loaded.model)).values()) < 1e-3


def test_accumulation_changes_nothing(loaded, stepped):
    """The shares and the means of a step are formed before their product, not those of a microbatch."""
    assert_close(step(loaded.model, 4, loaded.params, pack(pairs(), accumulation=4)), stepped)


@pytest.mark.slow
def test_accumulation_on_a_mesh_changes_nothing(loaded, stepped):
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        params = jax.device_put(loaded.params, param_shardings(loaded.model, mesh))
        batch = make_to_devices(mesh, leading=1)(pack(pairs(), rows=4, accumulation=2))
        assert_close(step(loaded.model, 2, params, batch), stepped)


@pytest.mark.parametrize("layout", ["shared", "repeated"])
def test_a_token_counts_once_for_each_answer(layout):
    rows = 2 if layout == "repeated" else 1
    counts = np.asarray(count_answers(pack(pairs(), layout=layout, rows=rows)))
    assert counts.sum() == sum(map(len, sequences()))
    assert counts.max() == (2 if layout == "shared" else 1)


def test_tokens_sampled_by_sharded_experts_are_those_of_one_device(loaded):
    prompts = [x[:n].tolist() for x, n in zip(sequences(), (3, 17, 9, 12), strict=False)]
    options = SamplingConfig(temperature=0, max_tokens=6)
    answers = []
    for sizes, devices in (({}, jax.devices()[:1]), ({"fsdp": 2, "expert": 2, "tensor": 2}, None)):
        mesh = make_mesh(MeshConfig(**sizes), devices)
        weights = rollout_weights(loaded.model, jax.device_get(loaded.params), mesh)
        answers.append(generate(loaded.model, weights, prompts, options, mesh, end_ids=[-1]))
    assert [answer.tokens for answer in answers[1]] == [answer.tokens for answer in answers[0]]
    np.testing.assert_allclose([a.logps for a in answers[1]], [a.logps for a in answers[0]], atol=1e-5)


def test_only_experts_are_sharded_by_more_than_tensor_while_sampling(loaded):
    mesh = rollout_mesh(make_mesh(MeshConfig(expert=2, tensor=2)))
    assert tuple(mesh.shape.values()) == (2, 1, 2, 2)
    shardings = rollout_shardings(loaded.model, mesh, has_adapters=False)
    sharded = {
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
        if "expert" in sharding.spec
    }
    assert sharded == {"gate", "up", "down"}


def test_the_expert_axis_divides_the_number_of_experts(loaded):
    number = loaded.model.config.experts.number
    for size in (1, number):
        mesh = abstract_mesh(MeshConfig(expert=size), 2 * number)
        refuse_expert_axis(loaded.model.config, mesh)
        assert gathers_all_experts(loaded.model.config, mesh) == (size == 1)
    refusal = f"^mesh.expert: {2 * number} cannot be used: the model has {number} experts; use a divisor of it$"
    with pytest.raises(UserError, match=refusal):
        refuse_expert_axis(loaded.model.config, abstract_mesh(MeshConfig(expert=2 * number), 2 * number))


def test_routers_are_not_rounded_for_sampling(loaded):
    half = replace(loaded.model, dtype="bfloat16")
    copied = rollout_weights(half, loaded.params, make_mesh(MeshConfig(), jax.devices()[:1]))["layers"]
    assert {name for name, leaf in copied.items() if leaf.dtype != jnp.bfloat16} == {"router"}
    np.testing.assert_array_equal(copied["router"], loaded.params["layers"]["router"])


def test_operations_are_those_of_the_experts_that_a_token_has(loaded):
    c = loaded.model.config
    assert c.experts is not None
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim * c.hidden
    weights = heads + c.hidden * 8 + 3 * 3 * c.hidden * c.ffn  # three of the eight experts
    assert forward_flops(c, Work(tokens=7, seen=0, targets=0)).linear == 2 * c.layers * weights * 7
    more = replace(c, experts=replace(c.experts, number=16))
    extra = forward_flops(more, Work(7, 0, 0)).linear - forward_flops(c, Work(7, 0, 0)).linear
    assert extra == 2 * c.layers * c.hidden * 8 * 7  # of the router
    assert "down" not in recomputed_projections(c, "full")
    assert recomputed_projections(c, "none") == {"gate", "up"}


def test_the_coefficient_is_that_of_the_config_unless_an_option_gives_another(loaded):
    config = with_balance(loaded.model.config, 0.001)
    coefs = {None: 0.001, 0.0: 0.0, 0.5: 0.5}
    for option, expected in coefs.items():
        model = make_model(config, ModelConfig(path="unused", router_aux_loss_coef=option), "cpu")
        assert model.config.experts is not None
        assert model.config.experts.balance_coef == expected
    with pytest.raises(UserError, match="no experts"):
        make_model(replace(config, experts=None), ModelConfig(path="unused", router_aux_loss_coef=0.5), "cpu")


def test_statistics_of_a_router():
    ones = np.ones(2, np.float32)
    sums = BalanceSums(np.array([[3, 1, 0, 0], [1, 1, 1, 1]], np.float32), np.full((2, 4), 1.0, np.float32), 4 * ones)
    logps = PairLogps(
        sum=np.zeros((1, 2)), count=np.ones((1, 2)), weight=np.ones(1), valid=np.ones(1, bool), balance=sums
    )
    metrics = {name: float(value) for name, value in balance_metrics(logps).items()}
    first = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    assert metrics == pytest.approx({
        "aux_loss": 1.0, "router/max_share": 0.75, "router/min_share": 0.0, "router/entropy": (first + 1) / 2
    })  # fmt: skip
