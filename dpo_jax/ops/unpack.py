"""Unpack shared rows into ordinary causal sequences, and back, by gathers whose indices depend only on the batch.

A row holds ``[prompt][chosen][rejected]`` of one or more pairs. Kernels support only plain sequences, in which a token
attends to all earlier ones. So queries, keys and values are gathered into S sequences per row of U tokens each, with a
copy of the prompt before each of its answers, and the attention outputs are gathered back.

Shape letters: R rows, T tokens per row, S sequences per row, U tokens per sequence, C copies of a token at most,
A answer slots per row.
"""

from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.batch import PreferenceBatch


class Unshared(NamedTuple):
    """Gather indices from rows to sequences and back."""

    sources: Int[Array, "R S U"]  # index in the row; arbitrary in padding
    segments: Int[Array, "R S U"]  # segment of the token; 0: padding
    places: Int[Array, "R C T"]  # index of each copy in the row's S * U tokens
    held: Bool[Array, "R C T"]  # False: the token has no such copy; a token without any copy is padding
    first: Bool[Array, "R S U"]  # True: first copy of a token, whose output is used


def branches_apart(batch: PreferenceBatch, length: int) -> Unshared:
    """Unpack into K sequences per row of ``length`` tokens: one per branch, with all prompts and its answers."""
    num_branches = batch.answer_slots.shape[-1]
    branches, segments = jnp.asarray(batch.branches)[:, None], jnp.asarray(batch.segments)[:, None]
    branch = jnp.arange(1, num_branches + 1)[:, None]
    return _unshared(batch, (segments > 0) & ((branches == 0) | (branches == branch)), length)


def answers_apart(batch: PreferenceBatch, length: int) -> Unshared:
    """Unpack into A sequences per row of ``length`` tokens: one per answer, preceded by its prompt."""
    branches, segments = jnp.asarray(batch.branches), jnp.asarray(batch.segments)
    previous = lambda grid: jnp.pad(grid[:, :-1], ((0, 0), (1, 0)))  # noqa: E731
    starts = (branches > 0) & ((branches != previous(branches)) | (segments != previous(segments)))
    slots = jnp.arange(batch.answers_per_row)[:, None]
    starts = starts[:, None] & (jnp.cumsum(starts, axis=-1)[:, None] - 1 == slots)  # [R, A, T], one start per slot
    of_slot = lambda grid: jnp.where(starts, grid[:, None], 0).max(-1, keepdims=True)  # noqa: E731
    branch, segment = of_slot(branches), of_slot(segments)
    branches, segments = branches[:, None], segments[:, None]
    return _unshared(batch, (segments > 0) & (segments == segment) & ((branches == 0) | (branches == branch)), length)


def _unshared(batch: PreferenceBatch, member: Bool[Array, "R S T"], length: int) -> Unshared:
    """Make indices from ``member``: sequences keep the row's token order; a token is in at most K sequences."""
    num_rows, num_sequences, _ = member.shape
    copies = batch.answer_slots.shape[-1]
    sources = jnp.argsort(~member, axis=-1, stable=True)[..., :length]
    sources = jnp.pad(sources, ((0, 0), (0, 0), (0, length - sources.shape[-1])))
    is_used = jnp.arange(length) < member.sum(-1, keepdims=True)

    index = jnp.cumsum(member, axis=-1) - 1 + length * jnp.arange(num_sequences)[:, None]
    copy = jnp.argsort(~member, axis=1, stable=True)[:, :copies]  # [R, C, T]: sequence of each copy
    has_copy = jnp.take_along_axis(member, copy, axis=1)
    copy_index = jnp.where(has_copy, jnp.take_along_axis(index, copy, axis=1), 0)

    flat_sources = sources.reshape(num_rows, -1)
    at_source = lambda grid: jnp.take_along_axis(grid, flat_sources, axis=1).reshape(sources.shape)  # noqa: E731
    slot_index = jnp.arange(num_sequences * length).reshape(num_sequences, length)
    return Unshared(
        sources=sources.astype(jnp.int32),
        segments=jnp.where(is_used, at_source(jnp.asarray(batch.segments)), 0),
        places=copy_index.astype(jnp.int32),
        held=has_copy,
        first=is_used & (at_source(copy_index[:, 0]) == slot_index),
    )


def _take(x: Float[Array, "R P *h"], places: Int[Array, "R Q"]) -> Float[Array, "R Q *h"]:
    return jax.vmap(lambda row, indices: row.at[indices].get(mode="promise_in_bounds"))(x, places)


def _where(mask: Bool[Array, "R Q"], x: Float[Array, "R Q *h"]) -> Float[Array, "R Q *h"]:
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


# Autodiff would turn each gather into a scatter, which is slow on a TPU. Here the transposes are gathers, too.


@jax.custom_vjp
def unshare(x: Float[Array, "R T N H"], to: Unshared) -> Float[Array, "RS U N H"]:
    """Gather rows into sequences; padding holds arbitrary tokens, which receive no gradient."""
    num_rows, num_sequences, length = to.sources.shape
    gathered = _take(x, to.sources.reshape(num_rows, -1))
    return gathered.reshape(num_rows * num_sequences, length, *x.shape[2:])


def _unshare_backward(to, g):
    num_rows, copies, _ = to.places.shape
    g = g.reshape(num_rows, -1, *g.shape[2:])
    of_copy = lambda c: _where(to.held[:, c], _take(g, to.places[:, c]))  # noqa: E731
    return reduce(jnp.add, map(of_copy, range(copies))), None  # a sum of two copies is rounded only once, in any dtype


unshare.defvjp(lambda x, to: (unshare(x, to), to), _unshare_backward)


@jax.custom_vjp
def share(y: Float[Array, "RS U N H"], to: Unshared) -> Float[Array, "R T N H"]:
    """Gather sequences back into rows, taking the first copy of each token; padding is 0."""
    y = y.reshape(to.places.shape[0], -1, *y.shape[2:])
    return _where(to.held[:, 0], _take(y, to.places[:, 0]))


def _share_backward(to, g):
    num_rows, num_sequences, length = to.sources.shape
    gathered = _where(to.first.reshape(num_rows, -1), _take(g, to.sources.reshape(num_rows, -1)))
    return gathered.reshape(num_rows * num_sequences, length, *g.shape[2:]), None


share.defvjp(lambda y, to: (share(y, to), to), _share_backward)
