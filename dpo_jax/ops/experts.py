"""Mixture-of-experts feed-forward: routing, the experts' products, and the sums of the load-balancing loss.

No token is dropped. On a mesh, `expert` shards the experts, `tensor` their features and `fsdp` the other dim of their
matrices, which is gathered where it is needed. Rows of tokens are sharded over `expert`, too, so the devices along it
gather each other's tokens, each applies its own experts, and the sums return to the tokens' devices. Experts are never
gathered along `expert`.

Shape letters: R rows, T tokens per row, D model, F feed-forward, E experts, k experts per token, n tokens,
m slots per token, L layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.batch import AnyArray, BalanceSums
from dpo_jax.ops import grouped
from dpo_jax.parallel.sharding import AXES, ROWS, mesh_is_active


class Router(NamedTuple):
    """How a router's logits become experts and their weights; the load-balancing loss's softmax is over all experts."""

    top_k: int
    softmax: Literal["all", "chosen"] = "all"  # experts over which the weights are normalized first
    renormalize: bool = False  # divide the weights of the chosen experts by their sum


class Routing(NamedTuple):
    """The experts of each token, best first."""

    experts: Int[Array, "R T k"]  # number of experts: none, at padding
    weights: Float[Array, "R T k"]  # float32; 0 at padding
    probs: Float[Array, "R T E"]  # softmax over all experts, float32


@jax.custom_vjp
def _choose(x: Float[Array, "*n E"], experts: Int[Array, "*n k"]) -> Float[Array, "*n k"]:
    """Return the chosen experts' values; the gradient is a masked sum, which is fused, instead of a scatter."""
    return jnp.take_along_axis(x, experts, axis=-1)


def _choose_backward(residuals, g):
    experts, num_experts = residuals[0], residuals[1].shape[-1]
    is_chosen = experts[..., None] == jnp.arange(num_experts)
    return jnp.where(is_chosen, g[..., None], 0).sum(-2), None


_choose.defvjp(lambda x, experts: (_choose(x, experts), (experts, x)), _choose_backward)


def route(
    x: Float[Array, "R T D"],
    matrix: Float[Array, "E D"],
    bias: Float[Array, " E"] | None,
    mask: Bool[AnyArray, "R T"],
    router: Router,
) -> Routing:
    """Choose each token's experts, in float32; among equal logits, the first expert wins.

    Where ``mask`` is False, at padding, a token has no expert.
    """
    # full precision: a rounded logit changes experts
    logits = jnp.einsum(
        "RTD,ED->RTE", *(a.astype(jnp.float32) for a in (x, matrix)), precision=jax.lax.Precision.HIGHEST
    )
    if bias is not None:
        logits += bias.astype(jnp.float32)
    probs = jax.nn.softmax(logits)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(logits), router.top_k)
    experts = checkpoint_name(experts, "routed")  # saved, so that a recomputed logit cannot change them
    weights = _choose(probs, experts) if router.softmax == "all" else jax.nn.softmax(_choose(logits, experts))
    if router.renormalize:
        weights /= weights.sum(-1, keepdims=True)
    mask = jnp.asarray(mask)[..., None]
    return Routing(jnp.where(mask, experts, logits.shape[-1]), jnp.where(mask, weights, 0.0), probs)


def balance_sums(routing: Routing, weights: Float[AnyArray, "R T"] | Int[AnyArray, "R T"]) -> BalanceSums:
    """Sum the routing over tokens with ``weights``: the number of a token's answers, 0 for padding.

    The gradient flows through ``probs`` only.
    """
    weights = jnp.asarray(weights, jnp.float32)
    is_chosen = (routing.experts[..., None] == jnp.arange(routing.probs.shape[-1])).any(-2)
    return BalanceSums(
        chosen=jnp.where(is_chosen, weights[..., None], 0.0).sum((0, 1)),
        probs=(routing.probs * weights[..., None]).sum((0, 1)),
        weight=weights.sum(),
    )


class Glu(NamedTuple):
    """Gated activation: g sigmoid(alpha g) (u + offset), with gate g and up u clamped; by default a gated SiLU."""

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None  # g is at most this, u at most this in absolute value

    def __call__(self, gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
        """Apply the activation, in float32."""
        gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        if self.limit is not None:
            gate = jnp.where(gate > self.limit, self.limit, gate)
            up = jnp.where(jnp.abs(up) > self.limit, jnp.sign(up) * self.limit, up)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + self.offset)


SILU = Glu()


class ExpertLinear(NamedTuple):
    """A linear layer of each expert, inputs first, with an optional bias and an optional adapter (x A^T) B^T."""

    matrix: Float[Array, "E i o"]
    bias: Float[Array, "E o"] | None = None
    a: Float[Array, "E r i"] | None = None
    b: Float[Array, "E o r"] | None = None


class ExpertWeights(NamedTuple):
    """Weights of all experts, or of a device's shard."""

    gate: ExpertLinear  # D -> F
    up: ExpertLinear  # D -> F; its adapter has the A of the gate's
    down: ExpertLinear  # F -> D


# How a mesh shards each array of `ExpertWeights`.
_TO_FEATURES = {
    "matrix": PartitionSpec("expert", "fsdp", "tensor"),
    "bias": PartitionSpec("expert", "tensor"),
    "a": PartitionSpec("expert", None, "fsdp"),
    "b": PartitionSpec("expert", "tensor", None),
}
_FROM_FEATURES = {
    "matrix": PartitionSpec("expert", "tensor", "fsdp"),
    "bias": PartitionSpec("expert", "fsdp"),
    "a": PartitionSpec("expert", None, "tensor"),
    "b": PartitionSpec("expert", "fsdp", None),
}
SPECS = {"gate": _TO_FEATURES, "up": _TO_FEATURES, "down": _FROM_FEATURES}


def expert_specs(experts: ExpertWeights) -> Any:
    """Return the experts' tree with the partition spec of each array in its place."""

    def layer_specs(name, layer):
        specs: Any = (None if x is None else SPECS[name][field] for field, x in layer._asdict().items())
        return ExpertLinear(*specs)

    return ExpertWeights(*(layer_specs(name, layer) for name, layer in experts._asdict().items()))


class _Options(NamedTuple):
    """Static options, passed explicitly because no context manager is active while the backward pass is traced."""

    glu: Glu
    precision: str | None
    adapter_scale: float


def feed_forward(
    x: Float[Array, "R T D"], routing: Routing, experts: ExpertWeights, glu: Glu = SILU, adapter_scale: float = 1.0
) -> Float[Array, "R T D"]:
    """Return the weighted sum of the outputs of each token's experts, in x's dtype; 0 at padding.

    The backward pass recomputes the products before the last, so that nothing wider than x is saved. The gradient of
    the experts is accumulated and reduced in float32.
    """
    options = _Options(glu, jax.config.values["jax_default_matmul_precision"], adapter_scale)
    return _feed_forward(x, routing.weights, experts, routing.experts, options)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _feed_forward(x, weights, experts, indices, options):
    return _on_mesh(partial(_apply_shard, options), "rrer", "r", experts)(x, weights, experts, indices)


def _forward(x, weights, experts, indices, options):
    return _feed_forward(x, weights, experts, indices, options), (x, weights, experts, indices)


def _backward(options, residuals, g):
    on_mesh = _on_mesh(partial(_pull_shard, options), "rrerr", "rre", residuals[2])
    return *on_mesh(*residuals, g), None


_feed_forward.defvjp(_forward, _backward)


def _on_mesh(
    local: Callable[..., Any], input_kinds: str, output_kinds: str, experts: ExpertWeights
) -> Callable[..., Any]:
    """Map ``local(is_sharded, *arrays)`` over devices: kind "r" is sharded by rows, kind "e" like the experts."""
    if not mesh_is_active():
        return partial(local, False)
    specs = {"r": PartitionSpec(ROWS), "e": expert_specs(experts)}
    outputs = tuple(specs[letter] for letter in output_kinds)
    in_specs, out_specs = tuple(specs[letter] for letter in input_kinds), outputs if len(outputs) > 1 else outputs[0]
    return jax.shard_map(partial(local, True), in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Shard(NamedTuple):
    """A device's shard of the experts."""

    first_expert: Array | int  # index of the shard's first expert
    bias_scale: Array | float  # 1 on one of the devices along `tensor`, whose outputs are added; 0 on the others


def _shard(is_sharded: bool, experts: ExpertWeights) -> _Shard:
    if not is_sharded:
        return _Shard(0, 1.0)
    is_first = jax.lax.axis_index("tensor") == 0
    return _Shard(jax.lax.axis_index("expert") * len(experts.gate.matrix), is_first.astype(jnp.float32))


def _gather_tokens(is_sharded: bool, *arrays: AnyArray) -> list[AnyArray]:
    """Gather the rows of the devices that together hold all experts."""
    return [jax.lax.all_gather(x, "expert", tiled=True) if is_sharded else x for x in arrays]


def _return_tokens(is_sharded: bool, x: Array) -> Array:
    """Sum over devices and return the device's own rows; the inverse of `_gather_tokens`."""
    if not is_sharded:
        return x
    return jax.lax.psum_scatter(jax.lax.psum(x, "tensor"), "expert", tiled=True)


def _gather_experts(is_sharded: bool, experts: ExpertWeights, dtype: Any) -> ExpertWeights:
    """Gather a device's experts along `fsdp`: matrices in ``dtype``, that of the products, but biases as they are."""
    if not is_sharded or jax.lax.axis_size("fsdp") == 1:
        return experts

    def gather(spec, x):
        x = x if x.ndim == 2 else x.astype(dtype)
        return jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True) if "fsdp" in spec else x

    return jax.tree.map(gather, expert_specs(experts), experts)


def _reduce_experts(is_sharded: bool, gradients: ExpertWeights) -> ExpertWeights:
    """Sum gradients over the devices that apply the same experts; return the device's own part."""
    if not is_sharded:
        return gradients

    def reduce(spec, x):
        if "fsdp" in spec:
            x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
        return jax.lax.psum(x, [axis for axis in AXES if axis not in spec])

    return jax.tree.map(reduce, expert_specs(gradients), gradients)


def _on_platform(fn: Callable[..., Any], *arrays: Any) -> Any:
    """Call ``fn(implementation, *arrays)`` with the implementation for the platform of the compiled program."""
    return jax.lax.platform_dependent(*arrays, tpu=partial(fn, "kernels"), default=partial(fn, "blocks"))


def _num_windows(is_sharded: bool, experts: ExpertWeights, per_token: int) -> int:
    """Return the number of windows that the rows are split into; each holds twice the rows of a balanced routing."""
    if not is_sharded:
        return 1
    num_slots = min(per_token, len(experts.gate.matrix))
    return max(1, num_slots * jax.lax.axis_size("expert") // (2 * per_token))


def _apply_shard(options, is_sharded, x, weights, experts, indices):
    tokens = _gather_tokens(is_sharded, x, weights, indices)
    apply = partial(_apply, options, _num_windows(is_sharded, experts, indices.shape[-1]))
    gathered = _gather_experts(is_sharded, experts, x.dtype)
    return _return_tokens(is_sharded, _on_platform(apply, _shard(is_sharded, experts), gathered, *tokens))


def _pull_shard(options, is_sharded, x, weights, experts, indices, g):
    tokens = _gather_tokens(is_sharded, x, weights, indices, g)
    pull = partial(_pull, options, _num_windows(is_sharded, experts, indices.shape[-1]))
    gathered = _gather_experts(is_sharded, experts, x.dtype)
    gradients = _on_platform(pull, _shard(is_sharded, experts), gathered, *tokens)
    x_grad, weights_grad = (_return_tokens(is_sharded, grad) for grad in gradients[:2])
    experts_grad = _reduce_experts(is_sharded, gradients[2])
    return x_grad, weights_grad, jax.tree.map(lambda grad, w: grad.astype(w.dtype), experts_grad, experts)


def _apply(options, num_windows, implementation, shard, experts, x, weights, indices):
    """Apply the experts of a shard to tokens [R, T, D]; other experts add nothing."""
    num_experts = len(experts.gate.matrix)
    weights, indices = _own_slots(weights, indices - shard.first_expert, num_experts)
    groups = grouped.make_groups(indices, num_experts, implementation, num_windows)
    apply = partial(_apply_rows, options, implementation, shard, experts, x.reshape(-1, x.shape[-1]), weights)
    return grouped.sum_windows(apply, groups, num_windows).astype(x.dtype).reshape(x.shape)


def _pull(options, num_windows, implementation, shard, experts, x, weights, indices, g):
    """Return the gradients of x, weights and experts, given that of the result; the experts' are float32."""
    num_experts = len(experts.gate.matrix)
    own_slots = partial(_own_slots, indices=indices - shard.first_expert, num_experts=num_experts)
    own_weights, pull_weights, indices = jax.vjp(own_slots, weights, has_aux=True)
    groups = grouped.make_groups(indices, num_experts, implementation, num_windows)
    # the products convert back to x's dtype: this only leaves the experts' gradient in float32
    experts = jax.tree.map(lambda w: w.astype(jnp.float32), experts)
    arrays = experts, x.reshape(-1, x.shape[-1]), own_weights

    def pull_rows(groups):
        apply = partial(_apply_rows, options, implementation, shard, groups=groups)
        return jax.vjp(apply, *arrays)[1](g.reshape(-1, g.shape[-1]))

    experts_grad, x_grad, weights_grad = grouped.sum_windows(pull_rows, groups, num_windows)
    return x_grad.astype(x.dtype).reshape(x.shape), pull_weights(weights_grad)[0], experts_grad


def _apply_rows(
    options: _Options,
    implementation: grouped.Implementation,
    shard: _Shard,
    experts: ExpertWeights,
    x: Float[Array, "n D"],
    weights: Float[Array, "n m"],
    groups: grouped.Groups,
) -> Float[Array, "n D"]:
    """Return what the rows of ``groups`` add to each token; the weights are applied before the last product."""
    product = partial(grouped.product, groups=groups, implementation=implementation, precision=options.precision)
    rows, row_weights = grouped.spread(x, groups), grouped.spread_slots(weights, groups)[:, None]
    # (x A^T) of an adapter, [S, r]; on one of the devices along `tensor`, that of `down` is of its features only
    narrow = lambda x, a: None if a is None else product(x, a.swapaxes(1, 2))  # noqa: E731

    def linear(x, layer, narrowed, bias_scale=1.0):
        y = product(x, layer.matrix)
        if layer.bias is not None:
            bias = grouped.spread_experts(layer.bias, groups) * bias_scale
            y = (y.astype(jnp.float32) + bias).astype(x.dtype)
        return y if layer.b is None else y + options.adapter_scale * product(narrowed, layer.b.swapaxes(1, 2))

    narrowed = narrow(rows, experts.gate.a)
    hidden = options.glu(linear(rows, experts.gate, narrowed), linear(rows, experts.up, narrowed))
    hidden = (hidden * row_weights).astype(x.dtype)
    y = linear(hidden, experts.down, narrow(hidden, experts.down.a), row_weights * shard.bias_scale)
    return grouped.collect(y, groups)


def _own_slots(
    weights: Float[Array, "R T k"], indices: Int[AnyArray, "R T k"], num_experts: int
) -> tuple[Float[Array, "n m"], Int[Array, "n m"]]:
    """Keep each token's slots of experts 0 to ``num_experts`` - 1; some of the kept slots may have no expert."""
    weights, indices = (jnp.reshape(x, (-1, x.shape[-1])) for x in (weights, indices))
    is_own = (indices >= 0) & (indices < num_experts)
    num_slots = min(num_experts, indices.shape[-1])
    if num_slots == indices.shape[-1]:
        return weights, jnp.where(is_own, indices, num_experts)
    slot = jnp.cumsum(is_own, axis=-1) - 1
    is_source = is_own[:, None] & (slot[:, None] == jnp.arange(num_slots)[:, None])  # [n, m, k]
    moved = jnp.where(is_source, indices[:, None] - num_experts, 0).sum(-1) + num_experts
    return jnp.where(is_source, weights[:, None], 0).sum(-1), moved
