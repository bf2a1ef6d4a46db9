"""Products of rows with the matrix of each row's expert, at a cost proportional to the number of routed rows.

Each slot (a token and one of its experts) has a row. Rows are sorted by expert, so that an expert's rows are adjacent.
On TPUs they are contiguous, and the products are kernels. Elsewhere each expert's rows start at a new block of rows, so
that a block has one expert, and a loop visits the blocks in use.

Shape letters: n tokens, m slots per token, E experts, S sorted rows, B blocks of b rows each, D inputs, F outputs.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.batch import round_up
from dpo_jax.ops import kernels
from dpo_jax.ops.transposes import transposed_by

Implementation = Literal["blocks", "kernels"]

MIN_BLOCK, MAX_BLOCK = 8, 64  # rows; docs/decisions.md


class Groups(NamedTuple):
    """Rows sorted by expert: where each row comes from, and where each slot's row is."""

    sizes: Int[Array, " E"]  # rows of each expert, without padding
    block_experts: Int[Array, " B"]  # expert of each block; arbitrary in unused blocks
    num_blocks: Int[Array, ""]  # number of blocks in use, which come first
    slots: Int[Array, " S"]  # slot of each row; arbitrary in padding
    is_used: Bool[Array, " S"]  # False: padding
    rows: Int[Array, "n m"]  # row of each slot; arbitrary if it has no expert
    is_routed: Bool[Array, "n m"]  # False: the slot has no expert

    @property
    def block(self) -> int:
        """Number of rows in each block."""
        return len(self.slots) // len(self.block_experts)

    @property
    def row_experts(self) -> Int[Array, " S"]:
        """Expert of each row; arbitrary in padding."""
        return jnp.repeat(self.block_experts, self.block)

    def window(self, i: Array | int, num_rows: int) -> "Groups":
        """Return the i-th window of ``num_rows`` rows, a divisor of S; slots whose rows are outside have no expert."""
        start = i * num_rows
        rows = self.rows - start
        is_routed = self.is_routed & (rows >= 0) & (rows < num_rows)
        block_experts = jax.lax.dynamic_slice_in_dim(self.block_experts, start // self.block, num_rows // self.block)
        is_used = jax.lax.dynamic_slice_in_dim(self.is_used, start, num_rows)
        is_member = (jnp.repeat(block_experts, self.block) == jnp.arange(len(self.sizes))[:, None]) & is_used
        return Groups(
            sizes=is_member.sum(-1, dtype=jnp.int32),
            block_experts=block_experts,
            num_blocks=jnp.clip(self.num_blocks - start // self.block, 0, num_rows // self.block),
            slots=jax.lax.dynamic_slice_in_dim(self.slots, start, num_rows),
            is_used=is_used,
            rows=jnp.where(is_routed, rows, 0),
            is_routed=is_routed,
        )


def block_size(num_slots: int, num_experts: int) -> int:
    """Return the rows per block of the loop: half of an expert's average rows, as a power of two within bounds."""
    half = num_slots // (2 * num_experts)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(0, half.bit_length() - 1)))


def make_groups(
    experts: Int[Array, "n m"], num_experts: int, implementation: Implementation, num_windows: int = 1
) -> Groups:
    """Sort slots by expert; the number ``num_experts`` marks a slot without an expert, which gets no row.

    S suffices for any routing and divides into ``num_windows`` equal windows. A block of ``kernels`` is a single row.
    """
    num_slots = experts.size
    if implementation == "blocks":
        block = tile = block_size(num_slots, num_experts)
        bound = (num_slots + num_experts * (block - 1)) // block * block
    else:
        block, tile, bound = 1, kernels.row_tile(-(-num_slots // num_windows)), num_slots
    num_rows = num_windows * round_up(bound / num_windows, tile)

    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1, dtype=flat.dtype)).astype(jnp.int32)
    starts, sizes = bounds[:-1], jnp.diff(bounds)
    padded_sizes = -(-sizes // block) * block
    padded_ends = jnp.cumsum(padded_sizes)
    padded_starts = padded_ends - padded_sizes

    first_rows = jnp.arange(0, num_rows, block, dtype=jnp.int32)
    block_experts = jnp.minimum(jnp.searchsorted(padded_ends, first_rows, side="right"), num_experts - 1)
    per_row = lambda x: jnp.repeat(x[block_experts], block)  # noqa: E731
    offsets = jnp.arange(num_rows, dtype=jnp.int32) - per_row(padded_starts)

    is_routed = flat < num_experts
    expert = jnp.where(is_routed, flat, 0)
    rows = jnp.argsort(order).astype(jnp.int32) - starts[expert] + padded_starts[expert]
    return Groups(
        sizes=sizes,
        block_experts=block_experts.astype(jnp.int32),
        num_blocks=padded_ends[-1] // block,
        slots=order[jnp.minimum(per_row(starts) + offsets, num_slots - 1)],
        is_used=offsets < per_row(sizes),
        rows=jnp.where(is_routed, rows, 0).reshape(experts.shape),
        is_routed=is_routed.reshape(experts.shape),
    )


def sum_windows(fn: Callable[[Groups], Any], groups: Groups, num_windows: int) -> Any:
    """Return the sum of ``fn(window)`` over the windows in use, in float32; a single window is always visited."""
    if num_windows == 1:
        return jax.tree.map(lambda x: x.astype(jnp.float32), fn(groups))
    num_rows = len(groups.slots) // num_windows

    def visit(i, sums):
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, fn(groups.window(i, num_rows)))

    shapes = jax.eval_shape(lambda: fn(groups.window(0, num_rows)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.fori_loop(0, -(-groups.num_blocks * groups.block // num_rows), visit, zeros)


def _take(x: Float[Array, "i *f"], indices: Int[Array, " j"], mask: Bool[Array, " j"]) -> Float[Array, "j *f"]:
    taken = x.at[indices].get(mode="promise_in_bounds")
    return jnp.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), taken, 0)


def _sum_slots(y: Float[Array, "S F"], groups: Groups) -> Float[Array, "n F"]:
    """Sum the rows of each token's slots in float32, rounded once."""
    rows_of = lambda i: _take(y, groups.rows[:, i], groups.is_routed[:, i]).astype(jnp.float32)  # noqa: E731
    return reduce(jnp.add, map(rows_of, range(groups.rows.shape[1]))).astype(y.dtype)


def _token_rows(x: Float[Array, "n F"], groups: Groups) -> Float[Array, "S F"]:
    return _take(x, groups.slots // groups.rows.shape[1], groups.is_used)


def _slot_values(g: Float[Array, " S"], groups: Groups) -> Float[Array, "n m"]:
    return _take(g, groups.rows.reshape(-1), groups.is_routed.reshape(-1)).reshape(groups.rows.shape)


@transposed_by(_sum_slots)
def spread(x: Float[Array, "n F"], groups: Groups) -> Float[Array, "S F"]:
    """Gather the token of each row; padding is 0."""
    return _token_rows(x, groups)


@transposed_by(_token_rows)
def collect(y: Float[Array, "S F"], groups: Groups) -> Float[Array, "n F"]:
    """Return the sum of each token's rows; the transpose of `spread`."""
    return _sum_slots(y, groups)


@transposed_by(_slot_values)
def spread_slots(x: Float[Array, "n m"], groups: Groups) -> Float[Array, " S"]:
    """Gather the value of each row's slot; padding is 0."""
    return _take(x.reshape(-1), groups.slots, groups.is_used)


@jax.custom_vjp
def spread_experts(x: Float[Array, "E F"], groups: Groups) -> Float[Array, "S F"]:
    """Return the vector of each row's expert, in float32; padding holds that of some expert."""
    return x.astype(jnp.float32)[groups.row_experts]


def _spread_experts_backward(residuals, g):
    x, groups = residuals
    is_member = (groups.row_experts == jnp.arange(len(x))[:, None]) & groups.is_used
    grad = jnp.einsum("es,sf->ef", is_member.astype(jnp.float32), g, precision=jax.lax.Precision.HIGHEST)
    return grad.astype(x.dtype), None


spread_experts.defvjp(lambda x, groups: (spread_experts(x, groups), (x, groups)), _spread_experts_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
    x: Float[Array, "S D"],
    matrices: Float[Array, "E D F"],
    groups: Groups,
    implementation: Implementation,
    precision: str | None,
) -> Float[Array, "S F"]:
    """Multiply each row by its expert's matrix, in x's dtype; the matrices' gradient is accumulated in float32.

    Padding of x is 0 or anything finite, and so is that of the result.
    """
    return PRODUCTS[implementation](x, matrices, groups, False, precision)


def _product_backward(implementation, precision, residuals, g):
    x, matrices, groups = residuals
    x_grad = PRODUCTS[implementation](g, matrices, groups, True, precision)
    matrices_grad = OUTER_PRODUCTS[implementation](x, g, groups, precision)
    return x_grad, matrices_grad.astype(matrices.dtype), None


product.defvjp(
    lambda x, matrices, groups, *options: (product(x, matrices, groups, *options), (x, matrices, groups)),
    _product_backward,
)


def _block_product(x, matrices, groups, is_transposed, precision):
    blocks = x.reshape(len(groups.block_experts), -1, x.shape[-1])
    spec, width = ("bf,df->bd", matrices.shape[1]) if is_transposed else ("bd,df->bf", matrices.shape[2])

    def visit(i, out):
        matrix = matrices[groups.block_experts[i]].astype(x.dtype)
        y = jnp.einsum(spec, blocks[i], matrix, precision=precision)
        return jax.lax.dynamic_update_slice_in_dim(out, y[None], i, axis=0)

    out = jnp.zeros((*blocks.shape[:2], width), x.dtype)
    return jax.lax.fori_loop(0, groups.num_blocks, visit, out).reshape(len(x), width)


def _block_outer(x, g, groups, precision):
    """Return each expert's sum of outer products of its rows, [E, D, F] float32."""
    x_blocks, g_blocks = (rows.reshape(len(groups.block_experts), -1, rows.shape[-1]) for rows in (x, g))

    def visit(i, sums):
        expert = groups.block_experts[i]
        outer = jnp.einsum("bd,bf->df", x_blocks[i], g_blocks[i], precision=precision,
                           preferred_element_type=jnp.float32)  # fmt: skip
        total = jax.lax.dynamic_slice_in_dim(sums, expert, 1) + outer
        return jax.lax.dynamic_update_slice_in_dim(sums, total, expert, axis=0)

    zeros = jnp.zeros((len(groups.sizes), x.shape[-1], g.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(0, groups.num_blocks, visit, zeros)


def _kernel_product(x, matrices, groups, is_transposed, precision):
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2 if is_transposed else 1,)), ((), ())), [0], [0])
    y = jax.lax.ragged_dot_general(x, matrices.astype(x.dtype), groups.sizes, dims, precision=precision)
    return jnp.where(groups.is_used[:, None], y, 0)  # the kernel may leave rows of no expert uninitialized


def _kernel_outer(x, g, groups, precision):
    return kernels.grouped_outer(x, g, groups.sizes)


PRODUCTS: dict[Implementation, Callable[..., Array]] = {"blocks": _block_product, "kernels": _kernel_product}
OUTER_PRODUCTS: dict[Implementation, Callable[..., Array]] = {"blocks": _block_outer, "kernels": _kernel_outer}
