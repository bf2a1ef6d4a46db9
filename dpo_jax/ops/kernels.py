"""Attention kernels of others, over ordinary causal sequences; every import of an experimental one is here.

Shape letters: S sequences, U tokens in one, N query heads, K key/value heads, H head.
"""

from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float, Int

LANES = 128  # a splash block is a multiple of it
BLOCKS = ((2048, 1024), (0, 512))  # (tokens of the longest sequence, tokens in a block at most): docs/decisions.md


def splash_sizes(length: int, longest: int) -> tuple[int, int]:
    """Tokens in a block, and in a whole number of blocks that hold ``length`` tokens."""
    most = next(block for reach, block in BLOCKS if longest >= reach)
    count = -(-length // most)
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
    """Splash attention: compiled where the program is compiled for a TPU, interpreted elsewhere.

    A token sees the tokens of its own segment that are not later and at most ``band`` - 1 places back. Only blocks
    within the band are visited. Scores are q . k as they are. U is a whole number of blocks of ``block`` tokens.
    """
    num_heads = q.shape[2]
    run = partial(_run_splash, block=block, band=band, num_heads=num_heads, softcap=softcap)
    # The platform compiled for, not that of this process: a CPU compiles for TPUs ahead of time.
    return jax.lax.platform_dependent(
        q, k, v, segments, tpu=partial(run, interpret=False), default=partial(run, interpret=True)
    )


def _run_splash(q, k, v, segments, *, block, band, num_heads, softcap, interpret):
    length = q.shape[1]
    back = band - 1 if band < length else None
    mask = splash_mask.LocalMask((length, length), window_size=(back, 0), offset=0)
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

    def one(inputs):
        *qkv, ids = inputs
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in qkv)
        out = cast("Array", kernel(q, k, v, segment_ids=splash_kernel.SegmentIds(ids, ids)))
        return jnp.swapaxes(out, 0, 1)

    # One sequence after another, as the kernel's grid goes too: its log-sums take 128 lanes, [N, U, 128] float32.
    return jax.lax.map(one, (q, k, v, segments))


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
    """Causal attention of sequences padded behind, one each; what stands in the padding of the result is undefined.

    ``cudnn`` can be traced only where cuDNN is installed; ``xla`` is the same call for checks elsewhere.
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
