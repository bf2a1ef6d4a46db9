"""Compiler options, each with its reason; passed with the program, not by environment variables.

The defaults are documented or in published use, and change scheduling, not results beyond rounding. Left out, because
their gain was not measured here but their cost was: a larger scoped VMEM (``xla_tpu_scoped_vmem_limit_kib``, which
MaxText raises to 98304 on v6e; compilation took two to four times as long), and whole all-gathers instead of windowed
products (``xla_jf_spmd_threshold_for_windowed_einsum_mib``; up to a ninth more memory). ``run.compiler_flags`` is the
place to try them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.errors import UserError


class Flag(NamedTuple):
    """One option."""

    name: str
    value: str
    why: str
    kinds: tuple[str, ...] = ()  # device kinds that it is for, as JAX names them; (): all of the platform


_V5E = ("TPU v5 lite", "TPU v5e")
# What MaxText publishes for all-gathers of FSDP on TPUs, benchmarks/xla_flags_library.py.
FLAGS: dict[str, tuple[Flag, ...]] = {
    "tpu": (
        Flag("xla_enable_async_all_gather", "true", "weights are gathered during other computations"),
        Flag("xla_tpu_enable_async_collective_fusion", "true", "these computations are fused with the gather"),
        # libtpu 0.0.50 refuses this one on other chips, where it "might lead to incorrect results, hang"
        Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "for all-gathers too", _V5E),
        Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "over several computations"),
        Flag("xla_tpu_overlap_compute_collective_tc", "true", "the core computes while its links are busy"),
    ),
}
_BOOLEANS = {"true": "True", "false": "False"}  # the spelling that options of every platform accept


@contextmanager
def not_kept() -> Iterator[None]:
    """Keep programs out of JAX's cache on disk: one compiled for absent devices cannot be read back."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[option]
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, before)


def platform_flags(platform: str, kind: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """The options for devices of a platform, such as tpu, and kind, as ``jax.jit`` and ``lowered.compile`` take them.

    ``overrides`` is ``run.compiler_flags``: they add to or replace the flags of the table; an empty value removes one.

    Raises:
        UserError: what is to be removed is set on no platform.
    """
    set_here = {flag.name for flags in FLAGS.values() for flag in flags}
    for name in (name for name, value in overrides.items() if not value and name not in set_here):
        remedy = f"give it a value, or remove it; set on TPUs: {', '.join(sorted(set_here))}"
        raise UserError(f"run.compiler_flags: {name} is not set by default, so there is nothing to leave out: {remedy}")
    defaults = (flag for flag in FLAGS.get(platform, ()) if not flag.kinds or kind in flag.kinds)
    options = {flag.name: flag.value for flag in defaults} | dict(overrides)
    return {name: _BOOLEANS.get(value, value) for name, value in options.items() if value}


def compiler_options(mesh: Mesh, overrides: Mapping[str, str]) -> dict[str, str]:
    """``platform_flags`` of the mesh's devices, checked by their compiler.

    Raises:
        UserError: the compiler has no such option, or cannot read its value.
    """
    device = mesh.devices.flat[0]
    options = platform_flags(device.platform, device.device_kind, overrides)
    if not options:
        return options
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(scalar).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        remedy = f"{reason}; correct it, or leave it out with an empty value"
        raise UserError("run.compiler_flags", dict(overrides), remedy) from error
    return options
