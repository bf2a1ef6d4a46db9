"""Softmax attention over pairs of blocks, as a loop over the pairs in use that keeps only its current scores.

Shape letters: B blocks (of all rows) of S tokens, K key/value heads, X = G * S queries of a head's group in a block,
H head dim, J pairs of blocks, C pairs per visit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.ops.softcap import soft_cap

LOWEST = float(jnp.finfo(jnp.float32).min)  # largest score before any; finite, so that differences of two are


class BlockPairs(NamedTuple):
    """Pairs of a query block and a key block, those in use first; the others have block 0 twice and an empty mask."""

    query: Int[Array, " J"]
    key: Int[Array, " J"]
    mask: Bool[Array, "J S S"]  # whether a query sees a key
    count: Int[Array, ""] | None  # number of pairs in use; None: of pairs being visited, all


class BlockOptions(NamedTuple):
    """Static options; the precision of products is passed because its context is not active in the backward pass."""

    scale: float
    softcap: float | None
    precision: str | None

    def product(self, spec: str, x: Array, y: Array) -> Array:
        """Return an einsum of ``x`` and ``y``, accumulated in float32."""
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32, precision=self.precision)


class _Softmax(NamedTuple):
    """Running softmax of each query over the pairs visited so far, float32."""

    largest: Float[Array, "B K X"]  # largest score
    total: Float[Array, "B K X"]  # sum of exp(score - largest)
    values: Float[Array, "B K X H"]  # sum of exp(score - largest) v


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_pairs(
    q: Float[Array, "B K X H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    sinks: Float[Array, "K X"] | None,
    pairs: BlockPairs,
    options: BlockOptions,
) -> Float[Array, "B K X H"]:
    """Compute softmax attention of the queries to the keys that their pairs' masks show them, 0 where there is none.

    ``sinks``: float32 scores that the softmax has in addition, of a value of 0. The gradient is written by hand: JAX
    differentiates no loop whose length is data, and would store the scores of all pairs, which the backward pass here
    computes again. With p the softmax and g the gradient of the output o,
    d/dv = p^T g, d/dscores = p (g . v - g . o), and that of a sink is the sum of -p (g . o) over its queries.
    """
    return _forward(q, k, v, sinks, pairs, options)[0]


def _forward(q, k, v, sinks, pairs, options):
    softmax = _on_platform(partial(_softmax_of, options), q, k, v, sinks, pairs)
    total = jnp.where(softmax.total > 0, softmax.total, 1.0)
    out = (softmax.values / total[..., None]).astype(v.dtype)
    # named, so that a layer that is rematerialized may keep them: the backward pass then skips the loop above
    out, largest, total = (checkpoint_name(x, "attended") for x in (out, softmax.largest, total))
    return out, (q, k, v, sinks, pairs, out, largest, total)


def _backward(options, residuals, g):
    q, k, v, sinks, pairs, out, largest, total = residuals
    g = g.astype(jnp.float32) / total[..., None]  # so that exp(score - largest) stands for p
    mean = (g * out.astype(jnp.float32)).sum(-1)
    gradients = _on_platform(partial(_gradients_of, options), q, k, v, pairs, largest, g.astype(v.dtype), mean)
    gradients = [gradient.astype(x.dtype) for gradient, x in zip(gradients, (q, k, v), strict=True)]
    return *gradients, None if sinks is None else -(jnp.exp(sinks - largest) * mean).sum(0), None


attend_pairs.defvjp(_forward, _backward)


def _on_platform(fn: Callable[..., Any], *arrays: Any) -> Any:
    """Call ``fn(fold, *arrays)``: pair by pair on a CPU, whose cache holds a pair's scores; elsewhere all at once."""
    return jax.lax.platform_dependent(*arrays, cpu=partial(fn, _fold_each), default=partial(fn, _fold_all))


def _fold_each(visit: Callable[[BlockPairs, Any], Any], pairs: BlockPairs, initial: Any) -> Any:
    one = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), pairs._replace(count=None))  # noqa: E731
    return jax.lax.fori_loop(0, pairs.count, lambda i, carry: visit(one(i), carry), initial)


def _fold_all(visit: Callable[[BlockPairs, Any], Any], pairs: BlockPairs, initial: Any) -> Any:
    return visit(pairs, initial)


def _take(x: Array, blocks: Int[Array, " C"]) -> Array:
    return x.at[blocks].get(mode="promise_in_bounds")


def _add(x: Array, blocks: Int[Array, " C"], values: Array) -> Array:
    return x.at[blocks].add(values, mode="promise_in_bounds")


def _scores(options: BlockOptions, q: Array, k: Array) -> Float[Array, "C K X S"]:
    return soft_cap(options.product("ckxh,cksh->ckxs", q, k) * options.scale, options.softcap)


def _masked(scores: Array, mask: Array) -> Float[Array, "C K X S"]:
    """Return the scores of the keys that are seen, and -inf for others."""
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], grouped, -jnp.inf).reshape(scores.shape)


def _softmax_of(options, fold, q, k, v, sinks, pairs):
    def visit(pairs, before):
        blocks = pairs.query
        scores = _masked(_scores(options, _take(q, blocks), _take(k, pairs.key)), pairs.mask)
        largest = before.largest.at[blocks].max(scores.max(-1), mode="promise_in_bounds")
        shift = jnp.exp(_take(before.largest, blocks) - _take(largest, blocks))
        weights = jnp.exp(scores - _take(largest, blocks)[..., None])
        values = options.product("ckxs,cksh->ckxh", weights.astype(v.dtype), _take(v, pairs.key))

        def update(x, shift, new):  # where a block is in several pairs, the same value is set several times
            x = x.at[blocks].set(_take(x, blocks) * shift, mode="promise_in_bounds")
            return _add(x, blocks, new)

        total = update(before.total, shift, weights.sum(-1))
        return _Softmax(largest, total, update(before.values, shift[..., None], values))

    largest, total = jnp.full(q.shape[:-1], LOWEST), jnp.zeros(q.shape[:-1])
    if sinks is not None:
        largest, total = jnp.broadcast_to(sinks, largest.shape), jnp.ones_like(total)
    return fold(visit, pairs, _Softmax(largest, total, jnp.zeros(q.shape)))


def _gradients_of(options, fold, q, k, v, pairs, largest, g, mean):
    def visit(pairs, before):
        q_grad, k_grad, v_grad = before
        q_block, g_block = _take(q, pairs.query), _take(g, pairs.query)
        k_block, v_block = _take(k, pairs.key), _take(v, pairs.key)
        scores = _scores(options, q_block, k_block)
        weights = jnp.exp(_masked(scores, pairs.mask) - _take(largest, pairs.query)[..., None])
        weights_grad = options.product("ckxh,cksh->ckxs", g_block, v_block)
        scores_grad = weights * (weights_grad - _take(mean, pairs.query)[..., None]) * options.scale
        if options.softcap is not None:
            scores_grad *= 1 - (scores / options.softcap) ** 2
        scores_grad = scores_grad.astype(q.dtype)
        return (
            _add(q_grad, pairs.query, options.product("ckxs,cksh->ckxh", scores_grad, k_block)),
            _add(k_grad, pairs.key, options.product("ckxs,ckxh->cksh", scores_grad, q_block)),
            _add(v_grad, pairs.key, options.product("ckxs,ckxh->cksh", weights.astype(v.dtype), g_block)),
        )

    return fold(visit, pairs, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
