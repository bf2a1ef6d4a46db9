"""Unpack packed rows into ordinary causal sequences and back, by gathers whose indices depend only on the batch.

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
from dpo_jax.ops.transposes import transposed_by


class UnpackIndices(NamedTuple):
    """Indices by which rows are gathered into sequences, and sequences back into rows."""

    sources: Int[Array, "R S U"]  # index in the row; arbitrary in padding
    segments: Int[Array, "R S U"]  # segment of the token; 0: padding
    copy_index: Int[Array, "R C T"]  # index of each copy in the row's S * U tokens
    has_copy: Bool[Array, "R C T"]  # False: the token has no such copy; a token without any copy is padding
    is_first_copy: Bool[Array, "R S U"]  # True: first copy of a token, whose output is used


def unpack_branches(batch: PreferenceBatch, length: int) -> UnpackIndices:
    """Return indices that unpack each row into K sequences of ``length`` tokens: all prompts, one branch's answers."""
    num_branches = batch.answer_slots.shape[-1]
    branches, segments = jnp.asarray(batch.branches)[:, None], jnp.asarray(batch.segments)[:, None]
    branch = jnp.arange(1, num_branches + 1)[:, None]
    return _indices(batch, (segments > 0) & ((branches == 0) | (branches == branch)), length)


def unpack_answers(batch: PreferenceBatch, length: int) -> UnpackIndices:
    """Return indices that unpack each row into A sequences of ``length`` tokens: each answer after its prompt."""
    branches, segments = jnp.asarray(batch.branches), jnp.asarray(batch.segments)
    shift_right = lambda grid: jnp.pad(grid[:, :-1], ((0, 0), (1, 0)))  # noqa: E731
    is_start = (branches > 0) & ((branches != shift_right(branches)) | (segments != shift_right(segments)))
    slots = jnp.arange(batch.answers_per_row)[:, None]
    is_start = is_start[:, None] & (jnp.cumsum(is_start, axis=-1)[:, None] - 1 == slots)  # [R, A, T], one per slot
    value_of_slot = lambda grid: jnp.where(is_start, grid[:, None], 0).max(-1, keepdims=True)  # noqa: E731
    branch, segment = value_of_slot(branches), value_of_slot(segments)
    branches, segments = branches[:, None], segments[:, None]
    return _indices(batch, (segments > 0) & (segments == segment) & ((branches == 0) | (branches == branch)), length)


def _indices(batch: PreferenceBatch, is_member: Bool[Array, "R S T"], length: int) -> UnpackIndices:
    """Return the indices for the sequences that ``is_member`` selects, in row order; at most K share a token."""
    num_rows, num_sequences, _ = is_member.shape
    num_copies = batch.answer_slots.shape[-1]
    sources = jnp.argsort(~is_member, axis=-1, stable=True)[..., :length]
    sources = jnp.pad(sources, ((0, 0), (0, 0), (0, length - sources.shape[-1])))
    is_used = jnp.arange(length) < is_member.sum(-1, keepdims=True)

    index = jnp.cumsum(is_member, axis=-1) - 1 + length * jnp.arange(num_sequences)[:, None]
    copy = jnp.argsort(~is_member, axis=1, stable=True)[:, :num_copies]  # [R, C, T]: sequence of each copy
    has_copy = jnp.take_along_axis(is_member, copy, axis=1)
    copy_index = jnp.where(has_copy, jnp.take_along_axis(index, copy, axis=1), 0)

    flat_sources = sources.reshape(num_rows, -1)
    gather_sources = lambda grid: jnp.take_along_axis(grid, flat_sources, axis=1).reshape(sources.shape)  # noqa: E731
    slot_index = jnp.arange(num_sequences * length).reshape(num_sequences, length)
    return UnpackIndices(
        sources=sources.astype(jnp.int32),
        segments=jnp.where(is_used, gather_sources(jnp.asarray(batch.segments)), 0),
        copy_index=copy_index.astype(jnp.int32),
        has_copy=has_copy,
        is_first_copy=is_used & (gather_sources(copy_index[:, 0]) == slot_index),
    )


def _take(x: Float[Array, "R P *h"], indices: Int[Array, "R Q"]) -> Float[Array, "R Q *h"]:
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, indices)


def _where(mask: Bool[Array, "R Q"], x: Float[Array, "R Q *h"]) -> Float[Array, "R Q *h"]:
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


def _unshare_transpose(g: Float[Array, "RS U N H"], indices: UnpackIndices) -> Float[Array, "R T N H"]:
    num_rows, copies, _ = indices.copy_index.shape
    g = g.reshape(num_rows, -1, *g.shape[2:])
    copy_gradient = lambda c: _where(indices.has_copy[:, c], _take(g, indices.copy_index[:, c]))  # noqa: E731
    return reduce(jnp.add, map(copy_gradient, range(copies)))  # a sum of two is rounded only once, in any dtype


@transposed_by(_unshare_transpose)
def unshare(x: Float[Array, "R T N H"], indices: UnpackIndices) -> Float[Array, "RS U N H"]:
    """Gather the rows' tokens into sequences; padding holds arbitrary tokens, which receive no gradient."""
    num_rows, num_sequences, length = indices.sources.shape
    tokens = _take(x, indices.sources.reshape(num_rows, -1))
    return tokens.reshape(num_rows * num_sequences, length, *x.shape[2:])


def _share_transpose(g: Float[Array, "R T N H"], indices: UnpackIndices) -> Float[Array, "RS U N H"]:
    num_rows, num_sequences, length = indices.sources.shape
    gradients = _where(indices.is_first_copy.reshape(num_rows, -1), _take(g, indices.sources.reshape(num_rows, -1)))
    return gradients.reshape(num_rows * num_sequences, length, *g.shape[2:])


@transposed_by(_share_transpose)
def share(y: Float[Array, "RS U N H"], indices: UnpackIndices) -> Float[Array, "R T N H"]:
    """Gather the sequences' tokens back into rows, taking the first copy of each; padding is 0."""
    y = y.reshape(indices.copy_index.shape[0], -1, *y.shape[2:])
    return _where(indices.has_copy[:, 0], _take(y, indices.copy_index[:, 0]))
