"""Third-party kernels: attention of ordinary causal sequences, and outer products of groups of rows.

No other module imports experimental kernels.

Shape letters: S sequences, U tokens per sequence, N query heads, K key/value heads, H head dim, E groups of M rows in
all, D and F widths of rows.
"""

from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float, Int

MAX_BLOCK = 1024 * 128  # values of a block of heads; a backward kernel on larger ones exceeds a TPU's vector memory
LANES = 128  # a splash block size is a multiple of this
BLOCKS = ((2048, 1024), (0, 512))  # (minimum longest sequence, maximum block size), in tokens: docs/decisions.md

OUTER_TILE = 512  # most rows and columns of a tile of `grouped_outer`


def splash_sizes(length: int, longest: int, head_dim: int = LANES) -> tuple[int, int]:
    """Return the block size in tokens, and ``length`` rounded up to a multiple of it."""
    max_block = next(block for min_longest, block in BLOCKS if longest >= min_longest)
    max_block = min(max_block, MAX_BLOCK // head_dim)
    count = -(-length // max_block)
    block = LANES * -(-length // (LANES * count))
    return block, count * block


def splash(
    q: Float[Array, "S U N H"],
    k: Float[Array, "S U K H"],
    v: Float[Array, "S U K H"],
    segments: Int[Array, "S U"],
    *,
    block: int,
    band: int,
    softcap: float | None,
) -> Float[Array, "S U N H"]:
    """Compute splash attention; the kernel is interpreted unless the program is compiled for a TPU.

    A token attends to tokens of its own segment that are not later and at most ``band`` - 1 tokens back. Only blocks
    within this band are visited. Scores are q . k, without scaling. U is a multiple of ``block``.
    """
    num_heads = q.shape[2]
    run_kernel = partial(_run_splash, block=block, band=band, num_heads=num_heads, softcap=softcap)
    # The target platform, not that of this process: a CPU can compile for TPUs ahead of time.
    return jax.lax.platform_dependent(
        q, k, v, segments, tpu=partial(run_kernel, interpret=False), default=partial(run_kernel, interpret=True)
    )


def _run_splash(q, k, v, segments, *, block, band, num_heads, softcap, interpret):
    length = q.shape[1]
    window = band - 1 if band < length else None
    mask = splash_mask.LocalMask((length, length), window_size=(window, 0), offset=0)
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def attend_sequence(inputs):
        *arrays, ids = inputs
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in arrays)
        out = cast("Array", kernel(q, k, v, segment_ids=splash_kernel.SegmentIds(ids, ids)))
        return jnp.swapaxes(out, 0, 1)

    # Sequential, like the kernel's own grid, to save memory: its log-sum-exps take [N, U, 128] float32.
    return jax.lax.map(attend_sequence, (q, k, v, segments))


def padded(
    q: Float[Array, "S U N H"],
    k: Float[Array, "S U K H"],
    v: Float[Array, "S U K H"],
    lengths: Int[Array, " S"],
    *,
    window: int | None,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "S U N H"]:
    """Compute causal attention over right-padded sequences; the result is undefined at padding tokens.

    ``cudnn`` can be traced only where cuDNN is installed; ``xla`` makes the same call for tests elsewhere.
    """
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def row_tile(num_rows: int) -> int:
    """Return the rows per tile of `grouped_outer`; the number of rows must be a multiple of it."""
    return min(OUTER_TILE, LANES * -(-num_rows // LANES))


def grouped_outer(x: Float[Array, "M D"], y: Float[Array, "M F"], sizes: Int[Array, " E"]) -> Float[Array, "E D F"]:
    """Return each group's sum of outer products of its rows, in float32; rows after the last group are not read.

    The kernel is interpreted unless the program is compiled for a TPU, as is `splash`. A group without rows gets 0.
    """
    tile = row_tile(len(x)), min(OUTER_TILE, x.shape[1]), min(OUTER_TILE, y.shape[1])
    run_kernel = partial(tgmm, preferred_element_type=jnp.float32, tiling=tile)
    return jax.lax.platform_dependent(
        x.T, y, sizes, tpu=partial(run_kernel, interpret=False), default=partial(run_kernel, interpret=True)
    )
