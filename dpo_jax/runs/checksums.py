"""Shapes, dtypes and checksums of a pytree's arrays, by their paths in the tree."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp


def describe_leaves(tree: Any) -> dict[str, dict]:
    """Return the shape and dtype of every array by its path in the tree, such as ``params/layers/w``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    descriptions = [{"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for _, leaf in leaves]
    return dict(zip(names, descriptions, strict=True))


def leaf_checksums(tree: Any) -> dict[str, int]:
    """Return a 32-bit checksum of every array's bits by path, computed on the array's devices in one pass.

    It is the sum modulo 2**32 of a hash of each element's bits and row-major index. It therefore does not depend on the
    sharding or the number of devices. A change to a single element of at most 32 bits always changes it.
    """
    return dict(zip(describe_leaves(tree), map(int, jax.device_get(_checksums(jax.tree.leaves(tree)))), strict=True))


def weights_id(params: Any) -> str:
    """Return the SHA-256 (hex) of all weights' paths, shapes, dtypes and checksums; it does not depend on sharding."""
    leaves = describe_leaves(params)
    checksums = leaf_checksums(params)
    return hashlib.sha256(json.dumps([leaves, checksums], sort_keys=True).encode()).hexdigest()


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word_type = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]  # 8 bytes: two words
    bits = jax.lax.bitcast_convert_type(x, word_type).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):  # row-major index modulo 2**32
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finalizer: a bijection, so that different bits at the same index never collide."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
